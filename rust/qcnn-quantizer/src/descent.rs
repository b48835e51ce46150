//! Coordinate descent on a quadratic, over the codes of one subspace.
//!
//! The objective of one output with weights `w` is `w' H w - 2 g' w` plus a constant; its
//! negative half gradient `g - H w` is the *residual*. Only a window of rows is looked at:
//! those of the subspace and of others that share one update of everything else.

use crate::{least, linear_costs, on_threads, transposed, with_vectors};

/// Multiply-adds that are worth a thread of their own.
const WORK_PER_THREAD: usize = 1 << 20;

/// Weights and residuals of a window of rows, for all outputs.
#[derive(Debug)]
pub struct Window<'a> {
    /// `H` of each group, (groups, rows, rows), symmetric.
    pub gram: &'a [f64],
    /// Weights, (groups * outputs, rows).
    pub weight: &'a mut [f64],
    /// Residual, (groups * outputs, rows).
    pub residual: &'a mut [f64],
    /// Rows of the window.
    pub rows: usize,
    /// Outputs of a group.
    pub outputs: usize,
}

/// The codewords of a subspace.
#[derive(Debug, Clone, Copy)]
pub struct Books<'a> {
    /// (sets, K, dim): one set for all groups, or one for each.
    pub words: &'a [f64],
    /// Length of a codeword.
    pub dim: usize,
    /// Sets.
    pub sets: usize,
}

impl Books<'_> {
    fn n_centroids(&self) -> usize {
        self.words.len() / (self.sets * self.dim)
    }

    fn set_of(&self, group: usize) -> usize {
        if self.sets == 1 { 0 } else { group }
    }

    fn set(&self, set: usize) -> &[f64] {
        let size = self.words.len() / self.sets;
        &self.words[set * size..(set + 1) * size]
    }
}

/// Set the weights of a subspace to codewords and let the residual of the window follow.
///
/// The subspace begins at row `first`; `codes` is (groups * outputs, positions). With
/// `choose`, each sub-vector takes its best codeword in turn, all others of its output
/// fixed, and keeps its code where none is better; without, codes stay as they are.
pub fn assign(
    window: &mut Window<'_>,
    books: Books<'_>,
    codes: &mut [i64],
    first: usize,
    choose: bool,
    threads: usize,
) {
    let (rows, dim) = (window.rows, books.dim);
    let n_vectors = window.weight.len() / rows;
    let positions = codes.len() / n_vectors.max(1);
    let subspace = Subspace {
        gram: window.gram,
        books,
        lanes: (0..books.sets)
            .map(|set| transposed(books.set(set), dim))
            .collect(),
        energies: if choose {
            energies(window.gram, rows, books, first, positions)
        } else {
            Vec::new()
        },
        rows,
        outputs: window.outputs,
        positions,
        first,
    };
    let work = n_vectors * positions * (books.n_centroids() + rows) * dim;
    let worth = (work / WORK_PER_THREAD).clamp(1, threads.max(1));
    let share = n_vectors.div_ceil(worth).max(1);
    let parts = window
        .weight
        .chunks_mut(share * rows)
        .zip(window.residual.chunks_mut(share * rows))
        .zip(codes.chunks_mut(share * positions))
        .enumerate();
    on_threads(parts, |(part, ((weight, residual), codes))| {
        assign_part(&subspace, part * share, weight, residual, codes, choose);
    });
}

/// What all threads read.
struct Subspace<'a> {
    gram: &'a [f64],
    books: Books<'a>,
    /// The sets of codewords, transposed.
    lanes: Vec<Vec<f64>>,
    /// What a codeword adds to the objective beside its product with the target,
    /// (groups, positions, K).
    energies: Vec<f64>,
    rows: usize,
    outputs: usize,
    positions: usize,
    first: usize,
}

fn energies(
    gram: &[f64],
    rows: usize,
    books: Books<'_>,
    first: usize,
    positions: usize,
) -> Vec<f64> {
    let mut energies = Vec::new();
    for (group, gram) in gram.chunks_exact(rows * rows).enumerate() {
        for position in 0..positions {
            let start = first + position * books.dim;
            for word in books.set(books.set_of(group)).chunks_exact(books.dim) {
                energies.push(quadratic(word, |i| &gram[(start + i) * rows + start..]));
            }
        }
    }
    energies
}

