//! Tables of float32, for exact sums.
//!
//! A vector of a table is one vector of the CPU, or two: twice as many lanes hold
//! rows with less halo, but sums of only half as many outputs fit the registers.

// As in `tile`: index loops keep the sums in registers.
#![allow(clippy::needless_range_loop)]

use super::layout::Layout;
use super::{Cell, Inputs, Scale};
use crate::isa::Simd;
use crate::kernels::pixels::pack_codebooks;
use crate::kernels::tile::{TILE_VECTORS, store_tile, tile, tile_rows};

/// Most lanes of a vector of the CPU.
const MAX_LANES: usize = 16;

/// See the module's documentation.
#[derive(Debug)]
pub(in crate::kernels) struct Float<const W: usize> {
    /// For each set and subspace, panels of `tile_rows` codewords:
    /// `(C', tile_rows)`.
    codebooks: Vec<f32>,
}

impl<const W: usize> Cell for Float<W> {
    type Element = f32;
    type Vector<S: Simd> = [S::F32; W];

    const NAME: &'static str = "f32";
    const HALVES: usize = W;
    const VECTORS: usize = W;
    const MAX_TERMS: Option<usize> = None;
    const MAX_BATCHES: usize = usize::MAX;

    fn panel_rows<S: Simd>() -> usize {
        tile_rows::<S>()
    }

    fn table_cycles<S: Simd>(dim: usize) -> f64 {
        1.5 + dim as f64
    }

    fn read_and_end_cycles<S: Simd>() -> [f64; 2] {
        [12.0, 4.0]
    }

    fn new<S: Simd>(layout: &Layout, codebooks: &[f32], _: &[u16]) -> Self {
        let (pq, rows) = (layout.pq, tile_rows::<S>());
        Self {
            codebooks: pack_codebooks(pq, codebooks, pq.n_centroids, rows),
        }
    }

    fn scratch_len(layout: &Layout) -> usize {
        // An even number of vectors in each plane, for the tile of products.
        layout.pq.subvector_dim * plane_len(layout)
    }

    fn inspect<S: Simd>(
        &self,
        _: S,
        _: &Inputs<'_>,
        _: usize,
        _: &mut [Scale],
        _: &mut [f32],
    ) -> f32 {
        1.0
    }

    #[inline(always)]
    fn build<S: Simd>(
        &self,
        simd: S,
        inputs: &Inputs<'_>,
        (codebook, source): (usize, usize),
        _: Scale,
        table: &mut [f32],
        scratch: &mut [f32],
    ) {
        let rows = tile_rows::<S>();
        let layout = inputs.layout;
        let codebook_len = layout.table_rows * layout.pq.subvector_dim;
        let build = BuildTable {
            inputs,
            source,
            codewords: &self.codebooks[codebook * codebook_len..][..codebook_len],
            planes: scratch,
            table,
        };
        if rows == 12 {
            build.panels::<S, 12>(simd);
        } else {
            build.panels::<S, 6>(simd);
        }
    }

    #[inline(always)]
    fn zero<S: Simd>(simd: S) -> [S::F32; W] {
        [simd.splat(0.0); W]
    }

    #[inline(always)]
    fn add<S: Simd>(simd: S, a: [S::F32; W], b: [S::F32; W]) -> [S::F32; W] {
        let mut sum = a;
        for i in 0..W {
            sum[i] = simd.add(a[i], b[i]);
        }
        sum
    }

    #[inline(always)]
    fn shift<S: Simd>(simd: S, vector: [S::F32; W], distance: usize) -> [S::F32; W] {
        let (skipped, distance) = (distance / S::LANES, distance % S::LANES);
        let mut shifted = vector;
        for i in 0..W.saturating_sub(skipped) {
            let from = i + skipped;
            shifted[i] = if from + 1 < W {
                simd.shift_pair([vector[from], vector[from + 1]], distance)
            } else {
                simd.shift(vector[from], distance)
            };
        }
        shifted
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, source: *const f32) -> [S::F32; W] {
        let mut vector = [simd.splat(0.0); W];
        for i in 0..W {
            // SAFETY: the caller vouches for a vector.
            vector[i] = unsafe { simd.load(source.add(i * S::LANES)) };
        }
        vector
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, target: *mut f32, vector: [S::F32; W]) {
        for i in 0..W {
            // SAFETY: the caller vouches for a vector.
            unsafe { simd.store(target.add(i * S::LANES), vector[i]) };
        }
    }

