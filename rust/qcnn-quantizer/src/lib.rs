//! Heavy loops of the quantiser: clustering sub-vectors and choosing codes.
//!
//! Apart from the engine, which does not need any of this to run a network. Matrix
//! products stay with NumPy's BLAS. Whatever is shared between threads is cut so that
//! every number is computed by one thread in a fixed order: results do not depend on
//! how many threads there are.

pub mod descent;
pub mod kmeans;

/// Run `work` on every part, each on a thread of its own.
fn on_threads<T: Send>(parts: impl Iterator<Item = T>, work: impl Fn(T) + Sync) {
    let mut parts = parts;
    let Some(first) = parts.next() else { return };
    std::thread::scope(|scope| {
        for part in parts {
            scope.spawn(|| work(part));
        }
        work(first);
    });
}

/// Codewords (`n`, `dim`) as `dim` rows of `n`, which vector code runs along.
fn transposed(words: &[f64], dim: usize) -> Vec<f64> {
    let n = words.len() / dim;
    let mut rows = vec![0.0; words.len()];
    for (k, word) in words.chunks_exact(dim).enumerate() {
        for (j, &value) in word.iter().enumerate() {
            rows[j * n + k] = value;
        }
    }
    rows
}

/// `costs[k] = offsets[k] - 2 * <target, word k>` for transposed words.
fn linear_costs(offsets: &[f64], rows: &[f64], target: &[f64], costs: &mut [f64]) {
    costs.copy_from_slice(offsets);
    for (row, &value) in rows.chunks_exact(costs.len()).zip(target) {
        let factor = -2.0 * value;
        for (cost, &coordinate) in costs.iter_mut().zip(row) {
            *cost += factor * coordinate;
        }
    }
}

/// Index of the least cost; the lowest one of equals.
fn least(costs: &[f64]) -> usize {
    let mut best = 0;
    for (k, cost) in costs.iter().enumerate() {
        if *cost < costs[best] {
            best = k;
        }
    }
    best
}
