//! k-means: seeding by k-means++ (Arthur and Vassilvitskii, 2007) with several trials
//! per seed, then Lloyd's iteration.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{least, linear_costs, on_threads, transposed, with_vectors};

/// Multiply-adds that are worth a thread of their own.
const WORK_PER_THREAD: usize = 1 << 20;

/// Find `n_clusters` clusters of vectors; returns labels and the sum of squared
/// distances from the centroids they were last compared with.
///
/// `vectors` is (n, `dim`), `draws` (`n_clusters`, trials) of uniform numbers in [0, 1),
/// which make all random choices. Ends when an iteration moves nothing, lowers the sum
/// by a share of `tolerance` or less, or is the `max_rounds`-th. A cluster may end
/// empty; where there are fewer distinct vectors than clusters, some do.
pub fn cluster(
    vectors: &[f64],
    dim: usize,
    n_clusters: usize,
    draws: &[f64],
    max_rounds: usize,
    tolerance: f64,
    threads: usize,
) -> (Vec<i64>, f64) {
    let n = vectors.len() / dim;
    let mut centroids = seeds(vectors, dim, n_clusters, draws);
    let mut labels = vec![-1; n];
    let mut distances = vec![0.0; n];
    let mut last = f64::INFINITY;
    for _ in 0..max_rounds.max(1) {
        let moved = assign(
            vectors,
            dim,
            &centroids,
            &mut labels,
            &mut distances,
            threads,
        );
        let total = distances.iter().sum::<f64>();
        // Infinity at first: nothing to compare with.
        let falls = last.is_infinite() || last - total > tolerance * last;
        last = total;
        if !moved || !falls {
            break;
        }
        means(vectors, dim, &labels, &mut centroids);
    }
    (labels, last)
}

/// Choose first centroids, far from each other. Fewer where vectors run out.
fn seeds(vectors: &[f64], dim: usize, n_clusters: usize, draws: &[f64]) -> Vec<f64> {
    let n = vectors.len() / dim;
    let trials = draws.len() / n_clusters;
    let vector = |i: usize| &vectors[i * dim..(i + 1) * dim];
    let mut nearest = vec![f64::INFINITY; n];
    let mut trial = vec![0.0; n];
    let mut best = vec![0.0; n];
    let mut centroids = Vec::with_capacity(n_clusters * dim);
    for draws in draws.chunks_exact(trials) {
        let total: f64 = nearest.iter().sum();
        if total == 0.0 {
            break;
        }
        let mut chosen = 0;
        let mut least_sum = f64::INFINITY;
        for &draw in draws {
            let candidate = if total.is_finite() {
                pick(&nearest, draw * total)
            } else {
                ((draw * n as f64) as usize).min(n - 1)
            };
            let centre = vector(candidate);
            let mut sum = 0.0;
            for ((value, &old), x) in trial
                .iter_mut()
                .zip(&nearest)
                .zip(vectors.chunks_exact(dim))
            {
                *value = old.min(squared_distance(x, centre));
                sum += *value;
            }
            if sum < least_sum {
                least_sum = sum;
                chosen = candidate;
                std::mem::swap(&mut trial, &mut best);
            }
        }
        std::mem::swap(&mut nearest, &mut best);
        centroids.extend_from_slice(vector(chosen));
    }
    centroids
}

/// First index at which the running sum of weights exceeds `threshold`.
fn pick(weights: &[f64], threshold: f64) -> usize {
    let mut sum = 0.0;
    let mut last = 0;
    for (i, &weight) in weights.iter().enumerate() {
        if weight > 0.0 {
            last = i;
            sum += weight;
            if sum > threshold {
                break;
            }
        }
    }
    last
}

#[inline(always)]
fn squared_distance(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(a, b)| (a - b) * (a - b)).sum()
}

/// Centroids, as they are and in the form that [`linear_costs`] takes.
struct Centroids<'a> {
    values: &'a [f64],
    rows: Vec<f64>,
    norms: Vec<f64>,
}