/// [`assign`] for the outputs from `first_output` on.
#[inline(always)]
fn assign_outputs(
    subspace: &Subspace<'_>,
    first_output: usize,
    weight: &mut [f64],
    residual: &mut [f64],
    codes: &mut [i64],
    choose: bool,
) {
    let (rows, dim) = (subspace.rows, subspace.books.dim);
    let n_centroids = subspace.books.n_centroids();
    let mut target = vec![0.0; dim];
    let mut costs = vec![0.0; n_centroids];
    let of_output = weight
        .chunks_exact_mut(rows)
        .zip(residual.chunks_exact_mut(rows))
        .zip(codes.chunks_exact_mut(subspace.positions))
        .enumerate();
    for (i, ((weight, residual), codes)) in of_output {
        let group = (first_output + i) / subspace.outputs;
        let gram = &subspace.gram[group * rows * rows..(group + 1) * rows * rows];
        let set = subspace.books.set_of(group);
        for (position, code) in codes.iter_mut().enumerate() {
            let start = subspace.first + position * dim;
            if choose {
                for (j, value) in target.iter_mut().enumerate() {
                    let own = &gram[(start + j) * rows + start..][..dim];
                    *value = residual[start + j] + dot(own, &weight[start..start + dim]);
                }
                let at = (group * subspace.positions + position) * n_centroids;
                let energies = &subspace.energies[at..at + n_centroids];
                linear_costs(energies, &subspace.lanes[set], &target, &mut costs);
                let best = least(&costs);
                if costs[best] < costs[*code as usize] {
                    *code = best as i64;
                }
            }
            let at = *code as usize * dim;
            let word = &subspace.books.set(set)[at..at + dim];
            for (j, &value) in word.iter().enumerate() {
                let change = value - weight[start + j];
                if change != 0.0 {
                    weight[start + j] = value;
                    let row = &gram[(start + j) * rows..][..rows];
                    for (r, h) in residual.iter_mut().zip(row) {
                        *r -= change * h;
                    }
                }
            }
        }
    }
}

with_vectors!(assign_part = assign_outputs(
    subspace: &Subspace<'_>,
    first_output: usize,
    weight: &mut [f64],
    residual: &mut [f64],
    codes: &mut [i64],
    choose: bool,
) -> ());

/// Normal matrix of all codewords that meet in the outputs of some groups.
///
/// `gram` is (groups, positions * dim, positions * dim), `codes` (groups * outputs,
/// positions). `A[k, i, l, j] = sum over t, u of N_tu[k, l] H_tu[i, j]`, where `N_tu`
/// counts the outputs with codeword `k` at position `t` and `l` at `u`.
pub fn normal_matrix(
    gram: &[f64],
    codes: &[i64],
    dim: usize,
    outputs: usize,
    n: usize,
) -> Vec<f64> {
    let groups = gram_groups(gram.len(), codes.len(), dim, outputs);
    let positions = codes.len() / (groups * outputs);
    let rows = positions * dim;
    let size = n * dim;
    let mut normal = vec![0.0; size * size];
    for (output, codes) in codes.chunks_exact(positions).enumerate() {
        let gram = &gram[output / outputs * rows * rows..][..rows * rows];
        for (t, &k) in codes.iter().enumerate() {
            for i in 0..dim {
                let from = &gram[(t * dim + i) * rows..][..rows];
                let to = &mut normal[(k as usize * dim + i) * size..][..size];
                for (h, &l) in from.chunks_exact(dim).zip(codes) {
                    for (sum, value) in to[l as usize * dim..][..dim].iter_mut().zip(h) {
                        *sum += value;
                    }
                }
            }
        }
    }
    normal
}

/// Groups, from `gram = groups * (positions * dim)^2` and `codes = groups * outputs *
/// positions`.
fn gram_groups(gram: usize, codes: usize, dim: usize, outputs: usize) -> usize {
    let per_position = codes / outputs;
    per_position * per_position * dim * dim / gram
}

#[inline(always)]
fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(a, b)| a * b).sum()
}

