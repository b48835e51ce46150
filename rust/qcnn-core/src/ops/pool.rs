//! Pooling.

use crate::geometry::{Padding, PoolGeometry};
use crate::isa::{Level, MAX_LANES, Simd, Task};

/// Rows of windows reduced vertically before any is reduced horizontally: the
/// stores of a row are done when it is read in other places.
const ROWS: usize = 8;

/// What a window is reduced to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// The greatest value; padding never counts.
    Max,
    /// The mean of the window's values. With `count_include_pad` the zeros of
    /// the explicit padding count; what a ceil-mode window covers beyond the
    /// padded input never does.
    Average {
        /// Count the padding.
        count_include_pad: bool,
    },
}

/// Pooling over windows.
#[derive(Clone, Debug)]
pub struct Pool {
    geometry: PoolGeometry,
    reduction: Reduction,
    /// Values an average counts: in each row of windows, in each column.
    counts: [Vec<f32>; 2],
}

/// Input rows or columns that window `i` covers.
fn window(geometry: &PoolGeometry, axis: usize, i: usize) -> std::ops::Range<usize> {
    let before = [geometry.padding.top, geometry.padding.left][axis];
    let start = i * geometry.stride[axis];
    let end = (start + geometry.kernel[axis]).saturating_sub(before);
    start.saturating_sub(before)..end.min(geometry.in_size[axis])
}

impl Pool {
    /// Plan the pooling.
    pub fn new(geometry: &PoolGeometry, reduction: Reduction) -> Self {
        let count = |axis: usize, i: usize| {
            if reduction
                == (Reduction::Average {
                    count_include_pad: true,
                })
            {
                let pads = [
                    geometry.padding.top + geometry.padding.bottom,
                    geometry.padding.left + geometry.padding.right,
                ];
                let start = i * geometry.stride[axis];
                geometry.kernel[axis].min(geometry.in_size[axis] + pads[axis] - start)
            } else {
                window(geometry, axis, i).len()
            }
        };
        let counts = [0, 1].map(|axis| {
            (0..geometry.out_size[axis])
                .map(|i| count(axis, i) as f32)
                .collect()
        });
        Self {
            geometry: geometry.clone(),
            reduction,
            counts,
        }
    }

    /// Whether this takes the greatest value of windows of 2 x 2 that lie side by side, none
    /// with any padding.
    pub(crate) fn is_max_of_two_by_two(&self) -> bool {
        let g = &self.geometry;
        self.reduction == Reduction::Max && g.kernel == [2, 2] && halves(g)
    }

    /// Elements of the row that [`reduce_plane`] reads: padding, input, padding
    /// up to the end of the last vector of windows on any level.
    fn row_len(&self) -> usize {
        let g = &self.geometry;
        let windows = g.out_size[1].next_multiple_of(MAX_LANES) * g.stride[1];
        let vectors = windows.max((g.padding.left + g.in_size[1]).next_multiple_of(MAX_LANES));
        vectors + g.kernel[1]
    }

    /// Elements of scratch [`run`](Self::run) needs.
    pub fn scratch_len(&self) -> usize {
        ROWS * self.row_len()
    }

    /// Pool images back to back.
    pub(crate) fn run(&self, level: Level, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        level.call(Apply {
            pool: self,
            input,
            output,
            rows: &mut scratch[..self.scratch_len()],
        });
    }
}

struct Apply<'a> {
    pool: &'a Pool,
    input: &'a [f32],
    output: &'a mut [f32],
    rows: &'a mut [f32],
}

impl Task for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self {
            pool,
            input,
            output,
            rows,
        } = self;
        let g = &pool.geometry;
        let planes = input.chunks_exact(g.in_size[0] * g.in_size[1]);
        let out_planes = output.chunks_exact_mut(g.out_size[0] * g.out_size[1]);
        match pool.reduction {
            Reduction::Max => {
                rows.fill(f32::NEG_INFINITY);
                let halves = halves(g);
                for (plane, out) in planes.zip(out_planes) {
                    let done = match g.kernel {
                        [2, 2] if halves => halve_plane::<S, 2>(simd, g, plane, out),
                        [3, 3] if halves => halve_plane::<S, 3>(simd, g, plane, out),
                        _ => false,
                    };
                    if !done {
                        reduce_plane::<S, Max>(simd, g, plane, out, rows);
                    }
                }
            }
            Reduction::Average { .. } => {
                let [row_counts, column_counts] = &pool.counts;
                rows.fill(0.0);
                for (plane, out) in planes.zip(out_planes) {
                    reduce_plane::<S, Sum>(simd, g, plane, out, rows);
                    let rows = out.chunks_exact_mut(g.out_size[1]);
                    for (out, row_count) in rows.zip(row_counts) {
                        for (y, column_count) in out.iter_mut().zip(column_counts) {
                            *y /= row_count * column_count;
                        }
                    }
                }
            }
        }
    }
}

