//! AVX2 + FMA forms. A chunk of 16 is two registers of eight.
#![allow(unsafe_code)] // loads and stores through pointers into checked slices

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm_add_epi32, _mm_cvtsi128_si32, _mm_loadu_si128, _mm_shuffle_epi32,
    _mm256_add_epi16, _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_castpd_ps,
    _mm256_castps_pd, _mm256_castsi256_ps, _mm256_castsi256_si128, _mm256_cvtepi32_ps,
    _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_extracti128_si256, _mm256_fmadd_ps,
    _mm256_load_si256, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16,
    _mm256_maddubs_epi16, _mm256_mul_ps, _mm256_mullo_epi32, _mm256_or_si256,
    _mm256_permute2f128_ps, _mm256_permutevar8x32_ps, _mm256_set1_epi8, _mm256_set1_epi16,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_setr_epi32, _mm256_setzero_ps, _mm256_setzero_si256,
    _mm256_slli_epi32, _mm256_sllv_epi32, _mm256_srli_epi16, _mm256_srlv_epi32, _mm256_storeu_ps,
    _mm256_sub_epi32, _mm256_sub_ps, _mm256_unpackhi_pd, _mm256_unpackhi_ps, _mm256_unpacklo_pd,
    _mm256_unpacklo_ps, _mm256_xor_ps,
};

use half::{bf16, f16};

use super::{
    AHEAD, Column, DOT_ROWS, FAR, LANES, LeafTurns, Slot, TILE_COLUMNS, TILE_ROWS, Tile, Turn,
    fourier, prefetch, scalar, sum_lanes, turns,
};

const WIDTH: usize = 8;
/// Bytes of a register.
const BYTES: usize = 32;

compiled_forms!("avx2");

#[inline]
#[target_feature(enable = "avx2")]
fn load(values: &[f32; WIDTH]) -> __m256 {
    // SAFETY: the reference covers the eight values.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(values: &mut [f32; WIDTH], register: __m256) {
    // SAFETY: as for `load`.
    unsafe { _mm256_storeu_ps(values.as_mut_ptr(), register) }
}

#[inline]
fn eights<const N: usize>(values: &[f32; N]) -> &[[f32; WIDTH]] {
    values.as_chunks().0
}

/// Eight values of 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn load_16_bits<T: bytemuck::Pod>(values: &[T; WIDTH]) -> __m128i {
    let bits: &[u16; WIDTH] = bytemuck::cast_ref(values);
    // SAFETY: the reference covers eight values of 16 bits, as many as are loaded.
    unsafe { _mm_loadu_si128(bits.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen(halves: &[f16], out: &mut [f32]) {
    let (wide, rest) = halves.as_chunks::<WIDTH>();
    let (wide_out, rest_out) = out.as_chunks_mut::<WIDTH>();
    for (halves, out) in wide.iter().zip(wide_out) {
        store(out, _mm256_cvtph_ps(load_16_bits(halves)));
    }
    scalar::widen(rest, rest_out);
}

#[target_feature(enable = "avx2")]
pub(super) fn unpack<const B: usize>(bytes: &[u8], out: &mut [f32]) {
    let bits = _mm256_set1_epi32((B as u32).cast_signed());
    let first = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), bits);
    let step = _mm256_slli_epi32::<3>(bits);
    let top = _mm256_set1_epi32((1 << B) - 1);
    let (words, _) = bytes.as_chunks::<4>();
    let (eights, _) = out.as_chunks_mut::<WIDTH>();
    let mut done = 0;
    for (&word, eights) in words.iter().zip(eights.chunks_exact_mut(4 / B)) {
        let word = _mm256_set1_epi32(i32::from_le_bytes(word));
        let mut shifts = first;
        for out in eights {
            let codes = _mm256_and_si256(_mm256_srlv_epi32(word, shifts), top);
            let levels = _mm256_sub_epi32(_mm256_add_epi32(codes, codes), top);
            store(out, _mm256_cvtepi32_ps(levels));
            shifts = _mm256_add_epi32(shifts, step);
        }
        done += 1;
    }
    scalar::unpack::<B>(&bytes[4 * done..], &mut out[32 / B * done..]);
}

