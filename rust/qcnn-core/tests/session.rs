//! Sessions against a plain interpreter, on every ISA of the host.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Random, agree, conv, dense, fc, interpret, network, node, quantized};
use proptest::prelude::*;
use qcnn_core::session::Options;
use qcnn_core::{Error, Isa, Network, Precision, Session, Workspace};
use serde_json::{Value, json};

fn sessions(network: &Network) -> Vec<Session> {
    Isa::available()
        .into_iter()
        .map(|isa| {
            let options = Options {
                isa: Some(isa),
                precision: Precision::Exact,
            };
            Session::new(network, options).unwrap()
        })
        .collect()
}

/// Run `n` images on every ISA; every node has to agree with the interpreter.
fn check_input(network: &Network, input: &[f32], n: usize) -> Result<(), String> {
    let image_len = input.len() / n;
    let expected: Vec<_> = input
        .chunks_exact(image_len)
        .map(|x| interpret(network, x))
        .collect();
    for session in sessions(network) {
        let mut workspace = Workspace::new(&session, n).unwrap();
        let mut failures = Vec::new();
        let mut i = 0;
        session
            .trace(&mut workspace, input, n, |name, value| {
                assert_eq!(name, expected[0][i].0);
                for (image, value) in value.chunks_exact(value.len() / n).enumerate() {
                    if let Err(e) = agree(value, &expected[image][i].1) {
                        failures.push(format!("{}: {name}, image {image}: {e}", session.isa()));
                    }
                }
                i += 1;
            })
            .unwrap();
        if i != expected[0].len() {
            failures.push(format!("{}: {i} nodes traced", session.isa()));
        }
        let mut output = vec![f32::NAN; n * session.output_len()];
        session.run(&mut workspace, input, n, &mut output).unwrap();
        for (image, got) in output.chunks_exact(session.output_len()).enumerate() {
            let nodes = &expected[image];
            let value = nodes
                .iter()
                .find(|(name, _)| *name == network.graph().output);
            let value = value.map_or(&input[image * image_len..][..image_len], |(_, value)| value);
            if let Err(e) = agree(got, value) {
                failures.push(format!("{}: output, image {image}: {e}", session.isa()));
            }
        }
        if !failures.is_empty() {
            return Err(failures.join("\n"));
        }
    }
    Ok(())
}

fn check(network: &Network, n: usize) -> Result<(), String> {
    let image_len: usize = network.graph().input.shape.iter().product();
    let input: Vec<f32> = Random(3)
        .floats(n * image_len)
        .iter()
        .map(|v| v * 4.0)
        .collect();
    check_input(network, &input, n)
}