/// How two values become one.
trait Combine {
    /// What changes no value.
    const IDENTITY: f32;

    /// The one value.
    fn one(a: f32, b: f32) -> f32;

    /// [`one`](Self::one) for each pair of lanes.
    fn vector<S: Simd>(simd: S, a: S::F32, b: S::F32) -> S::F32;
}

/// The greater value, or NaN if either is NaN.
struct Max;

impl Combine for Max {
    const IDENTITY: f32 = f32::NEG_INFINITY;

    #[inline(always)]
    fn one(a: f32, b: f32) -> f32 {
        if b > a || b.is_nan() { b } else { a }
    }

    #[inline(always)]
    fn vector<S: Simd>(simd: S, a: S::F32, b: S::F32) -> S::F32 {
        simd.max(a, b)
    }
}

struct Sum;

impl Combine for Sum {
    const IDENTITY: f32 = 0.0;

    #[inline(always)]
    fn one(a: f32, b: f32) -> f32 {
        a + b
    }

    #[inline(always)]
    fn vector<S: Simd>(simd: S, a: S::F32, b: S::F32) -> S::F32 {
        simd.add(a, b)
    }
}

/// Whether windows are two rows and columns apart, and none has any padding.
fn halves(g: &PoolGeometry) -> bool {
    let fits = |axis: usize| 2 * (g.out_size[axis] - 1) + g.kernel[axis] <= g.in_size[axis];
    g.stride == [2, 2] && g.padding == Padding::default() && fits(0) && fits(1)
}

/// The greatest values of the windows of `K` rows and columns, 2 or 3, of a plane that
/// [`halves`], all of it in registers. False if a value may be NaN: then they are not.
#[inline(always)]
fn halve_plane<S: Simd, const K: usize>(
    simd: S,
    g: &PoolGeometry,
    plane: &[f32],
    out: &mut [f32],
) -> bool {
    let (width, n_out) = (g.in_size[1], g.out_size[1]);
    // NaN if a value is.
    let mut sum = simd.splat(0.0);
    for y in 0..g.out_size[0] {
        let lines = &plane[2 * y * width..];
        let mut columns = greatest_of_lines::<S, K>(simd, lines, width, &mut sum);
        for x in (0..n_out).step_by(S::LANES) {
            let rest = n_out - x;
            let [even, odd] = columns;
            let mut windows = simd.max_number(even, odd);
            if K == 3 {
                // The next column of the last window.
                if rest >= S::LANES {
                    let lines = &lines[(2 * (x + S::LANES)).min(lines.len())..];
                    columns = greatest_of_lines::<S, K>(simd, lines, width, &mut sum);
                }
                windows = simd.max_number(windows, simd.shift_pair([even, columns[0]], 1));
            } else if rest > S::LANES {
                let lines = &lines[2 * (x + S::LANES)..];
                columns = greatest_of_lines::<S, K>(simd, lines, width, &mut sum);
            }
            // What is written beyond the row will be replaced by the next one.
            simd.store_first(&mut out[y * n_out + x..], windows);
        }
    }
    let mut lanes = [0.0; MAX_LANES];
    simd.store_first(&mut lanes, sum);
    !lanes.into_iter().sum::<f32>().is_nan()
}

