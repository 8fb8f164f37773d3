//! The kernels for AVX-512 with VNNI: products of 4-bit codes with 8-bit queries.
#![allow(unsafe_code)] // loads and stores through pointers into checked slices

use std::arch::x86_64::{
    __m256i, __m512i, _mm256_loadu_si256, _mm512_add_epi32, _mm512_and_si512, _mm512_dpbusd_epi32,
    _mm512_loadu_si512, _mm512_reduce_add_epi32, _mm512_set1_epi8, _mm512_setzero_si512,
    _mm512_shuffle_i32x4, _mm512_slli_epi16, _mm512_srli_epi16, _mm512_storeu_si512,
    _mm512_ternarylogic_epi32, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
    _mm512_unpacklo_epi64, _mm512_zextsi256_si512,
};

use super::{FAR, prefetch};

/// Sums that fit the registers.
const SUMS: usize = 16;
/// Bytes of a register.
const WIDTH: usize = 64;
/// Of three inputs, bit by bit: the second where the first has a one, else the third.
const SELECT: i32 = 0xCA;

/// Bytes of a part of a row: a register's worth, or the half of it that can be left at the end.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn load<T: Copy>(part: &[T]) -> __m512i {
    const { assert!(size_of::<T>() == 1) };
    if part.len() >= WIDTH {
        // SAFETY: there are at least 64 bytes.
        unsafe { _mm512_loadu_si512(part.as_ptr().cast::<__m512i>()) }
    } else {
        assert!(part.len() >= WIDTH / 2);
        // SAFETY: there are at least 32 bytes.
        _mm512_zextsi256_si512(unsafe { _mm256_loadu_si256(part.as_ptr().cast::<__m256i>()) })
    }
}

/// The products of `R` rows with `Q` queries, `R Q = 16`; sum `q R + r` is that of row `r` with query
/// `q`. A row is in one plane of 4-bit numbers, or in two that make 8-bit ones. `STREAM`: rows are
/// read once, in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<const R: usize, const Q: usize, const P: usize, const STREAM: bool>(
    rows: [[&[u8]; P]; R],
    queries: &[&[i8]; Q],
    width: usize,
) -> [i32; SUMS] {
    let steps = width / WIDTH;
    let mut sums = [[_mm512_setzero_si512(); R]; Q];
    let mut whole: [[&[[u8; WIDTH]]; P]; R] = [[&[]; P]; R];
    let mut rest: [[&[u8]; P]; R] = [[&[]; P]; R];
    for r in 0..R {
        for p in 0..P {
            let (chunks, left) = rows[r][p].as_chunks::<WIDTH>();
            (whole[r][p], rest[r][p]) = (&chunks[..steps], left);
        }
    }
    let mut factors: [[&[[i8; WIDTH]]; 2]; Q] = [[&[]; 2]; Q];
    let mut rest_factors: [[&[i8]; 2]; Q] = [[&[]; 2]; Q];
    for q in 0..Q {
        for half in 0..2 {
            let (chunks, left) = queries[q][half * width..(half + 1) * width].as_chunks::<WIDTH>();
            (factors[q][half], rest_factors[q][half]) = (&chunks[..steps], left);
        }
    }
    for step in 0..steps {
        let mut pairs = [[_mm512_setzero_si512(); P]; R];
        for r in 0..R {
            for p in 0..P {
                if STREAM {
                    prefetch(whole[r][p][step].as_ptr().cast::<i8>().wrapping_add(FAR));
                }
                pairs[r][p] = load(&whole[r][p][step]);
            }
        }
        let mut both = [[_mm512_setzero_si512(); 2]; Q];
        for q in 0..Q {
            both[q] = [load(&factors[q][0][step]), load(&factors[q][1][step])];
        }
        add_products(&mut sums, pairs, both);
    }
    if width > steps * WIDTH {
        let mut pairs = [[_mm512_setzero_si512(); P]; R];
        for r in 0..R {
            for p in 0..P {
                pairs[r][p] = load(rest[r][p]);
            }
        }
        let mut both = [[_mm512_setzero_si512(); 2]; Q];
        for q in 0..Q {
            both[q] = [load(rest_factors[q][0]), load(rest_factors[q][1])];
        }
        add_products(&mut sums, pairs, both);
    }
    sums_of_lanes(sums.as_flattened())
}

/// Adds the products of pairs of numbers with the factors of both halves.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn add_products<const R: usize, const Q: usize, const P: usize>(
    sums: &mut [[__m512i; R]; Q],
    pairs: [[__m512i; P]; R],
    factors: [[__m512i; 2]; Q],
) {
    let mask = _mm512_set1_epi8(15);
    for r in 0..R {
        let (upper, lower) = (pairs[r][0], pairs[r][P - 1]);
        // Of two planes one gives the upper four bits and one the lower; what a shift brings in
        // from the byte beside is masked out.
        let low = if P == 2 {
            _mm512_ternarylogic_epi32::<SELECT>(mask, lower, _mm512_slli_epi16::<4>(upper))
        } else {
            _mm512_and_si512(upper, mask)
        };
        for q in 0..Q {
            sums[q][r] = _mm512_dpbusd_epi32(sums[q][r], low, factors[q][0]);
        }
        let shifted = _mm512_srli_epi16::<4>(lower);
        let high = if P == 2 {
            _mm512_ternarylogic_epi32::<SELECT>(mask, shifted, upper)
        } else {
            _mm512_and_si512(shifted, mask)
        };
        for q in 0..Q {
            sums[q][r] = _mm512_dpbusd_epi32(sums[q][r], high, factors[q][1]);
        }
    }
}

