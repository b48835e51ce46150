//! What may be done with bytes from strangers, as functions that must not panic.
//!
//! `cargo fuzz run` calls them with what libFuzzer makes up; the test of this crate
//! calls them, on any toolchain, with the inputs in `corpus/` and all their
//! neighbours.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use qcnn_core::graph::Content;
use qcnn_core::pack::{Codes, check_packed, pack};
use qcnn_core::session::{Options, Session, Workspace};
use qcnn_core::{Graph, Isa, Network, Precision, Tensor, TensorData, Tensors, container as format};

/// Reading a file may take so many times its size, and [`MEMORY_FLOOR`] more.
pub const MEMORY_FACTOR: usize = 64;

/// Bytes that reading any file may take, however small it is.
pub const MEMORY_FLOOR: usize = 1 << 16;

/// Larger networks are planned but not run: a few bytes of JSON make a large image,
/// which takes its time and is no mistake.
const LARGEST_WORKSPACE: usize = 1 << 17;

/// Largest tensor that is made for a graph from strangers.
const LARGEST_TENSOR: usize = 1 << 12;

/// A `.qcnn` file: refused, or read, written and read to the same bytes, and run.
///
/// # Panics
///
/// If the engine is wrong, or takes more memory for reading than is promised.
pub fn container(data: &[u8]) {
    let (network, peak) = with_peak_memory(|| format::from_bytes(data));
    assert!(
        peak <= data.len() * MEMORY_FACTOR + MEMORY_FLOOR,
        "{peak} bytes of memory to read {} bytes",
        data.len()
    );
    if let Ok(network) = network {
        write_and_read(&network);
        run(&network, data.len());
    }
}

/// A graph as JSON, a zero byte, and what its tensors are made of.
///
/// This reaches behind the header of the file, whose sizes and offsets a mutation
/// hardly ever keeps consistent.
///
/// # Panics
///
/// If the engine is wrong.
pub fn network(data: &[u8]) {
    let end = data
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(data.len());
    let Ok(json) = std::str::from_utf8(&data[..end]) else {
        return;
    };
    let Ok(graph) = Graph::from_json(json) else {
        return;
    };
    let Ok(layout) = graph.layout() else {
        return;
    };
    let mut bytes = data[end..].iter().copied().cycle();
    let mut tensors = Tensors::new();
    for (name, spec) in &layout.tensors {
        let len: usize = spec.shape.iter().product();
        if len > LARGEST_TENSOR {
            return;
        }
        let mut next = || bytes.next().unwrap_or(1);
        let data = match spec.content {
            Content::Codes(pq) => {
                let code = |byte: u8| u16::from(byte) % pq.n_centroids.min(1 << 15) as u16;
                TensorData::Codes((0..len).map(|_| code(next())).collect())
            }
            Content::Signs => {
                let sign = |byte: u8| if byte.is_multiple_of(2) { -1 } else { 1 };
                TensorData::Signs((0..len).map(|_| sign(next())).collect())
            }
            Content::Floats | Content::Codebooks { .. } => {
                // All powers of two and both signs, a few infinities and NaNs.
                let float = |byte: u8| f32::from_bits(u32::from(byte) << 24);
                TensorData::F32((0..len).map(|_| float(next())).collect())
            }
        };
        let shape = spec.shape.clone();
        tensors.insert(name.clone(), Tensor { shape, data });
    }
    if let Ok(network) = Network::new(graph, tensors) {
        write_and_read(&network);
        run(&network, data.len());
    }
}

/// Bits of a code, how many codes, and packed codes: refused, or the same when
/// unpacked and packed again.
///
/// # Panics
///
/// If the engine is wrong.
pub fn codes(data: &[u8]) {
    let [bits, n, bytes @ ..] = data else {
        return;
    };
    let (bits, n) = (u32::from(bits % 16) + 1, usize::from(*n));
    if check_packed("codes", bytes, n, bits).is_ok() {
        let codes = Codes::Packed { bytes, n, bits };
        let mut buffer = Vec::new();
        let unpacked = codes.all(&mut buffer);
        assert_eq!(unpacked.len(), n);
        assert_eq!(pack(unpacked, bits), bytes);
        let tail = codes.range(n / 2..n, &mut Vec::new()).to_vec();
        assert_eq!(tail, codes.all(&mut buffer)[n / 2..]);
    }
}

fn write_and_read(network: &Network) {
    let bytes = format::to_bytes(network).expect("a checked network can be written");
    let again = format::from_bytes(&bytes).expect("what was written can be read");
    let bytes_again = format::to_bytes(&again).expect("it can be written again");
    assert_eq!(bytes, bytes_again);
}

/// Run a network on zeros, on ordinary numbers and on what is not a number, on a level
/// and with a precision that `choice` picks.
fn run(network: &Network, choice: usize) {
    let levels = Isa::available();
    let precisions = [Precision::Exact, Precision::Fast, Precision::Int8];
    let options = Options {
        isa: Some(levels[choice % levels.len()]),
        precision: precisions[choice / levels.len() % precisions.len()],
    };
    let Ok(session) = Session::new(network, options) else {
        return;
    };
    if session.workspace_bytes(1) > LARGEST_WORKSPACE {
        return;
    }
    let mut workspace = Workspace::new(&session, 1).expect("it is small");
    let mut output = vec![0.0; session.output_len()];
    for value in [0.0, 1.5, f32::MAX, f32::NAN] {
        let input = vec![value; session.input_len()];
        session
            .run(&mut workspace, &input, 1, &mut output)
            .expect("sizes fit");
    }
}

/// Counts the bytes that the current thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(change: isize) {
    HELD.set(HELD.get().wrapping_add(change));
    PEAK.set(PEAK.get().max(HELD.get()));
}

// SAFETY: everything is passed on to the system's allocator; counting neither allocates
// nor touches the memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps what `System::alloc` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the pointer is from `alloc` above, which is the system's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Return what a function returns and the most bytes it held at a time.
fn with_peak_memory<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get();
    PEAK.set(before);
    let result = work();
    (result, (PEAK.get() - before).max(0).cast_unsigned())
}
