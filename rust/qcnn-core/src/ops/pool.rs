//! Pooling.

use crate::geometry::PoolGeometry;
use crate::isa::{Level, Simd, Task};

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

    /// Elements of one row of all windows' columns, padding included.
    fn row_len(&self) -> usize {
        let g = &self.geometry;
        // The padded input may end beyond the last window.
        let windows = (g.out_size[1] - 1) * g.stride[1] + g.kernel[1];
        windows.max(g.padding.left + g.in_size[1])
    }

    /// Elements of scratch [`run`](Self::run) needs.
    pub fn scratch_len(&self) -> usize {
        self.row_len()
    }

    /// Pool images back to back.
    pub(crate) fn run(&self, level: Level, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        level.call(Apply {
            pool: self,
            input,
            output,
            row: &mut scratch[..self.row_len()],
        });
    }
}

struct Apply<'a> {
    pool: &'a Pool,
    input: &'a [f32],
    output: &'a mut [f32],
    row: &'a mut [f32],
}

impl Task for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self {
            pool,
            input,
            output,
            row,
        } = self;
        let g = &pool.geometry;
        let out_planes = output.chunks_exact_mut(g.out_size[0] * g.out_size[1]);
        for (plane, out) in input
            .chunks_exact(g.in_size[0] * g.in_size[1])
            .zip(out_planes)
        {
            match pool.reduction {
                Reduction::Max => {
                    reduce_plane(pool, plane, out, row, f32::NEG_INFINITY, max, |x, _| x);
                }
                Reduction::Average { .. } => {
                    reduce_plane(
                        pool,
                        plane,
                        out,
                        row,
                        0.0,
                        |a, b| a + b,
                        |x, count| x / count,
                    );
                }
            }
        }
    }
}

/// The greater value, or NaN if either is NaN.
#[inline(always)]
fn max(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

/// Reduce each row of windows first vertically, which gives one padded row,
/// then horizontally. Both passes run along rows, so they vectorise.
#[inline(always)]
fn reduce_plane(
    pool: &Pool,
    plane: &[f32],
    out: &mut [f32],
    row: &mut [f32],
    identity: f32,
    reduce: impl Fn(f32, f32) -> f32,
    finish: impl Fn(f32, f32) -> f32,
) {
    let g = &pool.geometry;
    let width = g.in_size[1];
    let [row_counts, column_counts] = &pool.counts;
    let (stride, kernel) = (g.stride[1], g.kernel[1]);
    // First elements of all windows.
    let starts = (g.out_size[1] - 1) * stride + 1;
    for (oy, out) in out.chunks_exact_mut(g.out_size[1]).enumerate() {
        row.fill(identity);
        for y in window(g, 0, oy) {
            let source = &plane[y * width..(y + 1) * width];
            for (r, x) in row[g.padding.left..].iter_mut().zip(source) {
                *r = reduce(*r, *x);
            }
        }
        // Element i becomes the reduction of i..i + kernel; each pass reads
        // elements that it has not changed yet.
        for i in 0..starts {
            let mut r = row[i];
            for x in &row[i + 1..i + kernel] {
                r = reduce(r, *x);
            }
            row[i] = r;
        }
        for ((y, column_count), r) in out
            .iter_mut()
            .zip(column_counts)
            .zip(row.iter().step_by(stride))
        {
            *y = finish(*r, row_counts[oy] * column_count);
        }
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
                Reduction::Max => reduce_lanes(plane, f32::NEG_INFINITY, max),
                Reduction::Average { .. } => {
                    reduce_lanes(plane, 0.0, |a, b| a + b) / self.pixels as f32
                }
            };
        }
    }
}

/// Reduce in 16 independent lanes, which vectorises and keeps sums of many
/// values accurate.
#[inline(always)]
fn reduce_lanes(values: &[f32], identity: f32, reduce: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [identity; 16];
    for chunk in values.chunks(16) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = reduce(*lane, *x);
        }
    }
    lanes.into_iter().fold(identity, reduce)
}
