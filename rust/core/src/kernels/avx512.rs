//! AVX-512 F and DQ forms. A chunk of 16 is one register.
#![allow(unsafe_code)] // loads and stores through pointers into checked slices

use std::arch::x86_64::{
    __m256i, __m512, __m512i, _mm256_loadu_si256, _mm512_add_ps, _mm512_castpd_ps,
    _mm512_castps_pd, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cvtepu16_epi32,
    _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_load_si512, _mm512_loadu_ps, _mm512_mask_blend_ps,
    _mm512_mask_xor_epi32, _mm512_mul_ps, _mm512_permutexvar_ps, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_shuffle_ps, _mm512_slli_epi32,
    _mm512_storeu_ps, _mm512_sub_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd,
    _mm512_unpacklo_ps, _mm512_xor_ps,
};

use half::{bf16, f16};

use super::{
    AHEAD, Column, DOT_ROWS, LANES, LeafTurns, Slot, TILE_CHUNKS, TILE_COLUMNS, TILE_ROWS, Tile,
    Turn, fourier, prefetch, scalar, sum_lanes, turns,
};

compiled_forms!("avx512f,avx512dq");

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

/// Sixteen values of 16 bits.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_16_bits<T: bytemuck::Pod>(values: &[T; LANES]) -> __m256i {
    let bits: &[u16; LANES] = bytemuck::cast_ref(values);
    // SAFETY: the reference covers sixteen values of 16 bits, as many as are loaded.
    unsafe { _mm256_loadu_si256(bits.as_ptr().cast()) }
}

/// A word has eight codes of 4 bits.
pub(super) use super::avx2::unpack;

#[target_feature(enable = "avx512f")]
pub(super) fn widen(halves: &[f16], out: &mut [f32]) {
    let (wide, rest) = halves.as_chunks::<LANES>();
    let (wide_out, rest_out) = out.as_chunks_mut::<LANES>();
    for (halves, out) in wide.iter().zip(wide_out) {
        store(out, _mm512_cvtph_ps(load_16_bits(halves)));
    }
    scalar::widen(rest, rest_out);
}

#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn side_by_side<const L: usize>(
    rows: &[&[f32]],
    from: usize,
    flips: &[u32],
    values: &mut [[f32; L]],
) {
    let mut done = 0;
    if L == LANES && rows.len() == LANES {
        let blocks = values.as_flattened_mut().as_chunks_mut::<LANES>().0;
        let blocks = blocks.as_chunks_mut::<LANES>().0.iter_mut();
        for (block, flips) in blocks.zip(flips.as_chunks::<LANES>().0) {
            let flips = load(bytemuck::cast_ref(flips));
            let mut square = [_mm512_setzero_ps(); LANES];
            for (register, row) in square.iter_mut().zip(rows) {
                let values = &row[from + done..][..LANES].as_chunks::<LANES>().0[0];
                *register = _mm512_xor_ps(load(values), flips);
            }
            for (values, register) in block.iter_mut().zip(transpose(&square)) {
                store(values, register);
            }
            done += LANES;
        }
    }
    scalar::side_by_side(rows, from + done, &flips[done..], &mut values[done..]);
}

/// Columns to rows.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(square: &[__m512; LANES]) -> [__m512; LANES] {
    let mut columns = [[_mm512_setzero_ps(); 4]; 4];
    for (columns, rows) in columns.iter_mut().zip(square.as_chunks::<4>().0) {
        let (low, high) = (
            [_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpacklo_ps(rows[2], rows[3])],
            [_mm512_unpackhi_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[2], rows[3])],
        );
        for (pair, [left, right]) in columns.as_chunks_mut::<2>().0.iter_mut().zip([low, high]) {
            let (left, right) = (_mm512_castps_pd(left), _mm512_castps_pd(right));
            *pair = [_mm512_unpacklo_pd(left, right), _mm512_unpackhi_pd(left, right)]
                .map(|register| _mm512_castpd_ps(register));
        }
    }
    // Quarter `q` of `columns[r][c]` is column `4 q + c` of rows `4 r..4 r + 4` now.
    let mut turned = *square;
    for column in 0..4 {
        let [a, b, c, d] = columns.map(|columns| columns[column]);
        let low = [_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0x44>(c, d)];
        let high = [_mm512_shuffle_f32x4::<0xEE>(a, b), _mm512_shuffle_f32x4::<0xEE>(c, d)];
        turned[column] = _mm512_shuffle_f32x4::<0x88>(low[0], low[1]);
        turned[column + 4] = _mm512_shuffle_f32x4::<0xDD>(low[0], low[1]);
        turned[column + 8] = _mm512_shuffle_f32x4::<0x88>(high[0], high[1]);
        turned[column + 12] = _mm512_shuffle_f32x4::<0xDD>(high[0], high[1]);
    }
    turned
}

