//! Running allocates nothing.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::{Random, conv, dense, fc, network, node, quantized};
use qcnn_core::session::Options;
use qcnn_core::{Isa, Precision, Session, Workspace};
use serde_json::json;

thread_local! {
    /// Allocations of this thread; other tests may run beside this one.
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

fn count() {
    // Threads that end allocate when their locals are gone; they do not matter.
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as promised by the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: as promised by the caller.
        unsafe { System.realloc(pointer, layout, new_size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn the_counter_counts() {
    let before = COUNT.get();
    drop(std::hint::black_box(vec![1u8; 100]));
    assert_eq!(COUNT.get(), before + 1);
}

#[test]
fn run_and_trace_allocate_nothing() {
    let pool = json!({
        "type": "max_pool", "kernel": [3, 3], "stride": [2, 2], "padding": [0, 0, 0, 0], "ceil_mode": true,
    });
    let mut depthwise = conv(16, dense());
    depthwise["groups"] = json!(16);
    let nodes = [
        node("conv1", &["x"], conv(16, dense())),
        node("relu1", &["conv1"], json!({"type": "relu"})),
        node(
            "norm1",
            &["relu1"],
            json!({"type": "lrn", "size": 5, "alpha": 1e-4, "beta": 0.75, "bias": 1.0}),
        ),
        node("conv2", &["norm1"], conv(16, quantized(2, 32, 8))),
        node("depthwise", &["conv2"], depthwise),
        node("add", &["depthwise", "norm1"], json!({"type": "add"})),
        node("cat", &["add", "conv2"], json!({"type": "concat"})),
        node("pool", &["cat"], pool),
        node(
            "bn",
            &["pool"],
            json!({"type": "batch_norm", "epsilon": 1e-5}),
        ),
        node("flat", &["bn"], json!({"type": "flatten"})),
        node("fc1", &["flat"], fc(300, quantized(392, 16, 4))),
        node("silu", &["fc1"], json!({"type": "silu"})),
        node("fc2", &["silu"], fc(10, dense())),
        node("prob", &["fc2"], json!({"type": "softmax"})),
    ];
    let network = network(&[3, 14, 14], &nodes, None);
    let input = Random(9).floats(8 * 3 * 14 * 14);
    for isa in Isa::available() {
        let options = Options {
            isa: Some(isa),
            precision: Precision::Fast,
        };
        let session = Session::new(&network, options).unwrap();
        let mut workspace = Workspace::new(&session, 8).unwrap();
        let mut output = vec![0.0; 8 * session.output_len()];
        // The first run as well: nothing is set up lazily.
        for n in [8, 1, 8] {
            let input = &input[..n * session.input_len()];
            let before = COUNT.get();
            session
                .run(
                    &mut workspace,
                    input,
                    n,
                    &mut output[..n * session.output_len()],
                )
                .unwrap();
            session.trace(&mut workspace, input, n, |_, _| {}).unwrap();
            assert_eq!(COUNT.get(), before, "{isa}, n = {n}");
        }
    }
}
