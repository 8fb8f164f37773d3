//! The kernels for AVX-512 with VNNI: products of 4-bit codes with 8-bit queries.
#![allow(unsafe_code)] // loads and stores through pointers into checked slices

use std::arch::x86_64::{
    __m256i, __m512i, _mm256_loadu_si256, _mm512_add_epi32, _mm512_and_si512, _mm512_dpbusd_epi32,
    _mm512_loadu_si512, _mm512_reduce_add_epi32, _mm512_set1_epi8, _mm512_setzero_si512,
    _mm512_shuffle_i32x4, _mm512_srli_epi16, _mm512_storeu_si512, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64, _mm512_zextsi256_si512,
};

use super::{FAR, prefetch};

/// Sums that fit the registers.
const SUMS: usize = 16;
/// Bytes of a register.
const WIDTH: usize = 64;

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

/// The products of the first `R` rows with `Q` queries, `R Q = 16`; sum `q R + r` is that of row `r`
/// with query `q`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<const R: usize, const Q: usize>(
    rows: &[u8],
    queries: &[&[i8]; Q],
    width: usize,
) -> [i32; SUMS] {
    let steps = width / WIDTH;
    let mut sums = [[_mm512_setzero_si512(); R]; Q];
    let (mut whole, mut rest): ([&[[u8; WIDTH]]; R], [&[u8]; R]) = ([&[]; R], [&[]; R]);
    for r in 0..R {
        let (chunks, left) = rows[r * width..(r + 1) * width].as_chunks::<WIDTH>();
        (whole[r], rest[r]) = (&chunks[..steps], left);
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
        let mut pairs = [_mm512_setzero_si512(); R];
        for r in 0..R {
            if Q == 1 {
                prefetch(whole[r][step].as_ptr().cast::<i8>().wrapping_add(FAR));
            }
            pairs[r] = load(&whole[r][step]);
        }
        let mut both = [[_mm512_setzero_si512(); 2]; Q];
        for q in 0..Q {
            both[q] = [load(&factors[q][0][step]), load(&factors[q][1][step])];
        }
        add_products(&mut sums, pairs, both);
    }
    if width > steps * WIDTH {
        let mut pairs = [_mm512_setzero_si512(); R];
        for r in 0..R {
            pairs[r] = load(rest[r]);
        }
        let mut both = [[_mm512_setzero_si512(); 2]; Q];
        for q in 0..Q {
            both[q] = [load(rest_factors[q][0]), load(rest_factors[q][1])];
        }
        add_products(&mut sums, pairs, both);
    }
    sums_of_lanes(sums.as_flattened())
}

/// Adds the products of pairs of 4-bit numbers with the factors of both halves.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn add_products<const R: usize, const Q: usize>(
    sums: &mut [[__m512i; R]; Q],
    pairs: [__m512i; R],
    factors: [[__m512i; 2]; Q],
) {
    let mask = _mm512_set1_epi8(15);
    for r in 0..R {
        let low = _mm512_and_si512(pairs[r], mask);
        for q in 0..Q {
            sums[q][r] = _mm512_dpbusd_epi32(sums[q][r], low, factors[q][0]);
        }
        let high = _mm512_and_si512(_mm512_srli_epi16::<4>(pairs[r]), mask);
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
    let count = rows.len() / width;
    let (fours, singles) = queries.as_chunks::<4>();
    let (of_fours, of_singles) = out.split_at_mut(4 * fours.len() * count);
    let whole = count - count % 4;
    for first in (0..whole).step_by(4) {
        let here = &rows[first * width..];
        for (queries, out) in fours.iter().zip(of_fours.chunks_exact_mut(4 * count)) {
            let found = tile::<4, 4>(here, queries, width);
            for (found, out) in found.as_chunks::<4>().0.iter().zip(out.chunks_exact_mut(count)) {
                out[first..first + 4].copy_from_slice(found);
            }
        }
    }
    for (query, out) in queries.iter().zip(of_fours.chunks_exact_mut(count)) {
        for (out, row) in out[whole..].iter_mut().zip(rows[whole * width..].chunks_exact(width)) {
            *out = single(row, query);
        }
    }
    for (query, out) in singles.iter().zip(of_singles.chunks_exact_mut(count)) {
        let (sixteens, rest) = out.as_chunks_mut::<SUMS>();
        let (many, few) = rows.split_at(sixteens.len() * SUMS * width);
        for (out, rows) in sixteens.iter_mut().zip(many.chunks_exact(SUMS * width)) {
            *out = tile::<SUMS, 1>(rows, &[query], width);
        }
        for (out, row) in rest.iter_mut().zip(few.chunks_exact(width)) {
            *out = single(row, query);
        }
    }
}

/// The product of one row with one query.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn single(row: &[u8], query: &[i8]) -> i32 {
    let mut sums = [[_mm512_setzero_si512()]; 1];
    let (low, high) = query.split_at(row.len());
    for ((row, low), high) in row.chunks(WIDTH).zip(low.chunks(WIDTH)).zip(high.chunks(WIDTH)) {
        add_products(&mut sums, [load(row)], [[load(low), load(high)]]);
    }
    _mm512_reduce_add_epi32(sums[0][0])
}