#[target_feature(enable = "avx2")]
pub(super) fn side_by_side<const L: usize>(
    rows: &[&[f32]],
    from: usize,
    flips: &[u32],
    values: &mut [[f32; L]],
) {
    let mut done = 0;
    if L.is_multiple_of(WIDTH) && rows.len() == L {
        let blocks = values.as_chunks_mut::<WIDTH>().0.iter_mut();
        for (block, flips) in blocks.zip(flips.as_chunks::<WIDTH>().0) {
            let flips = load(bytemuck::cast_ref(flips));
            for (lane, rows) in (0..).step_by(WIDTH).zip(rows.as_chunks::<WIDTH>().0) {
                let square = rows.map(|row| {
                    let values = &row[from + done..][..WIDTH].as_chunks::<WIDTH>().0[0];
                    _mm256_xor_ps(load(values), flips)
                });
                for (values, register) in block.iter_mut().zip(transpose(square)) {
                    store(&mut values[lane..].as_chunks_mut::<WIDTH>().0[0], register);
                }
            }
            done += WIDTH;
        }
    }
    scalar::side_by_side(rows, from + done, &flips[done..], &mut values[done..]);
}

/// Columns to rows.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(square: [__m256; WIDTH]) -> [__m256; WIDTH] {
    let mut columns = [[_mm256_setzero_ps(); 4]; 2];
    for (columns, rows) in columns.iter_mut().zip(square.as_chunks::<4>().0) {
        let (low, high) = (
            [_mm256_unpacklo_ps(rows[0], rows[1]), _mm256_unpacklo_ps(rows[2], rows[3])],
            [_mm256_unpackhi_ps(rows[0], rows[1]), _mm256_unpackhi_ps(rows[2], rows[3])],
        );
        for (pair, [left, right]) in columns.as_chunks_mut::<2>().0.iter_mut().zip([low, high]) {
            let (left, right) = (_mm256_castps_pd(left), _mm256_castps_pd(right));
            *pair = [_mm256_unpacklo_pd(left, right), _mm256_unpackhi_pd(left, right)]
                .map(|register| _mm256_castpd_ps(register));
        }
    }
    // Half `h` of `columns[r][c]` is column `4 h + c` of rows `4 r..4 r + 4` now.
    let mut turned = square;
    for column in 0..4 {
        let [a, b] = columns.map(|columns| columns[column]);
        turned[column] = _mm256_permute2f128_ps::<0x20>(a, b);
        turned[column + 4] = _mm256_permute2f128_ps::<0x31>(a, b);
    }
    turned
}

#[target_feature(enable = "avx2")]
pub(super) fn sign_rows(
    key: u64,
    dim: usize,
    first: u64,
    bucket: usize,
    rows: &mut [[f32; TILE_COLUMNS]],
) {
    let one = _mm256_set1_epi32(1f32.to_bits().cast_signed());
    for (index, row) in rows.iter_mut().enumerate() {
        let bits = scalar::sign_bits(key, dim, first.wrapping_add(index as u64), bucket);
        for (eight, row) in row.as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
            let bits = _mm256_set1_epi32((bits >> (eight * WIDTH)).cast_signed());
            // Shifting left by 31 - lane brings lane's bit to the top.
            let shifts = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
            let top =
                _mm256_and_si256(_mm256_sllv_epi32(bits, shifts), _mm256_set1_epi32(i32::MIN));
            store(row, _mm256_castsi256_ps(_mm256_or_si256(top, one)));
        }
    }
}

#[target_feature(enable = "avx2,fma")]
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

#[target_feature(enable = "avx2")]
pub(super) fn add_squared_transform(
    turns: &[Turn],
    leaves: &[LeafTurns],
    values: [&mut [f32]; 2],
    sums: [&mut [f32]; 2],
) {
    fourier::add_squared_transform::<WIDTH, __m256>(turns, leaves, values, sums);
}

