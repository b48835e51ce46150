import json
import os
from itertools import pairwise

import numpy as np
import pytest
from random_networks import Binary, NetworkBuilder

from qcnn_py import (
    ConfigError,
    Network,
    QcnnError,
    QuantizedWeights,
    ShapeError,
    benchmarking,
)
from qcnn_py.architectures import conv_fc
from qcnn_py.benchmarking import (
    Contender,
    _round_medians,
    benchmark,
    format_table,
)


def small_network(metadata: dict[str, object] | None = None) -> Network:
    """Return conv1 quantised (K = 4, C' = 2), fc1 quantised, fc2 dense."""
    rng = np.random.default_rng(0)
    network = conv_fc((3, 8, 8), (6,), (5,), 4, metadata=metadata)

    def weights(shape: tuple[int, ...], dsub: int, bias: int) -> QuantizedWeights:
        return QuantizedWeights(
            codebooks=rng.standard_normal((shape[-1], 4, dsub)).astype(np.float32),
            codes=rng.integers(4, size=shape, dtype=np.uint8),
            bias=np.zeros(bias, np.float32),
        )

    conv = weights((6, 3, 3, 2), 2, 6)
    # The third channel stands alone in its sub-vector.
    conv.codebooks[1, :, 1] = 0
    network = network.with_quantized_layer("conv1", conv)
    return network.with_quantized_layer("fc1", weights((5, 24), 4, 5))


@pytest.fixture(scope="module")
def result() -> dict:
    return benchmark(small_network(), repeats=2, batches=12, warmup=1, seed=3)


def test_result_is_plain_json(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_operations_are_counted_as_in_the_paper(result):
    conv_dense, conv = 64 * 6 * 9 * 3, 64 * 3 * 4 + 64 * 6 * 9 * 2
    fc_dense, fc = 96 * 5, 96 * 4 + 5 * 24
    last = 5 * 4
    assert result["operations"] == {
        "dense": conv_dense + fc_dense + last,
        "quantized": conv + fc + last,
        "theoretical_speedup": (conv_dense + fc_dense + last) / (conv + fc + last),
    }
    assert [layer["operations"] for layer in result["layers"]] == [conv, fc, last]


def test_averages_are_means_of_medians(result):
    dense, quantized, exact = result["contenders"]
    for contender in (dense, quantized, exact):
        medians = [repeat["median"] for repeat in contender["repeats"]]
        assert len(medians) == 2
        assert contender["average_ms"] == pytest.approx(np.mean(medians))
        assert contender["spread_ms"] == pytest.approx(np.std(medians, ddof=1))
    assert dense["speedup"] == 1
    assert quantized["speedup"] == dense["average_ms"] / quantized["average_ms"]


def test_statistics_are_in_order(result):
    order = ("minimum", "lower_quartile", "median", "upper_quartile", "maximum")
    for contender in result["contenders"]:
        for repeat in contender["repeats"]:
            values = [repeat[name] for name in order]
            assert all(0 < low <= high for low, high in pairwise(values))


def test_layers_name_their_kernels_and_times(result):
    assert [layer["name"] for layer in result["layers"]] == ["conv1", "fc1", "fc2"]
    assert [layer["quantized"] for layer in result["layers"]] == [True, True, False]
    for layer in result["layers"]:
        assert layer["kernel"]
        assert layer["speedup"] == layer["dense_ms"] / layer["ms"]
        assert layer["compression"] == layer["dense_bytes"] / layer["bytes"]


def test_bytes_cover_all_parameters(result):
    network = result["network"]
    assert network["dense_bytes"] == 4 * (6 * 27 + 6 + 5 * 96 + 5 + 4 * 5 + 4)
    assert network["bytes"] == sum(layer["bytes"] for layer in result["layers"])


def test_one_repeat_has_no_spread():
    single = benchmark(small_network(), repeats=1, batches=1, warmup=0)
    assert single["contenders"][1]["spread_ms"] is None
    assert single["contenders"][1]["speedup_spread"] is None


def test_drawn_alexnet_says_so_and_stands_beside_the_published_figures():
    origin = {"architecture": "AlexNet", "parameters": "drawn", "seed": 0}
    drawn = benchmark(small_network({"origin": origin}), repeats=1, batches=1)
    assert drawn["network"]["parameters_drawn"] is True
    assert drawn["published"]["theoretical_speedup"] == 4.15
    text = format_table(drawn)
    assert "drawn" in text
    assert "4.15x" in text


def test_foreign_origin_is_ignored():
    foreign = benchmark(small_network({"origin": "model zoo"}), repeats=1, batches=1)
    assert foreign["network"]["architecture"] is None
    assert foreign["published"] is None


def test_trained_network_has_no_published_figures(result):
    assert result["network"]["parameters_drawn"] is False
    assert result["published"] is None


def test_table_has_a_row_for_each_repeat_and_the_average(result):
    lines = format_table(result).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line[:1].isalnum()}
    quantized = result["contenders"][1]
    assert rows["2"][1] == f"{quantized['repeats'][1]['median']:.3f}"
    assert rows["average"][3] == f"{quantized['speedup']:.2f}x"
    theoretical = f"{result['operations']['theoretical_speedup']:.2f}x"
    assert f"theoretical speed-up (operation counts): {theoretical}" in lines
    # The last row of ratios is that of the last contender.
    name, *ratios, distance = lines[-1].split()
    assert (name, ratios[-1]) == ("quantized-exact", "1.00x")
    assert float(distance) < 1e-5