/// Give each vector its nearest centroid; returns whether a label changed.
fn assign(
    vectors: &[f64],
    dim: usize,
    centroids: &[f64],
    labels: &mut [i64],
    distances: &mut [f64],
    threads: usize,
) -> bool {
    let centroids = Centroids {
        values: centroids,
        rows: transposed(centroids, dim),
        norms: centroids
            .chunks_exact(dim)
            .map(|c| c.iter().map(|x| x * x).sum())
            .collect(),
    };
    let work = vectors.len() * centroids.norms.len();
    let worth = (work / WORK_PER_THREAD).clamp(1, threads.max(1));
    let share = labels.len().div_ceil(worth).max(1);
    let moved = AtomicBool::new(false);
    let parts = vectors
        .chunks(share * dim)
        .zip(labels.chunks_mut(share))
        .zip(distances.chunks_mut(share));
    on_threads(parts, |((vectors, labels), distances)| {
        if nearest(&centroids, vectors, labels, distances) {
            moved.store(true, Ordering::Relaxed);
        }
    });
    moved.into_inner()
}

#[inline(always)]
fn nearest_centroids(
    centroids: &Centroids<'_>,
    vectors: &[f64],
    labels: &mut [i64],
    distances: &mut [f64],
) -> bool {
    let dim = centroids.values.len() / centroids.norms.len();
    let mut costs = vec![0.0; centroids.norms.len()];
    let mut moved = false;
    for ((x, label), distance) in vectors.chunks_exact(dim).zip(labels).zip(distances) {
        linear_costs(&centroids.norms, &centroids.rows, x, &mut costs);
        let best = least(&costs);
        *distance = squared_distance(x, &centroids.values[best * dim..(best + 1) * dim]);
        moved |= *label != best as i64;
        *label = best as i64;
    }
    moved
}

with_vectors!(nearest = nearest_centroids(
    centroids: &Centroids<'_>,
    vectors: &[f64],
    labels: &mut [i64],
    distances: &mut [f64],
) -> bool);

/// Move each centroid to the mean of its members; one without members stays.
fn means(vectors: &[f64], dim: usize, labels: &[i64], centroids: &mut [f64]) {
    let mut sums = vec![0.0; centroids.len()];
    let mut counts = vec![0.0; centroids.len() / dim];
    for (x, &label) in vectors.chunks_exact(dim).zip(labels) {
        let k = label as usize;
        counts[k] += 1.0;
        for (sum, value) in sums[k * dim..(k + 1) * dim].iter_mut().zip(x) {
            *sum += value;
        }
    }
    for ((centre, sum), count) in centroids
        .chunks_exact_mut(dim)
        .zip(sums.chunks_exact(dim))
        .zip(counts)
    {
        if count > 0.0 {
            for (c, s) in centre.iter_mut().zip(sum) {
                *c = s / count;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn problem() -> impl Strategy<Value = (Vec<f64>, usize, usize, Vec<f64>)> {
        (1..60usize, 1..5usize, 1..9usize).prop_flat_map(|(n, dim, k)| {
            let vectors = prop::collection::vec(-3.0..3.0, n * dim);
            let draws = prop::collection::vec(0.0..1.0, 3 * k);
            (vectors, Just(dim), Just(k), draws)
        })
    }

    proptest! {
        #[test]
        fn every_vector_is_with_its_nearest_mean((vectors, dim, k, draws) in problem()) {
            let (labels, total) = cluster(&vectors, dim, k, &draws, 300, 0.0, 1);
            let mut centroids = vec![f64::INFINITY; k * dim];
            means(&vectors, dim, &labels, &mut centroids);
            let mut sum = 0.0;
            for (x, &label) in vectors.chunks_exact(dim).zip(&labels) {
                let to = |j: usize| squared_distance(x, &centroids[j * dim..(j + 1) * dim]);
                let own = to(label as usize);
                sum += own;
                for j in 0..k {
                    prop_assert!(own <= to(j) + 1e-9);
                }
            }
            // The means are those of the last labels, so they can only be better.
            prop_assert!(sum <= total + 1e-9 * (1.0 + total));
        }
    }

    #[test]
    fn threads_change_nothing() {
        let vectors: Vec<f64> = (0..200_000).map(|i| f64::from(i % 9973).sin()).collect();
        let draws = [0.37; 96];
        let one = cluster(&vectors, 2, 32, &draws, 2, 0.0, 1);
        assert!(one == cluster(&vectors, 2, 32, &draws, 2, 0.0, 3));
    }

    #[test]
    fn distinct_vectors_that_are_few_are_all_found() {
        let vectors: Vec<f64> = (0..40).map(|i| f64::from(i % 4)).collect();
        let draws = [0.3; 24];
        let (labels, total) = cluster(&vectors, 1, 8, &draws, 10, 0.0, 1);
        assert!(total == 0.0);
        assert!((0..36).all(|i| labels[i] == labels[i + 4]));
    }
}