/// The greatest values of the first two vectors of `K` lines: of their even, of their odd
/// columns. All values are added to `sum`. Lines may end early.
// Plain index loops, see `tile`.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
fn greatest_of_lines<S: Simd, const K: usize>(
    simd: S,
    lines: &[f32],
    width: usize,
    sum: &mut S::F32,
) -> [S::F32; 2] {
    let mut greatest = [simd.splat(0.0); 2];
    for half in 0..2 {
        for y in 0..K {
            let at = (y * width + half * S::LANES).min(lines.len());
            let line = simd.load_first(&lines[at..]);
            *sum = simd.add(*sum, line);
            greatest[half] = if y == 0 {
                line
            } else {
                simd.max_number(greatest[half], line)
            };
        }
    }
    let [low, high] = greatest;
    [simd.even(low, high), simd.odd(low, high)]
}

/// Reduce rows of windows first vertically, each to one padded row, then
/// horizontally. The rows hold the identity wherever there is padding.
#[inline(always)]
fn reduce_plane<S: Simd, C: Combine>(
    simd: S,
    g: &PoolGeometry,
    plane: &[f32],
    out: &mut [f32],
    rows: &mut [f32],
) {
    let (kernel, stride, n_out) = (g.kernel[1], g.stride[1], g.out_size[1]);
    let width = g.in_size[1];
    let row_len = rows.len() / ROWS;
    for first in (0..g.out_size[0]).step_by(ROWS) {
        let n_rows = ROWS.min(g.out_size[0] - first);
        for i in 0..n_rows {
            let lines = window(g, 0, first + i);
            let row = &mut rows[i * row_len + g.padding.left..][..width];
            // The usual heights and windows are compiled without loops.
            let lines_from = &plane[lines.start * width..];
            match lines.len() {
                2 => reduce_lines::<S, C>(simd, 2, lines_from, row),
                3 => reduce_lines::<S, C>(simd, 3, lines_from, row),
                n => reduce_lines::<S, C>(simd, n, lines_from, row),
            }
        }
        for i in 0..n_rows {
            let row = &rows[i * row_len..][..row_len];
            let out = &mut out[(first + i) * n_out..][..n_out];
            match (kernel, stride) {
                (2, 2) => reduce_row::<S, C>(simd, 2, 2, row, out),
                (3, 2) => reduce_row::<S, C>(simd, 3, 2, row, out),
                _ => reduce_row::<S, C>(simd, kernel, stride, row, out),
            }
        }
    }
}

/// Reduce the first `n` lines of `plane` to one, `row`.
#[inline(always)]
fn reduce_lines<S: Simd, C: Combine>(simd: S, n: usize, plane: &[f32], row: &mut [f32]) {
    let width = row.len();
    assert!(n > 0 && plane.len() >= n * width);
    let whole = width - width % S::LANES;
    for x in (0..whole).step_by(S::LANES) {
        // SAFETY: a vector from element x on ends within a line and within the
        // row, both `width` long; there are `n` lines, as asserted.
        unsafe {
            let mut values = simd.load(plane.as_ptr().add(x));
            for y in 1..n {
                let line = simd.load(plane.as_ptr().add(y * width + x));
                values = C::vector(simd, values, line);
            }
            simd.store(row.as_mut_ptr().add(x), values);
        }
    }
    if whole < width {
        let mut values = simd.load_first(&plane[whole..width]);
        for y in 1..n {
            let line = simd.load_first(&plane[y * width..][whole..width]);
            values = C::vector(simd, values, line);
        }
        simd.store_first(&mut row[whole..], values);
    }
}

/// Reduce the windows of a row.
#[inline(always)]
fn reduce_row<S: Simd, C: Combine>(
    simd: S,
    kernel: usize,
    stride: usize,
    row: &[f32],
    out: &mut [f32],
) {
    match stride {
        1 => {
            for i in (0..out.len()).step_by(S::LANES) {
                let windows = reduce_windows::<S, C>(simd, kernel, &row[i..]);
                simd.store_first(&mut out[i..], windows);
            }
        }
        2 => {
            for i in (0..out.len()).step_by(S::LANES) {
                let lower = reduce_windows::<S, C>(simd, kernel, &row[2 * i..]);
                let upper = reduce_windows::<S, C>(simd, kernel, &row[2 * i + S::LANES..]);
                simd.store_first(&mut out[i..], simd.even(lower, upper));
            }
        }
        _ => {
            for (i, y) in out.iter_mut().enumerate() {
                let window = &row[i * stride..][..kernel];
                *y = window.iter().fold(C::IDENTITY, |a, b| C::one(a, *b));
            }
        }
    }
}