def test_each_contender_is_compared_with_each_other(result):
    names = ["dense", "quantized-fast", "quantized-exact"]
    assert [each["name"] for each in result["contenders"]] == names
    for contender in result["contenders"]:
        others = [name for name in names if name != contender["name"]]
        assert list(contender["ratios"]) == others
        for ratio in contender["ratios"].values():
            assert ratio["lower_quartile"] <= ratio["median"] <= ratio["upper_quartile"]


def test_round_medians():
    # Two contenders, two repeats of twelve batches: two rounds each.
    times = np.arange(48, dtype=np.float64).reshape(2, 2, 12)
    rounds = _round_medians(times)
    np.testing.assert_array_equal(
        rounds, [[4.5, 16.5, 10.5, 22.5], [28.5, 40.5, 34.5, 46.5]]
    )


def test_outputs_are_compared_with_dense(result):
    dense, *others = result["contenders"]
    assert dense["relative_error"] == 0
    for contender in others:
        assert 0 < contender["relative_error"] < 1e-2


def test_contender_that_computes_something_else_is_refused():
    wrong = Contender("peer", "is wrong", lambda images: np.ones((1, 4)), 1e-3)
    with pytest.raises(QcnnError, match=r"peer: output differs .* at most 0\.001"):
        benchmark(small_network(), peers=[wrong])


ANSWER = np.full((1, 4), 0.25, np.float32)


class Recorder:
    """Contenders that write down who was called and on which cores."""

    def __init__(self):
        self.calls = []
        self.cores = set()

    def contender(self, name):
        def run(images):
            self.calls.append(name)
            if hasattr(os, "sched_getaffinity"):
                self.cores.add(frozenset(os.sched_getaffinity(0)))
            return ANSWER

        return Contender(name, "does nothing", run)


def test_contenders_take_turns_and_the_first_changes():
    recorder = Recorder()
    peers = [recorder.contender(name) for name in "ab"]
    result = benchmark(
        small_network(),
        repeats=1,
        batches=25,
        warmup=2,
        precisions=["exact"],
        peers=peers,
    )
    # Each turn of ten batches begins with an untimed one.
    turns = [("a", 11), ("b", 11), ("b", 11), ("a", 11), ("a", 6), ("b", 6)]
    compared, warm = [("a", 4), ("b", 4)], [("a", 2), ("b", 2)]
    expected = [
        name for name, count in [*compared, *warm, *turns] for _ in range(count)
    ]
    assert recorder.calls == expected
    assert [each["name"] for each in result["contenders"]] == [
        "dense",
        "quantized-exact",
        "a",
        "b",
    ]
    assert result["settings"]["precisions"] == ["exact"]


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="this system pins no cores"
)
def test_process_stays_on_one_core_and_is_set_free_again():
    before = os.sched_getaffinity(0)
    recorder = Recorder()
    benchmark(small_network(), repeats=1, batches=1, peers=[recorder.contender("peer")])
    assert recorder.cores == {frozenset({max(before)})}
    assert os.sched_getaffinity(0) == before


