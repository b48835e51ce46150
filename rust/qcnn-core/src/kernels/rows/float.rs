//! Tables of float32, for exact sums.

use super::layout::Layout;
use super::{Cell, Inputs, Scale};
use crate::isa::Simd;
use crate::kernels::pixels::pack_codebooks;
use crate::kernels::tile::{TILE_VECTORS, store_tile, tile, tile_rows};

/// See the module's documentation.
#[derive(Debug)]
pub(in crate::kernels) struct Float {
    /// For each set and subspace, panels of `tile_rows` codewords:
    /// `(C', tile_rows)`.
    codebooks: Vec<f32>,
}

impl Cell for Float {
    type Element = f32;
    type Vector<S: Simd> = S::F32;

    const NAME: &'static str = "f32";
    const HALVES: usize = 1;
    const MAX_TERMS: Option<usize> = None;

    fn panel_rows<S: Simd>() -> usize {
        tile_rows::<S>()
    }

    fn table_cycles(dim: usize) -> f64 {
        1.5 + dim as f64
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
        _: &mut [f32],
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
    fn zero<S: Simd>(simd: S) -> S::F32 {
        simd.splat(0.0)
    }

    #[inline(always)]
    fn add<S: Simd>(simd: S, a: S::F32, b: S::F32) -> S::F32 {
        simd.add(a, b)
    }

    #[inline(always)]
    fn shift<S: Simd>(simd: S, vector: S::F32, distance: usize) -> S::F32 {
        simd.shift(vector, distance)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, source: *const f32) -> S::F32 {
        // SAFETY: the caller vouches for a vector.
        unsafe { simd.load(source) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, target: *mut f32, vector: S::F32) {
        // SAFETY: the caller vouches for a vector.
        unsafe { simd.store(target, vector) }
    }

    #[inline(always)]
    unsafe fn accumulate<S: Simd>(
        simd: S,
        accumulator: *mut f32,
        sum: S::F32,
        _: Scale,
        begin: bool,
    ) {
        // SAFETY: the caller vouches for a vector.
        unsafe {
            let sum = if begin {
                sum
            } else {
                simd.add(simd.load(accumulator), sum)
            };
            simd.store(accumulator, sum);
        }
    }

    #[inline(always)]
    unsafe fn accumulated<S: Simd>(simd: S, accumulator: *const f32) -> [S::F32; 2] {
        // SAFETY: the caller vouches for a vector.
        [unsafe { simd.load(accumulator) }, simd.splat(0.0)]
    }
}

/// Elements of a plane.
fn plane_len(layout: &Layout) -> usize {
    layout.most_plane_vectors().next_multiple_of(TILE_VECTORS) * layout.lanes
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
        let (vectors, row_len) = (layout.plane_vectors(phase), layout.row_len);
        let plane_len = plane_len(layout);
        let planes = &mut self.planes[..dim * plane_len];
        assert!(vectors * S::LANES <= plane_len && vectors * S::LANES <= row_len);
        assert!(self.codewords.len() >= layout.table_rows * dim && depth <= dim);
        assert!(self.table.len() >= layout.table_rows * row_len);
        assert!(layout.table_rows.is_multiple_of(R));
        let seen = self
            .inputs
            .planes([1, S::LANES], self.source..self.source + 1);
        for y in 0..vectors {
            let row = seen.runs.row(y);
            for c in 0..depth {
                let at = c * plane_len + y * S::LANES;
                let vector = seen.load(simd, &row, c, 0);
                // SAFETY: there are `dim` >= `depth` planes, each of which holds
                // `vectors` vectors.
                unsafe { simd.store(planes.as_mut_ptr().add(at), vector) };
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
