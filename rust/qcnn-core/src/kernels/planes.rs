//! Padded input planes in which every tap of a convolution is a fixed offset.
//!
//! A plane holds what a tile of outputs reads of one input channel, padding
//! included. Its rows lie back to back, so output pixel `(y, x)` of the tile
//! has the flat position `y * width + x`, and tap `(ky, kx)` reads that
//! position plus a constant. Kernels can run over flat positions as if the tile
//! were one long row; the few positions at the end of each row that are no
//! output pixels cost less than handling the rows one by one.
//!
//! With a stride, neighbouring outputs read every `stride`-th pixel. The plane
//! is then split into phases, one for each remainder of row and column by the
//! stride: tap `k` reads phase `k * dilation % stride` at an offset of
//! `k * dilation / stride`, again for neighbouring outputs neighbouring pixels.

use crate::geometry::ConvGeometry;
use crate::isa::{Simd, Task};

/// Layout of the planes for tiles of a fixed extent.
#[derive(Clone, Debug)]
pub(crate) struct Planes {
    /// First row and column of each phase that is read, in padded pixels.
    phases: Vec<[usize; 2]>,
    /// Rows of each phase.
    height: usize,
    /// Columns of each phase.
    width: usize,
    /// Offset of each tap, in row-major order of the kernel.
    taps: Vec<usize>,
}

impl Planes {
    /// Planes for tiles of `tile` outputs.
    pub(crate) fn new(geometry: &ConvGeometry, tile: [usize; 2]) -> Self {
        // (remainder, quotient) of each tap along one axis.
        let split = |axis: usize| -> Vec<(usize, usize)> {
            (0..geometry.kernel[axis])
                .map(|k| {
                    let position = k * geometry.dilation[axis];
                    let stride = geometry.stride[axis];
                    (position % stride, position / stride)
                })
                .collect()
        };
        let (rows, columns) = (split(0), split(1));
        let halo = |taps: &[(usize, usize)]| taps.last().map_or(0, |(_, quotient)| *quotient);
        let height = tile[0] + halo(&rows);
        let width = tile[1] + halo(&columns);
        let mut phases: Vec<[usize; 2]> = Vec::new();
        let mut taps = Vec::with_capacity(geometry.taps());
        for &(phase_y, y) in &rows {
            for &(phase_x, x) in &columns {
                let phase = [phase_y, phase_x];
                let i = phases.iter().position(|p| *p == phase).unwrap_or_else(|| {
                    phases.push(phase);
                    phases.len() - 1
                });
                taps.push(i * height * width + y * width + x);
            }
        }
        Self {
            phases,
            height,
            width,
            taps,
        }
    }

    /// Elements of one channel, all phases.
    pub(crate) fn len(&self) -> usize {
        self.phases.len() * self.height * self.width
    }

    /// Rows of one channel, all phases.
    pub(crate) fn rows(&self) -> usize {
        self.phases.len() * self.height
    }

    /// Number of phases.
    pub(crate) fn phases(&self) -> usize {
        self.phases.len()
    }

    /// Furthest offset of a tap within its phase.
    pub(crate) fn reach(&self) -> usize {
        let phase_len = self.height * self.width;
        self.taps
            .iter()
            .map(|tap| tap % phase_len)
            .max()
            .unwrap_or(0)
    }

    /// Distance between the rows of a tile in flat positions.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Offset from an output's flat position to what each tap reads.
    pub(crate) fn taps(&self) -> &[usize] {
        &self.taps
    }

    /// Flat positions of a tile, from its first output to its last.
    pub(crate) fn positions(&self, tile: [usize; 2]) -> usize {
        (tile[0] - 1) * self.width + tile[1]
    }

    /// Whether a channel of the input is already what [`fill`](Self::fill)
    /// would make of it for the whole map.
    pub(crate) fn is_identity(&self, geometry: &ConvGeometry) -> bool {
        geometry.padding == crate::geometry::Padding::default()
            && geometry.stride == [1, 1]
            && [self.height, self.width] == geometry.in_size
    }

    /// Copy from `channel` what the tile whose first output is `origin` reads
    /// to `plane`. What lies outside of the input becomes zero.
    pub(crate) fn fill<S: Simd>(
        &self,
        simd: S,
        geometry: &ConvGeometry,
        origin: [usize; 2],
        channel: &[f32],
        plane: &mut [f32],
    ) {
        simd.call(Fill {
            planes: self,
            geometry,
            origin,
            channel,
            plane,
        });
    }
}

/// [`Planes::fill`]
struct Fill<'a> {
    planes: &'a Planes,
    geometry: &'a ConvGeometry,
    origin: [usize; 2],
    channel: &'a [f32],
    plane: &'a mut [f32],
}

impl Task for Fill<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self {
            planes:
                &Planes {
                    ref phases,
                    height,
                    width,
                    ..
                },
            geometry,
            origin,
            channel,
            plane,
        } = self;
        let [in_height, in_width] = geometry.in_size;
        let stride = geometry.stride;
        let mut rows = plane.chunks_exact_mut(width);
        for &[phase_y, phase_x] in phases {
            // Columns of the plane that lie in the input: the first pixel of
            // column x is x * stride + first, counted from the input's left edge
            // plus the padding.
            let first = origin[1] * stride[1] + phase_x;
            let left = geometry.padding.left;
            let begin = left.saturating_sub(first).div_ceil(stride[1]).min(width);
            let end = (left + in_width)
                .saturating_sub(first)
                .div_ceil(stride[1])
                .clamp(begin, width);
            for (y, row) in rows.by_ref().take(height).enumerate() {
                let padded_y = (origin[0] + y) * stride[0] + phase_y;
                let in_y = padded_y.wrapping_sub(geometry.padding.top);
                if in_y >= in_height || begin == end {
                    row.fill(0.0);
                    continue;
                }
                row[..begin].fill(0.0);
                row[end..].fill(0.0);
                let source = &channel[in_y * in_width..(in_y + 1) * in_width];
                let source = &source[begin * stride[1] + first - left..];
                every(simd, stride[1], source, &mut row[begin..end]);
            }
        }
    }
}

/// Copy every `stride`-th value of `source`, as many as `target` has room for.
#[inline(always)]
pub(super) fn every<S: Simd>(simd: S, stride: usize, source: &[f32], target: &mut [f32]) {
    if stride == 1 {
        target.copy_from_slice(&source[..target.len()]);
        return;
    }
    let mut done = 0;
    // In whole vectors for the strides that networks have.
    if stride == 2 || stride == 4 {
        while target.len() - done >= S::LANES && source.len() >= (done + S::LANES) * stride {
            let source = &source[done * stride..][..S::LANES * stride];
            let mut vectors = [simd.splat(0.0); 4];
            for (vector, source) in vectors.iter_mut().zip(source.chunks_exact(S::LANES)) {
                *vector = simd.load_first(source);
            }
            let mut even = simd.even(vectors[0], vectors[1]);
            if stride == 4 {
                even = simd.even(even, simd.even(vectors[2], vectors[3]));
            }
            simd.store_first(&mut target[done..][..S::LANES], even);
            done += S::LANES;
        }
    }
    let pixels = source[done * stride..].iter().step_by(stride);
    for (target, pixel) in target[done..].iter_mut().zip(pixels) {
        *target = *pixel;
    }
}