#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn sign_rows(
    key: u64,
    dim: usize,
    first: u64,
    bucket: usize,
    rows: &mut [[f32; TILE_COLUMNS]],
) {
    let (plus, minus) = (_mm512_set1_ps(1.0), _mm512_set1_ps(-1.0));
    for (index, row) in rows.iter_mut().enumerate() {
        let bits = scalar::sign_bits(key, dim, first.wrapping_add(index as u64), bucket);
        for (half, row) in row.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            store(row, _mm512_mask_blend_ps((bits >> (half * LANES)) as u16, plus, minus));
        }
    }
}

#[target_feature(enable = "avx512f")]
pub(super) fn dots_of_pairs(
    rows: &[f32],
    queries: &[f32],
    dim: usize,
    pairs: &[(u32, u32)],
    out: &mut [f32],
) {
    for (&(row, query), out) in pairs.iter().zip(out) {
        *out = dot(&rows[row as usize * dim..][..dim], &queries[query as usize * dim..][..dim]);
    }
}

#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn add_squared_transform(
    turns: &[Turn],
    leaves: &[LeafTurns],
    values: [&mut [f32]; 2],
    sums: [&mut [f32]; 2],
) {
    fourier::add_squared_transform::<LANES, __m512>(turns, leaves, values, sums);
}

#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn transform_back(turns: &[Turn], leaves: &[LeafTurns], values: [&mut [f32]; 2]) {
    fourier::transform_back::<LANES, __m512>(turns, leaves, values);
}

// SAFETY, for every method: only the forms above use them, where the set exists.
impl fourier::Vector<LANES> for __m512 {
    #[inline(always)]
    fn load(values: &[f32; LANES]) -> Self {
        // SAFETY: as said above.
        unsafe { load(values) }
    }

    #[inline(always)]
    fn store(self, values: &mut [f32; LANES]) {
        // SAFETY: as said above.
        unsafe { store(values, self) }
    }

    #[inline(always)]
    fn spread(value: f32) -> Self {
        // SAFETY: as said above.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        // SAFETY: as said above.
        unsafe { _mm512_add_ps(self, other) }
    }

    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        // SAFETY: as said above.
        unsafe { _mm512_sub_ps(self, other) }
    }

    #[inline(always)]
    fn times(self, other: Self) -> Self {
        // SAFETY: as said above.
        unsafe { _mm512_mul_ps(self, other) }
    }

    #[inline(always)]
    fn transpose(square: &mut [Self; LANES]) {
        // SAFETY: as said above.
        *square = unsafe { transpose(square) };
    }
}

/// A slot, as what is done with a chunk.
struct Target {
    place: usize,
    signs: u16,
    turn: __m512i,
}

impl Target {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn of(slot: Slot) -> Self {
        Self { place: slot.place(), signs: slot.signs(), turn: load_turn(slot.turn()) }
    }

    /// Adds a chunk, with its signs, to its sums.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add(&self, chunk: __m512, block: &mut [f32]) {
        let (bits, top) = (_mm512_castps_si512(chunk), _mm512_set1_epi32(i32::MIN));
        let signed = _mm512_mask_xor_epi32(bits, self.signs, bits, top);
        let turned = _mm512_permutexvar_ps(self.turn, _mm512_castsi512_ps(signed));
        let sums = &mut block[self.place..][..LANES].as_chunks_mut::<LANES>().0[0];
        store(sums, _mm512_add_ps(load(sums), turned));
    }
}

/// The lane that each lane of a chunk is taken from, for every turn.
#[repr(align(64))]
struct Turns([[u32; LANES]; LANES]);

static TURNS: Turns = Turns(turns());