/// The sum of the lanes of each register.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn sums_of_lanes(sums: &[__m512i]) -> [i32; SUMS] {
    // A register of each step holds the partial sums of two of the step before, side by side.
    let mut eights = [_mm512_setzero_si512(); 8];
    for (sum, pair) in eights.iter_mut().zip(sums.as_chunks::<2>().0) {
        let [a, b] = *pair;
        *sum = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    }
    let mut fours = [_mm512_setzero_si512(); 4];
    for (sum, pair) in fours.iter_mut().zip(eights.as_chunks::<2>().0) {
        let [a, b] = *pair;
        *sum = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    }
    let mut twos = [_mm512_setzero_si512(); 2];
    for (sum, pair) in twos.iter_mut().zip(fours.as_chunks::<2>().0) {
        let (even, odd) = (
            _mm512_shuffle_i32x4::<0x88>(pair[0], pair[1]),
            _mm512_shuffle_i32x4::<0xDD>(pair[0], pair[1]),
        );
        *sum = _mm512_add_epi32(even, odd);
    }
    let all = _mm512_add_epi32(
        _mm512_shuffle_i32x4::<0x88>(twos[0], twos[1]),
        _mm512_shuffle_i32x4::<0xDD>(twos[0], twos[1]),
    );
    let mut found = [0; SUMS];
    #[allow(clippy::cast_ptr_alignment)] // an unaligned store
    // SAFETY: 64 bytes of ours.
    unsafe {
        _mm512_storeu_si512(found.as_mut_ptr().cast::<__m512i>(), all);
    };
    found
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn nibble_dots(rows: &[u8], width: usize, queries: &[&[i8]], out: &mut [i32]) {
    dots([rows], width, queries, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn code_dots(
    upper: &[u8],
    lower: &[u8],
    width: usize,
    queries: &[&[i8]],
    out: &mut [i32],
) {
    dots([upper, lower], width, queries, out);
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn dots<const P: usize>(planes: [&[u8]; P], width: usize, queries: &[&[i8]], out: &mut [i32]) {
    let count = planes[0].len() / width;
    let (fours, singles) = queries.as_chunks::<4>();
    let (of_fours, of_singles) = out.split_at_mut(4 * fours.len() * count);
    let whole = count - count % 4;
    for first in (0..whole).step_by(4) {
        let here = together(planes, first, width);
        for (queries, out) in fours.iter().zip(of_fours.chunks_exact_mut(4 * count)) {
            let found = tile::<4, 4, P, false>(here, queries, width);
            for (found, out) in found.as_chunks::<4>().0.iter().zip(out.chunks_exact_mut(count)) {
                out[first..first + 4].copy_from_slice(found);
            }
        }
    }
    for (query, out) in queries.iter().zip(of_fours.chunks_exact_mut(count)) {
        for (row, out) in out.iter_mut().enumerate().skip(whole) {
            *out = single(from(planes, row * width), width, query);
        }
    }
    for (query, out) in singles.iter().zip(of_singles.chunks_exact_mut(count)) {
        let (sixteens, rest) = out.as_chunks_mut::<SUMS>();
        for (index, out) in sixteens.iter_mut().enumerate() {
            let here = together(planes, index * SUMS, width);
            *out = tile::<SUMS, 1, P, true>(here, &[query], width);
        }
        let done = sixteens.len() * SUMS;
        for (row, out) in rest.iter_mut().enumerate() {
            *out = single(from(planes, (done + row) * width), width, query);
        }
    }
}

/// Rows that lie one after the other, from one on.
#[inline]
fn together<const R: usize, const P: usize>(
    planes: [&[u8]; P],
    first: usize,
    width: usize,
) -> [[&[u8]; P]; R] {
    let mut rows: [[&[u8]; P]; R] = [[&[]; P]; R];
    for (row, place) in rows.iter_mut().zip(first..) {
        for (row, plane) in row.iter_mut().zip(planes) {
            *row = &plane[place * width..(place + 1) * width];
        }
    }
    rows
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn picked_nibble_dots(
    rows: &[u8],
    width: usize,
    picks: &[u32],
    query: &[i8],
    out: &mut [i32],
) {
    let row = |pick: u32| &rows[pick as usize * width..][..width];
    for (picks, out) in picks.chunks(SUMS).zip(out.chunks_mut(SUMS)) {
        if picks.len() > SUMS / 2 {
            // Rows past the last are the last again.
            let mut here = [[row(picks[picks.len() - 1])]; SUMS];
            for (here, &pick) in here.iter_mut().zip(picks) {
                *here = [row(pick)];
            }
            out.copy_from_slice(&tile::<SUMS, 1, 1, false>(here, &[query], width)[..out.len()]);
            continue;
        }
        for (&pick, out) in picks.iter().zip(out) {
            *out = single([row(pick)], width, query);
        }
    }
}

/// The planes from a byte on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn from<const P: usize>(mut planes: [&[u8]; P], at: usize) -> [&[u8]; P] {
    for plane in &mut planes {
        *plane = &plane[at..];
    }
    planes
}

/// The product of the first row with one query.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn single<const P: usize>(planes: [&[u8]; P], width: usize, query: &[i8]) -> i32 {
    let mut sums = [[_mm512_setzero_si512()]; 1];
    for at in (0..width).step_by(WIDTH) {
        let end = width.min(at + WIDTH);
        let mut pairs = [_mm512_setzero_si512(); P];
        for p in 0..P {
            pairs[p] = load(&planes[p][at..end]);
        }
        let factors = [load(&query[at..end]), load(&query[width + at..width + end])];
        add_products(&mut sums, [pairs], [factors]);
    }
    _mm512_reduce_add_epi32(sums[0][0])
}