#[test]
fn every_operation() {
    let pool = |kind: &str, padding: [usize; 4], ceil_mode: bool| json!({"type": kind, "kernel": [3, 2], "stride": [2, 3], "padding": padding, "ceil_mode": ceil_mode});
    let average = |padding: [usize; 4], ceil_mode: bool, count: bool| {
        let mut op = pool("average_pool", padding, ceil_mode);
        op["count_include_pad"] = json!(count);
        op
    };
    let lrn = |size: usize, beta: f32| json!({"type": "lrn", "size": size, "alpha": 0.3, "beta": beta, "bias": 1.5});
    let mut ops = vec![
        conv(5, dense()),
        conv(5, quantized(2, 3, 2)),
        pool("max_pool", [0; 4], false),
        pool("max_pool", [1, 1, 2, 0], true),
        json!({"type": "global_average_pool"}),
        json!({"type": "global_max_pool"}),
        lrn(3, 0.75),
        lrn(4, 0.75),
        lrn(100, 0.75),
        lrn(5, 0.6),
        json!({"type": "relu"}),
        json!({"type": "leaky_relu", "alpha": 0.1}),
        json!({"type": "clip", "low": -1.5, "high": 2.0}),
        json!({"type": "sigmoid"}),
        json!({"type": "tanh"}),
        json!({"type": "hard_sigmoid", "alpha": 0.2, "beta": 0.5}),
        json!({"type": "hard_swish"}),
        json!({"type": "silu"}),
        json!({"type": "flatten"}),
        json!({"type": "reshape", "shape": [7, 3, 13]}),
        json!({"type": "batch_norm", "epsilon": 1e-5}),
        json!({"type": "softmax"}),
        json!({"type": "log_softmax"}),
        json!({"type": "slice", "start": [0, 0, 0], "step": [1, 1, 1], "shape": [3, 7, 13]}),
        json!({"type": "slice", "start": [1, 0, 0], "step": [1, 2, 2], "shape": [2, 4, 7]}),
        json!({"type": "slice", "start": [2, 6, 12], "step": [9, 9, 9], "shape": [1, 1, 1]}),
        json!({"type": "pad", "before": [0, 0, 0], "after": [0, 0, 0], "value": 1.0}),
        json!({"type": "pad", "before": [2, 0, 1], "after": [1, 3, 0], "value": -2.5}),
        json!({"type": "transpose", "view": [3, 7, 13], "axes": [1, 2, 0], "shape": [7, 13, 3]}),
        json!({"type": "transpose", "view": [3, 91], "axes": [1, 0], "shape": [273]}),
        json!({"type": "transpose", "view": [3, 1, 7, 13], "axes": [3, 1, 2, 0], "shape": [13, 7, 3]}),
        json!({"type": "dropout", "rate": 0.5}),
    ];
    for padding in [[0; 4], [1, 1, 1, 1], [2, 0, 0, 1]] {
        for ceil_mode in [false, true] {
            for count in [false, true] {
                ops.push(average(padding, ceil_mode, count));
            }
        }
    }
    let mut failures = Vec::new();
    for op in ops {
        let network = network(&[3, 7, 13], &[node("y", &["x"], op.clone())], None);
        for n in [1, 3] {
            failures.extend(check(&network, n).map_err(|e| format!("{op}: {e}")).err());
        }
    }
    for op in [
        json!({"type": "softmax"}),
        json!({"type": "log_softmax"}),
        json!({"type": "slice", "start": [3], "step": [4], "shape": [10]}),
        json!({"type": "pad", "before": [3], "after": [0], "value": 0.0}),
        json!({"type": "batch_norm", "epsilon": 0.0}),
        fc(9, dense()),
        fc(9, quantized(9, 4, 5)),
    ] {
        let network = network(&[41], &[node("y", &["x"], op.clone())], None);
        failures.extend(check(&network, 5).map_err(|e| format!("{op}: {e}")).err());
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Operands with extents of 1 along any axes.
#[test]
fn sums_and_products_repeat_their_operands() {
    let mut failures = Vec::new();
    for kind in ["add", "mul"] {
        for extents in 0..8 {
            let shape = [5, 3, 21];
            let kept: Vec<_> = (0..3)
                .map(|axis| {
                    if extents >> axis & 1 == 1 {
                        shape[axis]
                    } else {
                        1
                    }
                })
                .collect();
            let slice =
                json!({"type": "slice", "start": [0, 0, 0], "step": [1, 1, 1], "shape": kept});
            let network = network(
                &shape,
                &[
                    node("part", &["x"], slice),
                    node("y", &["x", "part", "x"], json!({"type": kind})),
                ],
                None,
            );
            failures.extend(
                check(&network, 3)
                    .map_err(|e| format!("{kind} {kept:?}: {e}"))
                    .err(),
            );
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Rows that end anywhere within a vector, windows that leave the input.
#[test]
fn pools_of_all_widths() {
    let mut failures = Vec::new();
    for kind in ["max_pool", "average_pool"] {
        for (kernel, stride) in [(1, 1), (2, 2), (3, 1), (3, 2), (5, 2), (3, 3), (2, 5)] {
            for padding in [[0; 4], [0, kernel / 2, 0, (kernel - 1) / 2]] {
                for width in [5, 15, 16, 17, 31, 32, 33, 55, 70] {
                    let mut op = json!({
                        "type": kind, "kernel": [kernel, kernel], "stride": [stride, stride],
                        "padding": padding, "ceil_mode": true,
                    });
                    if kind == "average_pool" {
                        op["count_include_pad"] = json!(true);
                    }
                    let network = network(&[2, 21, width], &[node("y", &["x"], op.clone())], None);
                    let result = check(&network, 2);
                    failures.extend(result.map_err(|e| format!("{op} {width}: {e}")).err());
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Kernels that pool while they write have the responses of step after step, and leave
/// alone what others read, buffers included.
#[test]
fn pools_with_the_convolution() {
    let pool = |kernel: usize| {
        json!({
            "type": "max_pool", "kernel": [kernel, kernel], "stride": [2, 2],
            "padding": [0, 0, 0, 0], "ceil_mode": false,
        })
    };
    let layer = |outputs| conv(outputs, quantized(4, 16, 4));
    let chain = |kernel| {
        [
            node("a", &["x"], layer(16)),
            node("b", &["a"], relu()),
            node("c", &["b"], pool(kernel)),
            node("d", &["c"], layer(33)),
            node("e", &["d"], pool(kernel)),
        ]
    };
    let read_twice = [
        node("a", &["x"], layer(16)),
        node("b", &["a"], relu()),
        node("c", &["b"], pool(2)),
        node("d", &["b"], pool(2)),
        node("e", &["c", "d"], json!({"type": "add"})),
    ];
    for (nodes, output) in [
        (&chain(2)[..], "e"),
        (&chain(3)[..], "e"),
        (&read_twice[..], "e"),
        (&chain(2)[..3], "b"),
    ] {
        for size in [[12, 12], [13, 31], [7, 64]] {
            let network = network(&[16, size[0], size[1]], nodes, Some(output));
            let mut input = Random(8).floats(2 * 16 * size[0] * size[1]);
            input[5] = f32::NAN;
            for isa in Isa::available() {
                for precision in [Precision::Exact, Precision::Fast, Precision::Int8] {
                    let options = Options {
                        isa: Some(isa),
                        precision,
                    };
                    let session = Session::new(&network, options).unwrap();
                    let mut workspace = Workspace::new(&session, 2).unwrap();
                    let mut expected = Vec::new();
                    let keep = |name: &str, value: &[f32]| {
                        if name == output {
                            expected = value.iter().map(|v| v.to_bits()).collect();
                        }
                    };
                    session.trace(&mut workspace, &input, 2, keep).unwrap();
                    let mut got = vec![0.0; 2 * session.output_len()];
                    session.run(&mut workspace, &input, 2, &mut got).unwrap();
                    let got: Vec<u32> = got.iter().map(|v| v.to_bits()).collect();
                    assert_eq!(got, expected, "{isa} {precision:?} {size:?}");
                }
            }
        }
    }
}

fn relu() -> Value {
    json!({"type": "relu"})
}

/// Graphs in which a buffer is easily reused too early.
#[expect(clippy::too_many_lines, reason = "a list of cases")]
fn graphs() -> Vec<(&'static str, Network)> {
    let shape = &[4, 6, 5];
    let add = || json!({"type": "add"});
    let concat = || json!({"type": "concat"});
    vec![
        (
            "the input is not written to",
            network(
                shape,
                &[node("a", &["x"], relu()), node("y", &["a", "x"], add())],
                None,
            ),
        ),
        (
            "a value that is needed later is not changed in place",
            network(
                shape,
                &[
                    node("a", &["x"], conv(4, dense())),
                    node("b", &["a"], relu()),
                    node("c", &["b"], conv(4, quantized(2, 4, 2))),
                    node("d", &["c", "a"], add()),
                    node("y", &["d", "b", "c"], concat()),
                ],
                None,
            ),
        ),
        (
            "an alias keeps its value alive",
            network(
                shape,
                &[
                    node("a", &["x"], conv(3, dense())),
                    node("flat", &["a"], json!({"type": "flatten"})),
                    node("b", &["a"], relu()),
                    node("c", &["b"], conv(3, dense())),
                    node("d", &["c"], json!({"type": "flatten"})),
                    node("y", &["d", "flat"], add()),
                ],
                None,
            ),
        ),
        (
            "a value added to itself",
            network(
                shape,
                &[
                    node("a", &["x"], conv(4, dense())),
                    node("b", &["a", "a", "a"], add()),
                    node("y", &["b", "b"], concat()),
                ],
                None,
            ),
        ),
        (
            "a value added to its own alias",
            network(
                &[30],
                &[
                    node("a", &["x"], fc(12, dense())),
                    node("b", &["a"], json!({"type": "dropout", "rate": 0.5})),
                    node("y", &["a", "b"], add()),
                ],
                None,
            ),
        ),
        (
            "values nobody reads, and an output in the middle",
            network(
                shape,
                &[
                    node("a", &["x"], conv(4, dense())),
                    node("y", &["a"], relu()),
                    node("unused", &["y"], conv(9, dense())),
                    node("b", &["y"], json!({"type": "tanh"})),
                    node("c", &["b", "x"], add()),
                ],
                Some("y"),
            ),
        ),
        (
            "the output is the input under another name",
            network(
                shape,
                &[node(
                    "y",
                    &["x"],
                    json!({"type": "reshape", "shape": [120]}),
                )],
                None,
            ),
        ),
        ("no nodes", network(shape, &[], Some("x"))),
        (
            "a residual network",
            network(
                shape,
                &[
                    node("c1", &["x"], conv(8, quantized(2, 5, 3))),
                    node(
                        "n1",
                        &["c1"],
                        json!({"type": "batch_norm", "epsilon": 1e-5}),
                    ),
                    node("r1", &["n1"], relu()),
                    node("c2", &["r1"], conv(8, dense())),
                    node("s1", &["c2", "r1"], add()),
                    node("r2", &["s1"], relu()),
                    node("c3", &["r2"], conv(8, dense())),
                    node("s2", &["c3", "r2", "r1"], add()),
                    node("p", &["s2"], json!({"type": "global_average_pool"})),
                    node("f", &["p"], json!({"type": "flatten"})),
                    node("fc", &["f"], fc(10, quantized(4, 16, 2))),
                    node("y", &["fc"], json!({"type": "softmax"})),
                ],
                None,
            ),
        ),
    ]
}

#[test]
fn graphs_with_branches() {
    let mut failures = Vec::new();
    for (what, network) in graphs() {
        for n in [1, 2, 9] {
            failures.extend(
                check(&network, n)
                    .map_err(|e| format!("{what}, n = {n}: {e}"))
                    .err(),
            );
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn buffers_are_reused() {
    let nodes: Vec<_> = (0..10)
        .map(|i| {
            let input = if i == 0 {
                "x".to_owned()
            } else {
                format!("c{}", i - 1)
            };
            node(&format!("c{i}"), &[input.as_str()], conv(4, dense()))
        })
        .collect();
    let network = network(&[4, 50, 40], &nodes, None);
    let session = Session::new(&network, Options::default()).unwrap();
    // Input and output of a layer, and what the layer needs itself.
    let scratch = session.workspace_bytes(1) - 2 * 4 * 50 * 40 * size_of::<f32>();
    assert!(session.workspace_bytes(3) <= scratch + 3 * 2 * 4 * 50 * 40 * size_of::<f32>());
}

#[test]
fn a_workspace_serves_any_smaller_batch() {
    for (what, network) in graphs() {
        let image_len: usize = network.graph().input.shape.iter().product();
        let input = Random(5).floats(9 * image_len);
        for session in sessions(&network) {
            let mut used = Workspace::new(&session, 9).unwrap();
            for n in [9, 1, 4, 0, 9, 2] {
                let mut output = vec![0.0; n * session.output_len()];
                let input = &input[..n * image_len];
                session.run(&mut used, input, n, &mut output).unwrap();
                let mut fresh = Workspace::new(&session, n).unwrap();
                let mut expected = vec![0.0; n * session.output_len()];
                session.run(&mut fresh, input, n, &mut expected).unwrap();
                assert_eq!(output, expected, "{what}, {}, n = {n}", session.isa());
            }
        }
    }
}

#[test]
fn nan_and_infinities_go_through() {
    let window =
        json!({"kernel": [2, 2], "stride": [1, 1], "padding": [0, 0, 0, 0], "ceil_mode": false});
    let mut max_pool = window.clone();
    max_pool["type"] = json!("max_pool");
    let mut average_pool = window;
    average_pool["type"] = json!("average_pool");
    average_pool["count_include_pad"] = json!(false);
    for op in [
        max_pool,
        average_pool,
        relu(),
        json!({"type": "leaky_relu", "alpha": 0.1}),
        json!({"type": "clip", "low": -1.0, "high": 1.0}),
        json!({"type": "sigmoid"}),
        json!({"type": "tanh"}),
        json!({"type": "hard_sigmoid", "alpha": 0.2, "beta": 0.5}),
        json!({"type": "global_max_pool"}),
        json!({"type": "global_average_pool"}),
        json!({"type": "softmax"}),
        json!({"type": "lrn", "size": 1, "alpha": 1.0, "beta": 0.75, "bias": 1.0}),
        json!({"type": "add"}),
        conv(3, dense()),
        conv(3, quantized(1, 3, 2)),
    ] {
        let inputs: &[&str] = if op["type"] == "add" {
            &["x", "x"]
        } else {
            &["x"]
        };
        let network = network(&[2, 6, 20], &[node("y", inputs, op.clone())], None);
        for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 77, 239] {
                let mut input = Random(11).floats(240);
                input[at] = special;
                let result = check_input(&network, &input, 1);
                assert_eq!(result, Ok(()), "{op}, {special} at {at}");
            }
        }
    }
}

#[test]
fn softmax_of_large_logits() {
    let network = network(&[3], &[node("y", &["x"], json!({"type": "softmax"}))], None);
    check_input(&network, &[1000.0, 999.0, -1000.0], 1).unwrap();
}

#[test]
fn errors_say_what_is_wrong() {
    let network = network(&[5], &[node("y", &["x"], fc(3, dense()))], None);
    let session = Session::new(&network, Options::default()).unwrap();
    let mut workspace = Workspace::new(&session, 2).unwrap();
    let mut run = |input: usize, n: usize, output: usize| {
        session
            .run(&mut workspace, &vec![0.0; input], n, &mut vec![0.0; output])
            .unwrap_err()
    };
    assert!(matches!(run(9, 2, 6), Error::Shape(m) if m.contains("input") && m.contains('9')));
    assert!(matches!(run(10, 2, 5), Error::Shape(m) if m.contains("output") && m.contains('5')));
    assert!(matches!(run(15, 3, 9), Error::Config(m) if m.contains("batch is 3")));

    let other = common::network(&[5], &[node("y", &["x"], fc(400, dense()))], None);
    let other = Session::new(&other, Options::default()).unwrap();
    let result = other.run(&mut workspace, &[0.0; 5], 1, &mut [0.0; 400]);
    assert!(matches!(result, Err(Error::Config(m)) if m.contains("another session")));

    assert!(
        matches!(Workspace::new(&session, usize::MAX), Err(Error::Config(m)) if m.contains("batch"))
    );
    assert!(matches!("half".parse::<Precision>(), Err(Error::Config(m)) if m.contains("half")));
}

#[test]
fn batch_norm_needs_positive_variance() {
    let good = network(
        &[2, 3, 3],
        &[node(
            "y",
            &["x"],
            json!({"type": "batch_norm", "epsilon": 0.0}),
        )],
        None,
    );
    let mut tensors = good.tensors().clone();
    tensors.get_mut("y.variance").unwrap().data = qcnn_core::TensorData::F32(vec![1.0, 0.0]);
    let bad = Network::new(good.graph().clone(), tensors).unwrap();
    let error = Session::new(&bad, Options::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("\"y\"") && error.contains("channel 1"),
        "{error}"
    );
}

#[test]
fn sessions_are_shared_between_threads() {
    let (_, network) = graphs().pop().unwrap();
    let session = Session::new(&network, Options::default()).unwrap();
    let input = Random(1).floats(120);
    let run = || {
        let mut workspace = Workspace::new(&session, 1).unwrap();
        let mut output = vec![0.0; session.output_len()];
        session.run(&mut workspace, &input, 1, &mut output).unwrap();
        output
    };
    let expected = run();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), expected);
        }
    });
}

#[test]
fn kernels_are_named() {
    let nodes = [
        node("conv", &["x"], conv(8, quantized(1, 4, 3))),
        node("flat", &["conv"], json!({"type": "flatten"})),
        node("fc", &["flat"], fc(4, dense())),
    ];
    let network = network(&[3, 5, 5], &nodes, None);
    for session in sessions(&network) {
        let kernels: Vec<_> = session.kernels().collect();
        assert_eq!(
            kernels.iter().map(|k| k.0).collect::<Vec<_>>(),
            ["conv", "fc"]
        );
        // Only some kernels have more for the highest levels than the ones below have.
        let isas = match session.isa() {
            Isa::Avx512Amx => vec![Isa::Avx512Vbmi, Isa::Avx512Fp16, Isa::Avx512Amx],
            Isa::Avx512Fp16 => vec![Isa::Avx512Vbmi, Isa::Avx512Fp16],
            isa => vec![isa],
        };
        let named = |kernel: &str| isas.iter().any(|isa| kernel.contains(isa.name()));
        assert!(kernels.iter().all(|k| named(k.1)), "{kernels:?}");
    }
}

proptest! {
    // Seeds of failures are printed; integration tests have no place for files.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_pooling(
        size in (1usize..12, 1usize..40),
        kernel in (1usize..5, 1usize..5),
        stride in (1usize..4, 1usize..4),
        padding in prop::array::uniform4(0usize..4),
        ceil_mode in any::<bool>(),
        kind in 0..3,
    ) {
        // Padding as large as the window is refused, as are smaller inputs.
        let padding = [0, 1, 2, 3].map(|i| padding[i] % [kernel.0, kernel.1][i % 2]);
        let size = (size.0.max(kernel.0), size.1.max(kernel.1));
        let mut op = json!({
            "type": if kind == 0 { "max_pool" } else { "average_pool" },
            "kernel": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode,
        });
        if kind > 0 {
            op["count_include_pad"] = json!(kind == 2);
        }
        let network = network(&[2, size.0, size.1], &[node("y", &["x"], op)], None);
        prop_assert_eq!(check(&network, 2), Ok(()));
    }

    #[test]
    fn any_lrn(
        shape in prop::array::uniform3(1usize..12),
        size in 1usize..14,
        beta in prop::sample::select(&[0.75f32, 0.5, 1.0, 0.3][..]),
    ) {
        let op = json!({"type": "lrn", "size": size, "alpha": 0.7, "beta": beta, "bias": 0.8});
        let network = network(&shape, &[node("y", &["x"], op)], None);
        prop_assert_eq!(check(&network, 2), Ok(()));
    }
}