#[inline]
#[target_feature(enable = "avx512f")]
fn load_turn(turn: usize) -> __m512i {
    let lanes = &TURNS.0[turn];
    // SAFETY: the reference covers the sixteen lanes, which begin a line.
    unsafe { _mm512_load_si512(lanes.as_ptr().cast()) }
}

scatter_loaded!("avx512f", __m512);

#[target_feature(enable = "avx512f")]
pub(super) fn scatter<const N: usize>(
    slots: [&[Slot]; N],
    values: [&[f32]; N],
    blocks: [&mut [f32]; N],
) {
    scatter_loaded(slots, values, blocks, |chunk| load(chunk));
}

#[target_feature(enable = "avx512f")]
pub(super) fn scatter_f16<const N: usize>(
    slots: [&[Slot]; N],
    values: [&[f16]; N],
    blocks: [&mut [f32]; N],
) {
    scatter_loaded(slots, values, blocks, |chunk| _mm512_cvtph_ps(load_16_bits(chunk)));
}

#[target_feature(enable = "avx512f")]
pub(super) fn scatter_bf16<const N: usize>(
    slots: [&[Slot]; N],
    values: [&[bf16]; N],
    blocks: [&mut [f32]; N],
) {
    scatter_loaded(slots, values, blocks, |chunk| {
        let bits = _mm512_cvtepu16_epi32(load_16_bits(chunk));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
    });
}

type Sums = [[__m512; TILE_CHUNKS]; TILE_ROWS];

#[inline]
#[target_feature(enable = "avx512f")]
fn add_terms(left: &[f32], right: &[f32], sums: &mut Sums) {
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
}

#[target_feature(enable = "avx512f")]
pub(super) fn outer_tile(left: &[f32], right: &[f32], tile: &mut Tile) {
    let mut sums: Sums = [[_mm512_setzero_ps(); TILE_CHUNKS]; TILE_ROWS];
    for (sums, values) in sums.iter_mut().zip(tile.iter()) {
        for (sum, values) in sums.iter_mut().zip(values.as_chunks::<LANES>().0) {
            *sum = load(values);
        }
    }
    add_terms(left, right, &mut sums);
    for (sums, values) in sums.iter().zip(tile) {
        for (sum, values) in sums.iter().zip(values.as_chunks_mut::<LANES>().0) {
            store(values, *sum);
        }
    }
}

#[target_feature(enable = "avx512f")]
pub(super) fn outer_scatter(
    left: &[f32],
    right: &[f32],
    slots: (&[Slot], usize),
    block: &mut [f32],
    sum: Option<(&mut [f32], usize)>,
) {
    let mut sums: Sums = [[_mm512_setzero_ps(); TILE_CHUNKS]; TILE_ROWS];
    add_terms(left, right, &mut sums);
    let rows = slots.0.chunks(slots.1);
    for (slots, sums) in rows.clone().zip(&sums) {
        Target::of(slots[0]).add(sums[0], block);
        Target::of(slots[1]).add(sums[1], block);
    }
    if let Some((sum, stride)) = sum {
        for (row, values) in sums.iter().take(rows.len()).enumerate() {
            let into = sum[row * stride..][..TILE_COLUMNS].as_chunks_mut::<LANES>().0;
            for (into, values) in into.iter_mut().zip(values) {
                store(into, _mm512_add_ps(load(into), *values));
            }
        }
    }
}

/// Queries whose products with [`DOT_ROWS`] rows fill 16 registers.
const SQUARE: usize = LANES / DOT_ROWS;

#[target_feature(enable = "avx512f")]
pub(super) fn dots(rows: &[f32], queries: &[f32], dim: usize, out: &mut [f32]) {
    let (height, width) = (rows.len() / dim, queries.len() / dim);
    for row in (0..height).step_by(DOT_ROWS) {
        for query in (0..width).step_by(SQUARE) {
            let (rows, queries) = (&rows[row * dim..], &queries[query * dim..]);
            let (high, wide) = (DOT_ROWS.min(height - row), SQUARE.min(width - query));
            let out = &mut out[row * width + query..];
            if high == DOT_ROWS && wide == SQUARE {
                square(rows, queries, dim, width, out);
                continue;
            }
            for r in 0..high {
                for q in 0..wide {
                    out[r * width + q] = dot(&rows[r * dim..][..dim], &queries[q * dim..][..dim]);
                }
            }
        }
    }
}