    #[inline(always)]
    unsafe fn accumulate<S: Simd>(
        simd: S,
        accumulator: *mut f32,
        sum: [S::F32; W],
        _: Scale,
        begin: bool,
    ) {
        // SAFETY: the caller vouches for a vector.
        unsafe {
            let sum = if begin {
                sum
            } else {
                Self::add(simd, Self::load(simd, accumulator), sum)
            };
            Self::store(simd, accumulator, sum);
        }
    }

    #[inline(always)]
    unsafe fn accumulated<S: Simd>(simd: S, accumulator: *const f32) -> [S::F32; 2] {
        // SAFETY: the caller vouches for a vector.
        let vector = unsafe { Self::load(simd, accumulator) };
        [vector[0], vector[W - 1]]
    }
}

/// Elements of a plane.
fn plane_len(layout: &Layout) -> usize {
    (layout.most_plane_vectors() * layout.lanes).next_multiple_of(TILE_VECTORS * MAX_LANES)
}

/// Inner products of the codewords of a subspace with what a tile sees.
struct BuildTable<'a> {
    inputs: &'a Inputs<'a>,
    source: usize,
    /// Panels of codewords, each `(C', R)`.
    codewords: &'a [f32],
    /// Room for `(C', plane_len)`.
    planes: &'a mut [f32],
    /// `(codewords, row_len)`
    table: &'a mut [f32],
}

impl BuildTable<'_> {
    #[inline(always)]
    fn panels<S: Simd, const R: usize>(self, simd: S) {
        let layout = self.inputs.layout;
        let dim = layout.pq.subvector_dim;
        let depth = layout.channels(self.source).len();
        let phase = layout.source(self.source).0;
        let (rows, row_len) = (layout.plane_vectors(phase), layout.row_len);
        let per_row = layout.lanes / S::LANES;
        // Of the CPU.
        let vectors = rows * per_row;
        let plane_len = plane_len(layout);
        let planes = &mut self.planes[..dim * plane_len];
        assert!(vectors * S::LANES <= plane_len && vectors * S::LANES <= row_len);
        assert!(self.codewords.len() >= layout.table_rows * dim && depth <= dim);
        assert!(self.table.len() >= layout.table_rows * row_len);
        assert!(layout.table_rows.is_multiple_of(R));
        let sources = self.source..self.source + 1;
        let seen = self.inputs.planes([per_row, S::LANES], sources);
        for y in 0..rows {
            let row = seen.runs.row(y);
            for c in 0..depth {
                for i in 0..per_row {
                    let at = c * plane_len + (y * per_row + i) * S::LANES;
                    let vector = seen.load(simd, &row, c, i);
                    // SAFETY: there are `dim` >= `depth` planes, each of which holds
                    // `vectors` vectors.
                    unsafe { simd.store(planes.as_mut_ptr().add(at), vector) };
                }
            }
        }
        let planes = planes.as_ptr();
        for first in (0..vectors).step_by(TILE_VECTORS) {
            let pair = first + TILE_VECTORS <= vectors;
            for panel in 0..layout.table_rows / R {
                // SAFETY: there are `depth` planes that hold TILE_VECTORS from
                // `first` on, R codewords of `dim` >= `depth` values in each panel,
                // and R rows of the table for each; a row has the vectors that
                // are stored, one where there is no pair.
                unsafe {
                    let codewords = self.codewords.as_ptr().add(panel * R * dim);
                    let table = self
                        .table
                        .as_mut_ptr()
                        .add(panel * R * row_len + first * S::LANES);
                    if pair {
                        let products = tile::<S, R, TILE_VECTORS>(
                            simd,
                            depth,
                            |j, i| *codewords.add(j * R + i),
                            |j| planes.add(j * plane_len + first * S::LANES),
                            [[simd.splat(0.0); TILE_VECTORS]; R],
                        );
                        store_tile(simd, table, row_len, &products);
                    } else {
                        let products = tile::<S, R, 1>(
                            simd,
                            depth,
                            |j, i| *codewords.add(j * R + i),
                            |j| planes.add(j * plane_len + first * S::LANES),
                            [[simd.splat(0.0)]; R],
                        );
                        store_tile(simd, table, row_len, &products);
                    }
                }
            }
        }
    }
}