/// Reduce the windows of `kernel` values that start at the first elements of
/// `row`.
#[inline(always)]
fn reduce_windows<S: Simd, C: Combine>(simd: S, kernel: usize, row: &[f32]) -> S::F32 {
    assert!(row.len() >= S::LANES + kernel - 1);
    // SAFETY: a vector from any of the first `kernel` elements on ends within
    // the row, as asserted.
    unsafe {
        let mut windows = simd.load(row.as_ptr());
        for i in 1..kernel {
            windows = C::vector(simd, windows, simd.load(row.as_ptr().add(i)));
        }
        windows
    }
}

/// Reduce each whole plane of `pixels` values to one.
pub(crate) fn global(
    level: Level,
    reduction: Reduction,
    pixels: usize,
    input: &[f32],
    output: &mut [f32],
) {
    level.call(Global {
        reduction,
        pixels,
        input,
        output,
    });
}

struct Global<'a> {
    reduction: Reduction,
    pixels: usize,
    input: &'a [f32],
    output: &'a mut [f32],
}

impl Task for Global<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (plane, y) in self.input.chunks_exact(self.pixels).zip(self.output) {
            *y = match self.reduction {
                Reduction::Max => reduce_lanes::<Max>(plane),
                Reduction::Average { .. } => reduce_lanes::<Sum>(plane) / self.pixels as f32,
            };
        }
    }
}

/// Reduce in 16 independent lanes, which vectorises and keeps sums of many
/// values accurate.
#[inline(always)]
fn reduce_lanes<C: Combine>(values: &[f32]) -> f32 {
    let mut lanes = [C::IDENTITY; 16];
    for chunk in values.chunks(16) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = C::one(*lane, *x);
        }
    }
    lanes.into_iter().fold(C::IDENTITY, C::one)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    /// The greatest value of each window of a plane, one after the other.
    fn greatest(g: &PoolGeometry, plane: &[f32]) -> Vec<f32> {
        let mut out = Vec::new();
        for i in 0..g.out_size[0] {
            for j in 0..g.out_size[1] {
                let rows = window(g, 0, i);
                let values =
                    rows.flat_map(|y| window(g, 1, j).map(move |x| plane[y * g.in_size[1] + x]));
                out.push(values.fold(f32::NEG_INFINITY, Max::one));
            }
        }
        out
    }

    /// Windows that are two apart, with and without a remainder of the map, and with NaN
    /// and infinities.
    #[test]
    fn maxima_of_every_second_window() {
        for kernel in [2, 3] {
            for [height, width] in [
                [kernel; 2],
                [3, 4],
                [8, 9],
                [9, 8],
                [4, 15],
                [5, 16],
                [6, 17],
                [3, 31],
                [4, 32],
                [5, 33],
                [7, 34],
                [4, 63],
                [3, 64],
                [5, 65],
                [7, 66],
                [3, 130],
            ] {
                for (ceil, padding) in [(false, 0), (true, 0), (false, 1)] {
                    let input = [2, height, width];
                    let g =
                        PoolGeometry::new("pool", input, [kernel; 2], [2; 2], [padding; 4], ceil)
                            .unwrap();
                    for special in [0.5, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                        let pixels = height * width;
                        let mut input: Vec<f32> = (0..2 * pixels)
                            .map(|i| (i * 7919 % 2003) as f32 - 1500.0)
                            .collect();
                        input[pixels / 2] = special;
                        input[pixels + pixels / 3] = -special;
                        input[pixels + 1] = special;
                        let expected: Vec<f32> = input
                            .chunks_exact(pixels)
                            .flat_map(|plane| greatest(&g, plane))
                            .collect();
                        let pool = Pool::new(&g, Reduction::Max);
                        for isa in Isa::available() {
                            let mut scratch = vec![f32::NAN; pool.scratch_len()];
                            let mut output = vec![f32::NAN; expected.len()];
                            let level = isa.level().unwrap();
                            pool.run(level, &input, &mut output, &mut scratch);
                            let same = output
                                .iter()
                                .zip(&expected)
                                .all(|(a, b)| a.total_cmp(b).is_eq() || a.is_nan() && b.is_nan());
                            assert!(
                                same,
                                "{isa} {g:?} {special}: {output:?}, expected {expected:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}