#[target_feature(enable = "avx2")]
pub(super) fn transform_back(turns: &[Turn], leaves: &[LeafTurns], values: [&mut [f32]; 2]) {
    fourier::transform_back::<WIDTH, __m256>(turns, leaves, values);
}

// SAFETY, for every method: only the forms above use them, where the set exists.
impl fourier::Vector<WIDTH> for __m256 {
    #[inline(always)]
    fn load(values: &[f32; WIDTH]) -> Self {
        // SAFETY: as said above.
        unsafe { load(values) }
    }

    #[inline(always)]
    fn store(self, values: &mut [f32; WIDTH]) {
        // SAFETY: as said above.
        unsafe { store(values, self) }
    }

    #[inline(always)]
    fn spread(value: f32) -> Self {
        // SAFETY: as said above.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        // SAFETY: as said above.
        unsafe { _mm256_add_ps(self, other) }
    }

    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        // SAFETY: as said above.
        unsafe { _mm256_sub_ps(self, other) }
    }

    #[inline(always)]
    fn times(self, other: Self) -> Self {
        // SAFETY: as said above.
        unsafe { _mm256_mul_ps(self, other) }
    }

    #[inline(always)]
    fn transpose(square: &mut [Self; WIDTH]) {
        // SAFETY: as said above.
        *square = unsafe { transpose(*square) };
    }
}

/// A slot, as what is done with a chunk.
struct Target {
    place: usize,
    /// Half of the sums that the first half of a chunk goes to.
    half: usize,
    flips: [__m256; 2],
    lanes: __m256i,
}

impl Target {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn of(slot: Slot) -> Self {
        // Shifting the sign bits left by 31 - lane brings lane's bit to the top.
        let shifts = [
            _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24),
            _mm256_setr_epi32(23, 22, 21, 20, 19, 18, 17, 16),
        ];
        let signs = _mm256_set1_epi32(i32::from(slot.signs()));
        let flips = shifts.map(|shift| {
            let top = _mm256_set1_epi32(i32::MIN);
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_sllv_epi32(signs, shift), top))
        });
        let (place, turn) = (slot.place(), slot.turn());
        Self { place, half: turn / WIDTH, flips, lanes: load_turn(turn % WIDTH) }
    }

    /// Adds a chunk, with its signs, to its sums.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn add(&self, chunk: [__m256; 2], block: &mut [f32]) {
        let sums = block[self.place..][..LANES].as_chunks_mut::<WIDTH>().0;
        for (half, (values, flip)) in chunk.into_iter().zip(self.flips).enumerate() {
            let turned = _mm256_permutevar8x32_ps(_mm256_xor_ps(values, flip), self.lanes);
            let sum = &mut sums[half ^ self.half];
            store(sum, _mm256_add_ps(load(sum), turned));
        }
    }
}

/// The lane that each lane of half a chunk is taken from, for every turn of the lowest three bits.
#[repr(align(32))]
struct Turns([[u32; WIDTH]; WIDTH]);

static TURNS: Turns = Turns(turns());

#[inline]
#[target_feature(enable = "avx2")]
fn load_turn(turn: usize) -> __m256i {
    let lanes = &TURNS.0[turn];
    // SAFETY: the reference covers the eight lanes, and their address is a multiple of 32.
    unsafe { _mm256_load_si256(lanes.as_ptr().cast()) }
}

