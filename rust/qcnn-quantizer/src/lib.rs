//! Heavy loops of the quantiser: clustering sub-vectors and choosing codes.
//!
//! Apart from the engine, which does not need any of this to run a network. Matrix
//! products stay with NumPy's BLAS. Whatever is shared between threads is cut so that
//! every number is computed by one thread in a fixed order: results do not depend on
//! how many threads there are.

#![allow(
    clippy::cast_sign_loss,
    reason = "codes and labels are never negative; NumPy's integers have a sign"
)]

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

/// Define a function that is `inner`, compiled for the widest vectors of this CPU.
///
/// `inner` has to be `#[inline(always)]`. Rust neither fuses nor reorders floating-point
/// operations by itself, so the results are the same to the bit.
macro_rules! with_vectors {
    ($name:ident = $inner:ident($($argument:ident: $type:ty),* $(,)?) -> $result:ty) => {
        fn $name($($argument: $type),*) -> $result {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f")]
                fn avx512($($argument: $type),*) -> $result {
                    $inner($($argument),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2($($argument: $type),*) -> $result {
                    $inner($($argument),*)
                }
                if is_x86_feature_detected!("avx512f") {
                    // SAFETY: the CPU has just been found to have AVX-512F.
                    return unsafe { avx512($($argument),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the CPU has just been found to have AVX2.
                    return unsafe { avx2($($argument),*) };
                }
            }
            $inner($($argument),*)
        }
    };
}
use with_vectors;

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
#[inline(always)]
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
#[inline(always)]
fn least(costs: &[f64]) -> usize {
    // The value first, in lanes, then its place.
    let mut lanes = [f64::INFINITY; 8];
    let chunks = costs.chunks_exact(lanes.len());
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &cost) in lanes.iter_mut().zip(chunk) {
            *lane = if cost < *lane { cost } else { *lane };
        }
    }
    let value = lanes
        .iter()
        .chain(rest)
        .copied()
        .fold(f64::INFINITY, f64::min);
    costs.iter().position(|&cost| cost <= value).unwrap_or(0)
}
