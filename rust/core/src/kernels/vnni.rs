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

/// All bytes of a register's worth from `at` on, or the half of it that is left and zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn load<T: Copy>(values: &[T], at: usize) -> __m512i {
    const { assert!(size_of::<T>() == 1) };
    let (values, left) = (&values[at..], values.len() - at);
    if left >= WIDTH {
        // SAFETY: at least 64 bytes are left.
        unsafe { _mm512_loadu_si512(values.as_ptr().cast::<__m512i>()) }
    } else {
        assert!(left >= WIDTH / 2);
        // SAFETY: at least 32 bytes are left.
        _mm512_zextsi256_si512(unsafe { _mm256_loadu_si256(values.as_ptr().cast::<__m256i>()) })
    }
}

/// The products of `R` rows with `Q` queries, `R Q = 16`; sum `q R + r` is that of row `r` with
/// query `q`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<const R: usize, const Q: usize>(
    rows: [&[u8]; R],
    queries: [(&[i8], &[i8]); Q],
    width: usize,
) -> [i32; SUMS] {
    let mask = _mm512_set1_epi8(15);
    let mut sums = [[_mm512_setzero_si512(); R]; Q];
    for at in (0..width).step_by(WIDTH) {
        let mut low = [_mm512_setzero_si512(); R];
        let mut high = low;
        for r in 0..R {
            if Q == 1 {
                prefetch(rows[r][at..].as_ptr().cast::<i8>().wrapping_add(FAR));
            }
            let pairs = load(rows[r], at);
            low[r] = _mm512_and_si512(pairs, mask);
            high[r] = _mm512_and_si512(_mm512_srli_epi16::<4>(pairs), mask);
        }
        for q in 0..Q {
            let factors = [load(queries[q].0, at), load(queries[q].1, at)];
            for r in 0..R {
                sums[q][r] = _mm512_dpbusd_epi32(sums[q][r], low[r], factors[0]);
            }
            for r in 0..R {
                sums[q][r] = _mm512_dpbusd_epi32(sums[q][r], high[r], factors[1]);
            }
        }
    }
    sums_of_lanes(sums.as_flattened())
}

/// The sum of the lanes of each register.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn sums_of_lanes(sums: &[__m512i]) -> [i32; SUMS] {
    // A register of each step holds the partial sums of two of the step before, side by side.
    let eights: [__m512i; 8] = std::array::from_fn(|at| {
        let (a, b) = (sums[2 * at], sums[2 * at + 1]);
        _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b))
    });
    let fours: [__m512i; 4] = std::array::from_fn(|at| {
        let (a, b) = (eights[2 * at], eights[2 * at + 1]);
        _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b))
    });
    let twos: [__m512i; 2] = std::array::from_fn(|at| {
        let (a, b) = (fours[2 * at], fours[2 * at + 1]);
        _mm512_add_epi32(_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xDD>(a, b))
    });
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
    let row = |r: usize| &rows[r * width..][..width];
    let (fours, singles) = queries.as_chunks::<4>();
    for first in (0..count).step_by(4) {
        // Rows past the last are the last again.
        let here: [&[u8]; 4] = std::array::from_fn(|r| row((first + r).min(count - 1)));
        let height = 4.min(count - first);
        for (index, queries) in fours.iter().enumerate() {
            let found = tile::<4, 4>(here, queries.map(|query| query.split_at(width)), width);
            for (q, found) in found.as_chunks::<4>().0.iter().enumerate() {
                let at = (4 * index + q) * count + first;
                out[at..at + height].copy_from_slice(&found[..height]);
            }
        }
    }
    for (query, out) in singles.iter().zip(out[4 * fours.len() * count..].chunks_exact_mut(count)) {
        let query = [query.split_at(width)];
        let (sixteens, rest) = out.as_chunks_mut::<SUMS>();
        for (index, out) in sixteens.iter_mut().enumerate() {
            *out = tile::<SUMS, 1>(std::array::from_fn(|r| row(index * SUMS + r)), query, width);
        }
        let done = sixteens.len() * SUMS;
        for (index, out) in rest.iter_mut().enumerate() {
            *out = single(row(done + index), query[0], width);
        }
    }
}

/// The product of one row with one query.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn single(row: &[u8], query: (&[i8], &[i8]), width: usize) -> i32 {
    let mask = _mm512_set1_epi8(15);
    let mut sums = [_mm512_setzero_si512(); 2];
    for at in (0..width).step_by(WIDTH) {
        let pairs = load(row, at);
        let low = _mm512_and_si512(pairs, mask);
        let high = _mm512_and_si512(_mm512_srli_epi16::<4>(pairs), mask);
        sums[0] = _mm512_dpbusd_epi32(sums[0], low, load(query.0, at));
        sums[1] = _mm512_dpbusd_epi32(sums[1], high, load(query.1, at));
    }
    _mm512_reduce_add_epi32(_mm512_add_epi32(sums[0], sums[1]))
}