scatter_loaded!("avx2,fma,f16c", [__m256; 2]);

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scatter<const N: usize>(
    slots: [&[Slot]; N],
    values: [&[f32]; N],
    blocks: [&mut [f32]; N],
) {
    scatter_loaded(slots, values, blocks, |chunk| {
        let halves = eights(chunk);
        [load(&halves[0]), load(&halves[1])]
    });
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scatter_f16<const N: usize>(
    slots: [&[Slot]; N],
    values: [&[f16]; N],
    blocks: [&mut [f32]; N],
) {
    scatter_loaded(slots, values, blocks, |chunk| {
        let halves = chunk.as_chunks::<WIDTH>().0;
        [_mm256_cvtph_ps(load_16_bits(&halves[0])), _mm256_cvtph_ps(load_16_bits(&halves[1]))]
    });
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scatter_bf16<const N: usize>(
    slots: [&[Slot]; N],
    values: [&[bf16]; N],
    blocks: [&mut [f32]; N],
) {
    scatter_loaded(slots, values, blocks, |chunk| {
        let halves = chunk.as_chunks::<WIDTH>().0;
        [0, 1].map(|half| {
            let bits = _mm256_cvtepu16_epi32(load_16_bits(&halves[half]));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        })
    });
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn outer_tile(left: &[f32], right: &[f32], tile: &mut Tile) {
    // Four rows by 16 columns at a time: eight sums in flight hide the latency of a fused add.
    const ROWS: usize = 4;
    let left = left.as_chunks::<TILE_ROWS>().0;
    let right = right.as_chunks::<TILE_COLUMNS>().0;
    for row in (0..TILE_ROWS).step_by(ROWS) {
        for pair in (0..TILE_COLUMNS / WIDTH).step_by(2) {
            let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
            for (sums, values) in sums.iter_mut().zip(&tile[row..]) {
                let values = eights(values);
                *sums = [load(&values[pair]), load(&values[pair + 1])];
            }
            for (left, right) in left.iter().zip(right) {
                let right = eights(right);
                let values = [load(&right[pair]), load(&right[pair + 1])];
                for (sums, &factor) in sums.iter_mut().zip(&left[row..]) {
                    let factor = _mm256_set1_ps(factor);
                    sums[0] = _mm256_fmadd_ps(factor, values[0], sums[0]);
                    sums[1] = _mm256_fmadd_ps(factor, values[1], sums[1]);
                }
            }
            for (sums, values) in sums.iter().zip(&mut tile[row..]) {
                let values = values.as_chunks_mut::<WIDTH>().0;
                store(&mut values[pair], sums[0]);
                store(&mut values[pair + 1], sums[1]);
            }
        }
    }
}

/// A tile takes 32 registers and there are 16: it leaves them, and stays in the first cache.
#[target_feature(enable = "avx2,fma")]
pub(super) fn outer_scatter(
    left: &[f32],
    right: &[f32],
    slots: (&[Slot], usize),
    block: &mut [f32],
    sum: Option<(&mut [f32], usize)>,
) {
    let mut tile: Tile = [[0.0; TILE_COLUMNS]; TILE_ROWS];
    outer_tile(left, right, &mut tile);
    let rows = slots.0.chunks(slots.1);
    for (slots, values) in rows.clone().zip(&tile) {
        for (slot, chunk) in slots.iter().zip(values.as_chunks::<LANES>().0) {
            let halves = eights(chunk);
            Target::of(*slot).add([load(&halves[0]), load(&halves[1])], block);
        }
    }
    if let Some((sum, stride)) = sum {
        for (row, values) in tile.iter().take(rows.len()).enumerate() {
            let into = sum[row * stride..][..TILE_COLUMNS].as_chunks_mut::<WIDTH>().0;
            for (into, values) in into.iter_mut().zip(eights(values)) {
                store(into, _mm256_add_ps(load(into), load(values)));
            }
        }
    }
}

/// Queries whose products with [`DOT_ROWS`] rows are taken together.
const DOT_QUERIES: usize = 3;

#[target_feature(enable = "avx2,fma")]
pub(super) fn dots(rows: &[f32], queries: &[f32], dim: usize, out: &mut [f32]) {
    let (all_rows, width) = (rows.len() / dim, queries.len() / dim);
    for row in (0..all_rows).step_by(DOT_ROWS) {
        for query in (0..width).step_by(DOT_QUERIES) {
            let (height, span) = (DOT_ROWS.min(all_rows - row), DOT_QUERIES.min(width - query));
            if height == DOT_ROWS && span == DOT_QUERIES {
                // Rows in pairs: 2 x 3 products in two registers each fill 12 of the 16 registers.
                for row in [row, row + 2] {
                    let sums = pair_tile(&rows[row * dim..], &queries[query * dim..], dim);
                    for (r, sums) in sums.iter().enumerate() {
                        out[(row + r) * width + query..][..DOT_QUERIES].copy_from_slice(sums);
                    }
                }
                continue;
            }
            for row in row..row + height {
                for query in query..query + span {
                    out[row * width + query] =
                        dot(&rows[row * dim..][..dim], &queries[query * dim..][..dim]);
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn pair_tile(rows: &[f32], queries: &[f32], dim: usize) -> [[f32; DOT_QUERIES]; 2] {
    let steps = dim / LANES;
    let mut sums = [[[_mm256_setzero_ps(); 2]; DOT_QUERIES]; 2];
    let rows: [&[f32]; 2] = std::array::from_fn(|r| &rows[r * dim..][..dim]);
    let queries: [&[f32]; DOT_QUERIES] = std::array::from_fn(|q| &queries[q * dim..][..dim]);
    let row_chunks = rows.map(|row| &row.as_chunks::<LANES>().0[..steps]);
    let query_chunks = queries.map(|query| &query.as_chunks::<LANES>().0[..steps]);
    for step in 0..steps {
        let left = row_chunks.map(|row| eights(&row[step]));
        for (q, query) in query_chunks.iter().enumerate() {
            let right = eights(&query[step]);
            for (sums, left) in sums.iter_mut().zip(left) {
                for half in 0..2 {
                    sums[q][half] =
                        _mm256_fmadd_ps(load(&left[half]), load(&right[half]), sums[q][half]);
                }
            }
        }
    }
    std::array::from_fn(|r| {
        std::array::from_fn(|q| {
            finish(sums[r][q], &rows[r][steps * LANES..], &queries[q][steps * LANES..])
        })
    })
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn dot(row: &[f32], query: &[f32]) -> f32 {
    let mut sums = [_mm256_setzero_ps(); 2];
    let (row, row_tail) = row.as_chunks::<LANES>();
    let (query, query_tail) = query.as_chunks::<LANES>();
    for (row, query) in row.iter().zip(query) {
        let (row, query) = (eights(row), eights(query));
        for half in 0..2 {
            sums[half] = _mm256_fmadd_ps(load(&row[half]), load(&query[half]), sums[half]);
        }
    }
    finish(sums, row_tail, query_tail)
}

/// The last, partial step and the sum of the lanes.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn finish(sums: [__m256; 2], row_tail: &[f32], query_tail: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    for (lanes, sums) in lanes.as_chunks_mut::<WIDTH>().0.iter_mut().zip(sums) {
        store(lanes, sums);
    }
    scalar::add_step(&mut lanes, row_tail, query_tail);
    sum_lanes(lanes)
}

/// Steps whose sums of 16 bits cannot overflow: each adds at most 4 · 15 · 127 to one.
const NIBBLE_STEPS: usize = 4;

/// The products of `R` rows with `Q` queries; `[q][r]` is that of row `r` with query `q`. `STREAM`:
/// rows are read once, in order.
#[inline]
#[target_feature(enable = "avx2")]
fn nibble_tile<const R: usize, const Q: usize, const STREAM: bool>(
    rows: [&[u8]; R],
    queries: [(&[i8], &[i8]); Q],
    width: usize,
) -> [[i32; R]; Q] {
    let (mask, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
    let mut sums = [[_mm256_setzero_si256(); R]; Q];
    for begin in (0..width).step_by(NIBBLE_STEPS * BYTES) {
        let mut parts = [[_mm256_setzero_si256(); R]; Q];
        for at in (begin..width.min(begin + NIBBLE_STEPS * BYTES)).step_by(BYTES) {
            let pairs = rows.map(|row| {
                if STREAM {
                    prefetch(row[at..].as_ptr().cast::<i8>().wrapping_add(FAR));
                }
                load_bytes(row, at)
            });
            let low = pairs.map(|pairs| _mm256_and_si256(pairs, mask));
            let high = pairs.map(|pairs| _mm256_and_si256(_mm256_srli_epi16::<4>(pairs), mask));
            for (parts, query) in parts.iter_mut().zip(queries) {
                let factors = (load_bytes(query.0, at), load_bytes(query.1, at));
                for ((part, low), high) in parts.iter_mut().zip(low).zip(high) {
                    let both = _mm256_add_epi16(
                        _mm256_maddubs_epi16(low, factors.0),
                        _mm256_maddubs_epi16(high, factors.1),
                    );
                    *part = _mm256_add_epi16(*part, both);
                }
            }
        }
        for (sums, parts) in sums.iter_mut().zip(parts) {
            for (sum, part) in sums.iter_mut().zip(parts) {
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(part, ones));
            }
        }
    }
    sums.map(|sums| sums.map(|sum| sum_of_lanes(sum)))
}

/// The bytes of a register from `at` on.
#[inline]
#[target_feature(enable = "avx2")]
fn load_bytes<T: Copy>(values: &[T], at: usize) -> __m256i {
    const { assert!(size_of::<T>() == 1) };
    let values = &values[at..][..BYTES];
    // SAFETY: the slice is 32 bytes long.
    unsafe { _mm256_loadu_si256(values.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn sum_of_lanes(lanes: __m256i) -> i32 {
    let halves = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256::<1>(lanes));
    let pairs = _mm_add_epi32(halves, _mm_shuffle_epi32::<0b00_00_11_10>(halves));
    _mm_cvtsi128_si32(_mm_add_epi32(pairs, _mm_shuffle_epi32::<0b00_00_00_01>(pairs)))
}

#[target_feature(enable = "avx2")]
pub(super) fn nibble_dots(rows: &[u8], width: usize, queries: &[&[i8]], out: &mut [i32]) {
    code_planes([rows], width, queries, out);
}

#[target_feature(enable = "avx2")]
pub(super) fn code_dots(
    upper: &[u8],
    lower: &[u8],
    width: usize,
    queries: &[&[i8]],
    out: &mut [i32],
) {
    code_planes([lower, upper], width, queries, out);
}

/// The products of rows in planes of 4-bit numbers, of which each is worth 16 times the one before.
#[inline]
#[target_feature(enable = "avx2")]
fn code_planes<const P: usize>(
    planes: [&[u8]; P],
    width: usize,
    queries: &[&[i8]],
    out: &mut [i32],
) {
    let count = planes[0].len() / width;
    let (pairs, single) = queries.as_chunks::<2>();
    for first in (0..count).step_by(2) {
        // A row past the last is the last again.
        let second = (first + 1).min(count - 1);
        let height = 2.min(count - first);
        for (worth, plane) in planes.iter().enumerate() {
            let row = |r: usize| &plane[r * width..][..width];
            let here = [row(first), row(second)];
            let mut put = |query: usize, found: &[i32; 2]| {
                let out = &mut out[query * count + first..][..height];
                for (out, found) in out.iter_mut().zip(found) {
                    *out = if worth == 0 { *found } else { *out + 16 * found };
                }
            };
            for (index, queries) in pairs.iter().enumerate() {
                let found = nibble_tile::<2, 2, false>(
                    here,
                    queries.map(|query| query.split_at(width)),
                    width,
                );
                put(2 * index, &found[0]);
                put(2 * index + 1, &found[1]);
            }
            for query in single {
                let [found] = nibble_tile::<2, 1, true>(here, [query.split_at(width)], width);
                put(2 * pairs.len(), &found);
            }
        }
    }
}

#[target_feature(enable = "avx2")]
pub(super) fn picked_nibble_dots(
    rows: &[u8],
    width: usize,
    picks: &[u32],
    query: &[i8],
    out: &mut [i32],
) {
    let row = |pick: u32| &rows[pick as usize * width..][..width];
    let query = query.split_at(width);
    for (picks, out) in picks.chunks(2).zip(out.chunks_mut(2)) {
        // A row past the last is the last again.
        let here = [row(picks[0]), row(picks[picks.len() - 1])];
        let [found] = nibble_tile::<2, 1, false>(here, [query], width);
        out.copy_from_slice(&found[..out.len()]);
    }
}