/// `word' H word`, `H` given by rows.
fn quadratic<'a>(word: &[f64], row: impl Fn(usize) -> &'a [f64]) -> f64 {
    word.iter()
        .enumerate()
        .map(|(i, value)| value * dot(word, row(i)))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sizes (groups, outputs, positions, dim, K, shared) and a source of numbers.
    fn sizes() -> impl Strategy<Value = ([usize; 5], bool, Vec<f64>)> {
        let sizes = [1..3usize, 1..6, 1..4, 1..4, 1..7];
        (sizes, any::<bool>(), prop::collection::vec(-1.0..1.0, 64))
    }

    struct Problem {
        gram: Vec<f64>,
        weight: Vec<f64>,
        residual: Vec<f64>,
        words: Vec<f64>,
        codes: Vec<i64>,
        sets: usize,
        rows: usize,
    }

    /// A window with one more row in front of the subspace and one behind it.
    fn problem(
        [groups, outputs, positions, dim, k]: [usize; 5],
        shared: bool,
        numbers: &[f64],
    ) -> Problem {
        let mut next = numbers
            .iter()
            .cycle()
            .copied()
            .enumerate()
            .map(|(i, x)| x + 1e-3 * (i as f64).sin());
        let rows = positions * dim + 2;
        let mut gram = vec![0.0; groups * rows * rows];
        for matrix in gram.chunks_exact_mut(rows * rows) {
            let root: Vec<f64> = next.by_ref().take(rows * rows).collect();
            for i in 0..rows {
                for j in 0..rows {
                    let product = dot(&root[i * rows..][..rows], &root[j * rows..][..rows]);
                    matrix[i * rows + j] = product + if i == j { 0.1 } else { 0.0 };
                }
            }
        }
        let sets = if shared { 1 } else { groups };
        let mut take = |n: usize| next.by_ref().take(n).collect::<Vec<_>>();
        Problem {
            gram,
            weight: take(groups * outputs * rows),
            residual: take(groups * outputs * rows),
            words: take(sets * k * dim),
            codes: take(groups * outputs * positions)
                .iter()
                .map(|x| ((x.abs() * k as f64) as i64).min(k as i64 - 1))
                .collect(),
            sets,
            rows,
        }
    }

    impl Problem {
        fn assign(&mut self, outputs: usize, dim: usize, choose: bool, threads: usize) {
            let mut window = Window {
                gram: &self.gram,
                weight: &mut self.weight,
                residual: &mut self.residual,
                rows: self.rows,
                outputs,
            };
            let books = Books {
                words: &self.words,
                dim,
                sets: self.sets,
            };
            assign(&mut window, books, &mut self.codes, 1, choose, threads);
        }

        /// `H w + residual`, which no step changes, and the objective up to a constant.
        fn invariant(&self, outputs: usize) -> (Vec<f64>, f64) {
            let mut sums = Vec::new();
            let mut objective = 0.0;
            for (q, (w, r)) in self
                .weight
                .chunks_exact(self.rows)
                .zip(self.residual.chunks_exact(self.rows))
                .enumerate()
            {
                let gram = &self.gram[q / outputs * self.rows * self.rows..];
                for i in 0..self.rows {
                    let hw = dot(&gram[i * self.rows..][..self.rows], w);
                    sums.push(hw + r[i]);
                    objective -= w[i] * (hw + 2.0 * r[i]);
                }
            }
            (sums, objective)
        }
    }

    proptest! {
        #[test]
        fn choosing_never_climbs((s, shared, numbers) in sizes()) {
            let [_, outputs, _, dim, _] = s;
            let mut problem = problem(s, shared, &numbers);
            problem.assign(outputs, dim, false, 1);
            let (before, start) = problem.invariant(outputs);
            problem.assign(outputs, dim, true, 1);
            let (after, end) = problem.invariant(outputs);
            prop_assert!(end <= start + 1e-9 * (1.0 + start.abs()));
            for (x, y) in before.iter().zip(after) {
                prop_assert!((x - y).abs() < 1e-9 * (1.0 + x.abs()));
            }
        }

        #[test]
        fn weights_are_their_codewords((s, shared, numbers) in sizes()) {
            let [groups, outputs, positions, dim, k] = s;
            let mut problem = problem(s, shared, &numbers);
            problem.assign(outputs, dim, true, 1);
            for q in 0..groups * outputs {
                let set = if shared { 0 } else { q / outputs };
                for t in 0..positions {
                    let code = problem.codes[q * positions + t] as usize;
                    let word = &problem.words[(set * k + code) * dim..][..dim];
                    prop_assert_eq!(word, &problem.weight[q * problem.rows + 1 + t * dim..][..dim]);
                }
            }
        }

        #[test]
        fn normal_matrix_counts_pairs((s, _, numbers) in sizes()) {
            let [groups, outputs, positions, dim, k] = s;
            let problem = problem(s, true, &numbers);
            let rows = positions * dim;
            let gram: Vec<f64> = (0..groups * rows * rows)
                .map(|i| {
                    let (g, rest) = (i / (rows * rows), i % (rows * rows));
                    problem.gram[(g * problem.rows + rest / rows) * problem.rows + rest % rows]
                })
                .collect();
            let normal = normal_matrix(&gram, &problem.codes, dim, outputs, k);
            // x' A x is the energy of the decoded weights, for any codewords x.
            let words = &problem.words[..k * dim];
            let mut expected = 0.0;
            for (q, codes) in problem.codes.chunks_exact(positions).enumerate() {
                let w: Vec<f64> = codes.iter().flat_map(|&c| words[c as usize * dim..][..dim].to_vec()).collect();
                expected += quadratic(&w, |i| &gram[(q / outputs * rows + i) * rows..][..rows]);
            }
            let actual = quadratic(words, |i| &normal[i * k * dim..][..k * dim]);
            prop_assert!((actual - expected).abs() < 1e-9 * (1.0 + expected.abs()));
        }
    }

    #[test]
    fn threads_change_nothing() {
        let numbers: Vec<f64> = (0..64).map(|i| f64::from(i).sin()).collect();
        let sizes = [2, 3000, 9, 8, 64];
        let (mut one, mut three) = (
            problem(sizes, true, &numbers),
            problem(sizes, true, &numbers),
        );
        one.assign(sizes[1], sizes[3], true, 1);
        three.assign(sizes[1], sizes[3], true, 3);
        assert!(one.codes == three.codes);
        assert!(one.residual == three.residual);
    }
}
