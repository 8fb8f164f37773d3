//! AVX-512 F forms. A chunk of 16 is one register.
#![allow(unsafe_code)] // loads and stores through pointers into checked slices

use std::arch::x86_64::{
    __m512, _mm256_loadu_si256, _mm512_add_ps, _mm512_castps_si512, _mm512_castsi512_ps,
    _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_xor_epi32, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};

use half::f16;

use super::{
    DOT_QUERIES, DOT_ROWS, LANES, Slot, TILE_COLUMNS, TILE_ROWS, Tile, for_each_dot_tile, scalar,
    sum_lanes,
};

#[inline]
#[target_feature(enable = "avx512f")]
fn load(values: &[f32; LANES]) -> __m512 {
    // SAFETY: the reference covers the sixteen values.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(values: &mut [f32; LANES], register: __m512) {
    // SAFETY: as for `load`.
    unsafe { _mm512_storeu_ps(values.as_mut_ptr(), register) }
}

#[target_feature(enable = "avx512f")]
pub(super) fn widen(halves: &[f16], out: &mut [f32]) {
    let (wide, rest) = halves.as_chunks::<LANES>();
    let (wide_out, rest_out) = out.as_chunks_mut::<LANES>();
    for (halves, out) in wide.iter().zip(wide_out) {
        // SAFETY: the reference covers sixteen values of 16 bits, as many as are loaded.
        let halves = unsafe { _mm256_loadu_si256(halves.as_ptr().cast()) };
        store(out, _mm512_cvtph_ps(halves));
    }
    scalar::widen(rest, rest_out);
}

#[target_feature(enable = "avx512f")]
pub(super) fn scatter(slots: &[Slot], values: &[f32], block: &mut [f32]) {
    let top = _mm512_set1_epi32(i32::MIN);
    for (slot, chunk) in slots.iter().zip(values.as_chunks::<LANES>().0) {
        let bits = _mm512_castps_si512(load(chunk));
        let signed = _mm512_castsi512_ps(_mm512_mask_xor_epi32(bits, slot.signs, bits, top));
        let target = &mut block[slot.offset as usize..][..LANES].as_chunks_mut::<LANES>().0[0];
        store(target, _mm512_add_ps(load(target), signed));
    }
}

#[target_feature(enable = "avx512f")]
pub(super) fn outer_tile(left: &[f32], right: &[f32], tile: &mut Tile) {
    let mut sums = [[_mm512_setzero_ps(); TILE_COLUMNS / LANES]; TILE_ROWS];
    for (sums, values) in sums.iter_mut().zip(tile.iter()) {
        for (sum, values) in sums.iter_mut().zip(values.as_chunks::<LANES>().0) {
            *sum = load(values);
        }
    }
    let terms = left.as_chunks::<TILE_ROWS>().0.iter().zip(right.as_chunks::<TILE_COLUMNS>().0);
    for (left, right) in terms {
        let right = right.as_chunks::<LANES>().0;
        let values = [load(&right[0]), load(&right[1])];
        for (sums, &factor) in sums.iter_mut().zip(left) {
            let factor = _mm512_set1_ps(factor);
            sums[0] = _mm512_fmadd_ps(factor, values[0], sums[0]);
            sums[1] = _mm512_fmadd_ps(factor, values[1], sums[1]);
        }
    }
    for (sums, values) in sums.iter().zip(tile) {
        for (sum, values) in sums.iter().zip(values.as_chunks_mut::<LANES>().0) {
            store(values, *sum);
        }
    }
}

#[target_feature(enable = "avx512f")]
pub(super) fn dots(rows: &[f32], queries: &[f32], dim: usize, out: &mut [f32]) {
    let width = queries.len() / dim;
    for_each_dot_tile(rows.len() / dim, width, |row, query, height, span| {
        if height == DOT_ROWS {
            let (rows, queries) = (&rows[row * dim..], &queries[query * dim..]);
            let out = &mut out[row * width + query..];
            match span {
                DOT_QUERIES => tile::<DOT_QUERIES>(rows, queries, dim, width, out),
                2 => tile::<2>(rows, queries, dim, width, out),
                _ => tile::<1>(rows, queries, dim, width, out),
            }
        } else {
            for row in row..row + height {
                for query in query..query + span {
                    out[row * width + query] =
                        dot(&rows[row * dim..][..dim], &queries[query * dim..][..dim]);
                }
            }
        }
    });
}

/// The products of four rows with `QUERIES` queries; those of a row stand `width` apart in `out`.
#[inline]
#[target_feature(enable = "avx512f")]
fn tile<const QUERIES: usize>(
    rows: &[f32],
    queries: &[f32],
    dim: usize,
    width: usize,
    out: &mut [f32],
) {
    let steps = dim / LANES;
    let mut sums = [[_mm512_setzero_ps(); QUERIES]; DOT_ROWS];
    let rows: [&[f32]; DOT_ROWS] = std::array::from_fn(|r| &rows[r * dim..][..dim]);
    let queries: [&[f32]; QUERIES] = std::array::from_fn(|q| &queries[q * dim..][..dim]);
    let row_chunks = rows.map(|row| &row.as_chunks::<LANES>().0[..steps]);
    let query_chunks = queries.map(|query| &query.as_chunks::<LANES>().0[..steps]);
    for step in 0..steps {
        let mut right = [_mm512_setzero_ps(); QUERIES];
        for (right, query) in right.iter_mut().zip(query_chunks) {
            *right = load(&query[step]);
        }
        for (sums, row) in sums.iter_mut().zip(row_chunks) {
            let left = load(&row[step]);
            for (sum, right) in sums.iter_mut().zip(right) {
                *sum = _mm512_fmadd_ps(left, right, *sum);
            }
        }
    }
    for r in 0..DOT_ROWS {
        for q in 0..QUERIES {
            out[r * width + q] =
                finish(sums[r][q], &rows[r][steps * LANES..], &queries[q][steps * LANES..]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn dot(row: &[f32], query: &[f32]) -> f32 {
    let mut sum = _mm512_setzero_ps();
    let (row, row_tail) = row.as_chunks::<LANES>();
    let (query, query_tail) = query.as_chunks::<LANES>();
    for (row, query) in row.iter().zip(query) {
        sum = _mm512_fmadd_ps(load(row), load(query), sum);
    }
    finish(sum, row_tail, query_tail)
}

/// The last, partial step and the sum of the lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn finish(sum: __m512, row_tail: &[f32], query_tail: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    store(&mut lanes, sum);
    scalar::add_step(&mut lanes, row_tail, query_tail);
    sum_lanes(lanes)
}