def test_process_is_set_free_after_a_failure():
    def fail(images):
        raise RuntimeError("peer is broken")

    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    with pytest.raises(RuntimeError, match="peer is broken"):
        benchmark(small_network(), peers=[Contender("peer", "fails", fail)])
    if before is not None:
        assert os.sched_getaffinity(0) == before


def test_given_images_fill_whole_batches():
    shapes = []

    def note(images):
        shapes.append(images.shape)
        return np.repeat(ANSWER, len(images), axis=0)

    peer = Contender("peer", "notes shapes", note)
    images = np.zeros((5, 3, 8, 8), np.float32)
    result = benchmark(
        small_network(), repeats=1, batches=4, batch_size=2, images=images, peers=[peer]
    )
    assert set(shapes) == {(2, 3, 8, 8)}
    assert result["settings"]["inputs"] == "images"


@pytest.mark.parametrize("name", ["repeats", "batches", "batch_size", "threads"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        benchmark(small_network(), **{name: 0})


def test_no_precision_is_refused():
    with pytest.raises(ConfigError, match="precisions is empty"):
        benchmark(small_network(), precisions=[])


@pytest.mark.parametrize(
    "options",
    [
        {"precisions": ["fast", "fast"]},
        {"peers": ["openvino-fp32"] * 2},
        {"peers": [Contender("dense", "another", np.copy)]},
    ],
    ids=["precision", "peer", "ours"],
)
def test_names_given_twice_are_refused(options):
    with pytest.raises(ConfigError, match=r"make dense, .*, expected each name once"):
        benchmark(small_network(), **options)


def test_a_network_without_layers_is_refused():
    builder = NetworkBuilder((3, 8, 8))
    builder.add("relu")
    with pytest.raises(ConfigError, match="network has no conv or fc layer"):
        benchmark(builder.build())


def test_metadata_may_be_anything():
    network = small_network({"origin": {"architecture": ["alexnet"]}})
    result = benchmark(network, repeats=1, batches=1)
    assert result["network"]["architecture"] is None
    assert result["published"] is None


@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (0, 3, 8, 8), (3, 8, 8)])
def test_images_that_do_not_fit_are_refused(shape):
    with pytest.raises(ShapeError, match="expected"):
        benchmark(small_network(), images=np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("operation", "attributes", "kernels"),
    [
        ("sign", {}, ["-b1-xnor"]),
        # Which of the two depends on the level.
        (
            "quantize_linear",
            {"bits": 2, "low": 0.0, "high": 3.0},
            ["-i8-gemm", "-f32-gemm"],
        ),
    ],
)
def test_binary_layers_know_their_inputs_alone(
    operation, attributes, kernels, monkeypatch
):
    builder = NetworkBuilder((3, 8, 8))
    builder.conv(8, 3, name="first", quantized=Binary())
    builder.add(operation, **attributes)
    builder.pool("max_pool", 2)
    builder.conv(8, 3, name="second", quantized=Binary())
    ran = []
    take_turns = benchmarking._take_turns

    def watch(contenders, *arguments):
        ran.append([getattr(each.run, "layers", None) for each in contenders])
        return take_turns(contenders, *arguments)

    monkeypatch.setattr(benchmarking, "_take_turns", watch)
    result = benchmark(builder.build(), repeats=1, batches=2, precisions=["exact"])
    first, second = result["layers"]
    assert first["kernel"] == first["dense_kernel"]
    assert second["kernel"].endswith(tuple(kernels))
    # The layers that were timed alone, dense and binary.
    alone = [[layers[0]["kernel_name"] for layers in each] for each in ran[-2:]]
    for layer, (dense_kernel, kernel) in zip((first, second), alone, strict=True):
        assert (dense_kernel, kernel) == (layer["dense_kernel"], layer["kernel"])
    assert result["contenders"][1]["relative_error"] < 1e-6