/// The products of four rows with four queries; those of a row stand `width` apart in `out`.
#[inline]
#[target_feature(enable = "avx512f")]
fn square(rows: &[f32], queries: &[f32], dim: usize, width: usize, out: &mut [f32]) {
    let steps = dim / LANES;
    let mut sums = [_mm512_setzero_ps(); LANES];
    let (rows, queries) = (four(rows, dim), four(queries, dim));
    let [row_chunks, query_chunks] = [chunks(rows, steps), chunks(queries, steps)];
    for step in 0..steps {
        let right = [
            load(&query_chunks[0][step]),
            load(&query_chunks[1][step]),
            load(&query_chunks[2][step]),
            load(&query_chunks[3][step]),
        ];
        for (sums, row) in sums.as_chunks_mut::<SQUARE>().0.iter_mut().zip(row_chunks) {
            let left = load(&row[step]);
            for (sum, right) in sums.iter_mut().zip(right) {
                *sum = _mm512_fmadd_ps(left, right, *sum);
            }
        }
    }
    let mut found = [0.0; LANES];
    if dim.is_multiple_of(LANES) {
        sums_of_lanes(&sums, &mut found);
    } else {
        for (at, (found, sum)) in found.iter_mut().zip(sums).enumerate() {
            let (row, query) = (rows[at / SQUARE], queries[at % SQUARE]);
            *found = finish(sum, &row[steps * LANES..], &query[steps * LANES..]);
        }
    }
    for (r, found) in found.as_chunks::<SQUARE>().0.iter().enumerate() {
        out[r * width..][..SQUARE].copy_from_slice(found);
    }
}

/// Four rows.
#[inline(always)]
fn four(values: &[f32], dim: usize) -> [&[f32]; 4] {
    let (a, rest) = values.split_at(dim);
    let (b, rest) = rest.split_at(dim);
    let (c, rest) = rest.split_at(dim);
    [a, b, c, &rest[..dim]]
}

/// Their first `steps` steps.
#[inline(always)]
fn chunks([a, b, c, d]: [&[f32]; 4], steps: usize) -> [&[[f32; LANES]]; 4] {
    [
        &a.as_chunks().0[..steps],
        &b.as_chunks().0[..steps],
        &c.as_chunks().0[..steps],
        &d.as_chunks().0[..steps],
    ]
}

/// [`sum_lanes`] of 16 registers: what is added is the same, for several of them at once.
///
/// Without closures: they would be calls, for what takes them may use fewer instructions.
#[inline]
#[target_feature(enable = "avx512f")]
fn sums_of_lanes(sums: &[__m512; LANES], out: &mut [f32; LANES]) {
    // Lanes i and i + 8, of two registers: a register holds 8 of each.
    let mut eights = [_mm512_setzero_ps(); 8];
    for (eight, [a, b]) in eights.iter_mut().zip(sums.as_chunks::<2>().0) {
        let low = _mm512_shuffle_f32x4::<0x44>(*a, *b);
        *eight = _mm512_add_ps(low, _mm512_shuffle_f32x4::<0xEE>(*a, *b));
    }
    let mut fours = [_mm512_setzero_ps(); 4];
    for (four, [a, b]) in fours.iter_mut().zip(eights.as_chunks::<2>().0) {
        let low = _mm512_shuffle_f32x4::<0x88>(*a, *b);
        *four = _mm512_add_ps(low, _mm512_shuffle_f32x4::<0xDD>(*a, *b));
    }
    let mut twos = [_mm512_setzero_ps(); 2];
    for (two, [a, b]) in twos.iter_mut().zip(fours.as_chunks::<2>().0) {
        let (a, b) = (_mm512_castps_pd(*a), _mm512_castps_pd(*b));
        let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
        *two = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    }
    let (even, odd) =
        (_mm512_shuffle_ps::<0x88>(twos[0], twos[1]), _mm512_shuffle_ps::<0xDD>(twos[0], twos[1]));
    let mut lanes = [0.0; LANES];
    store(&mut lanes, _mm512_add_ps(even, odd));
    // Quarter `q` has register `q` of each four, in the order 0, 8 / 4, 12 of fours.
    for (at, out) in out.iter_mut().enumerate() {
        *out = lanes[at % 4 * 4 + at / 4];
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
