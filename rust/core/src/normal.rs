//! Normal numbers from whole ones, with the same bits on every machine.
//!
//! [`quantile`] is algorithm AS 241, `PPND16` (Wichura, "The percentage points of the normal
//! distribution", Applied Statistics 37, 1988), to about 16 digits. A system's logarithm is free to
//! differ from another's in the last bit, so there is one here, made of the operations that IEEE
//! 754 rounds correctly: sums, products, quotients and roots. Products and sums are never fused.
//!
//! The two branches are apart and have no branches of their own, so that a kernel can take many
//! numbers at once through each. 32 bits do not reach the third branch of the paper, probabilities
//! below `exp(-25)`.
#![allow(clippy::inline_always)] // as in the kernels, which are made of the branches

/// `[numerator, denominator]` of the centre, in `0.180625 - q^2`, from the constant up.
const CENTRE: [[f64; 8]; 2] = [
    [
        3.387_132_872_796_366_5,
        133.141_667_891_784_38,
        1_971.590_950_306_551_3,
        13_731.693_765_509_46,
        45_921.953_931_549_87,
        67_265.770_927_008_7,
        33_430.575_583_588_13,
        2_509.080_928_730_122_7,
    ],
    [
        1.0,
        42.313_330_701_600_91,
        687.187_007_492_057_9,
        5_394.196_021_424_751,
        21_213.794_301_586_597,
        39_307.895_800_092_71,
        28_729.085_735_721_943,
        5_226.495_278_852_854,
    ],
];

/// The same of the tails, in `sqrt(-ln p) - 1.6`.
const TAIL: [[f64; 8]; 2] = [
    [
        1.423_437_110_749_683_5,
        4.630_337_846_156_546,
        5.769_497_221_460_691,
        3.647_848_324_763_204_5,
        1.270_458_252_452_368_4,
        0.241_780_725_177_450_6,
        0.022_723_844_989_269_184,
        7.745_450_142_783_414e-4,
    ],
    [
        1.0,
        2.053_191_626_637_759,
        1.676_384_830_183_803_8,
        0.689_767_334_985_1,
        0.148_103_976_427_480_08,
        0.015_198_666_563_616_457,
        5.475_938_084_995_345e-4,
        1.050_750_071_644_416_9e-9,
    ],
];

/// The normal quantile of `(bits + 0.5) / 2^32`.
///
/// Exactly odd: that of `!bits` is that of `bits` with a minus.
#[must_use]
pub fn quantile(bits: u32) -> f64 {
    if is_tail(bits) { tail(bits) } else { centre(bits) }
}

/// `(bits + 0.5) / 2^32 - 0.5`, exactly.
#[inline(always)]
fn centred(bits: u32) -> f64 {
    // By way of a signed number, which every instruction set converts.
    const UNIT: f64 = 1.0 / 4_294_967_296.0;
    (f64::from((bits ^ 1 << 31).cast_signed()) + 0.5) * UNIT
}

/// Whether `|(bits + 0.5) / 2^32 - 0.5|` is above 0.425: 15 of 100 are.
#[inline(always)]
pub(crate) fn is_tail(bits: u32) -> bool {
    /// The least `bits` of the centre, `ceil(0.075 * 2^32 - 0.5)`; the greatest is its complement.
    const LEAST: u32 = 322_122_547;
    bits.wrapping_sub(LEAST) > !LEAST - LEAST
}

/// [`quantile`] of bits that are not of a tail; of others, some number.
#[inline(always)]
pub(crate) fn centre(bits: u32) -> f64 {
    centre_at(centred(bits))
}

/// [`quantile`] of bits of a tail; of others, some number.
#[inline(always)]
pub(crate) fn tail(bits: u32) -> f64 {
    tail_at(centred(bits))
}

#[inline(always)]
fn centre_at(q: f64) -> f64 {
    let r = 0.180_625 - q * q;
    q * (polynomial(&CENTRE[0], r) / polynomial(&CENTRE[1], r))
}

#[inline(always)]
fn tail_at(q: f64) -> f64 {
    let r = (-logarithm(0.5 - q.abs())).sqrt() - 1.6;
    (polynomial(&TAIL[0], r) / polynomial(&TAIL[1], r)).copysign(q)
}

/// By Horner's rule, from the constant up.
#[inline(always)]
fn polynomial<const N: usize>(coefficients: &[f64; N], at: f64) -> f64 {
    let mut sum = coefficients[N - 1];
    for &coefficient in coefficients[..N - 1].iter().rev() {
        sum = sum * at + coefficient;
    }
    sum
}

/// The natural logarithm of a positive normal number.
///
/// With `x = 2^k (1 + f)`, `1 + f` from `sqrt(1/2)` to `sqrt(2)` and `s = f / (2 + f)`, it is
/// `k ln 2 + 2 atanh(s)`. The first term of `2 atanh(s) = 2 s + 2 s^3/3 + 2 s^5/5 + ...` is
/// `f - s f`, of which `f` is exact.
#[inline(always)]
fn logarithm(x: f64) -> f64 {
    /// The bits of the double nearest to `sqrt(1/2)`.
    const ROOT: u64 = 0x3FE6_A09E_667F_3BCD;
    const ONE: u64 = 0x3FF0_0000_0000_0000;
    const FRACTION: u64 = (1 << 52) - 1;
    /// `ln 2` in two parts; the first has 21 zeros at its end, so its product with `k` is exact.
    const LN_2: [f64; 2] = [0.693_147_180_369_123_8, 1.908_214_929_270_587_8e-10];
    /// `2 / 3, 2 / 5, ...`: `s^2` is below 0.0295, so the next term is below 2^-58 of the first.
    const SERIES: [f64; 10] = {
        let mut series = [0.0; 10];
        let (mut term, mut odd) = (0, 3.0);
        while term < 10 {
            series[term] = 2.0 / odd;
            odd += 2.0;
            term += 1;
        }
        series
    };
    let bits = x.to_bits() + (ONE - ROOT);
    // A whole number below 2^52 is the fraction of 2^52 plus it: few sets can convert 64 bits.
    let k = f64::from_bits(0x4330_0000_0000_0000 | bits >> 52) - (4_503_599_627_370_496.0 + 1023.0);
    let f = f64::from_bits((bits & FRACTION) + ROOT) - 1.0;
    let s = f / (2.0 + f);
    let square = s * s;
    let rest = square * polynomial(&SERIES, square);
    k * LN_2[0] + (f - (s * (f - rest) - k * LN_2[1]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ulp(x: f64) -> f64 {
        x.abs().next_up() - x.abs()
    }

    #[test]
    fn quantiles_are_the_known_ones() {
        // mpmath, 120 digits: sqrt(2) erfinv(2 p - 1) at p = (bits + 1/2) / 2^32.
        let known = [
            (0, -6.337_957_754_553_789_5),
            (1, -6.166_429_517_819_751),
            (2, -6.085_104_545_783_031),
            (41, -5.617_938_339_829_433),
            (1000, -5.039_851_125_968_711_5),
            (123_456, -4.022_887_695_808_419),
            (10_000_000, -2.829_875_428_685_36),
            (321_306_195, -1.440_875_507_633_629_5),
            (322_122_547, -1.439_531_470_445_015_3),
            (322_122_548, -1.439_531_468_800_213_2),
            (1_000_000_000, -0.729_556_553_075_874),
            (0x7FFF_FFFF, -2.918_099_372_916_623e-10),
            (3_000_000_000, 0.520_068_061_848_876_2),
            (0xFFFF_FFFE, 6.166_429_517_819_751),
        ];
        for (bits, expected) in known {
            let found = quantile(bits);
            assert!(((found - expected) / expected).abs() < 2e-15, "{bits}: {found} {expected}");
        }
        // The check values printed with the algorithm.
        assert!((centre_at(0.25 - 0.5) + 0.674_489_750_196_081_7).abs() < 1e-13);
        assert!((tail_at(0.001 - 0.5) + 3.090_232_306_167_814).abs() < 1e-13);
    }

    #[test]
    fn the_branches_meet_where_the_paper_says() {
        for bits in [0, 322_122_546, 322_122_547, 1 << 31, !322_122_547, !322_122_546, u32::MAX] {
            assert_eq!(is_tail(bits), centred(bits).abs() > 0.425, "{bits}");
            assert!((centre(322_122_547) - tail(322_122_547)).abs() < 1e-14);
        }
    }

    #[test]
    fn the_logarithm_of_powers_and_neighbours_of_one() {
        assert_eq!(logarithm(1.0), 0.0);
        for x in [1.0f64.next_up(), 1.0f64.next_down(), 2.0, 0.5, 2f64.powi(-33), f64::MAX] {
            assert!((logarithm(x) - x.ln()).abs() <= 2.0 * ulp(x.ln()), "{x}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        #[test]
        fn quantiles_are_odd_and_rise(bits in any::<u32>(), shift in 0u32..32) {
            let bits = bits >> shift;
            prop_assert_eq!(quantile(bits), -quantile(!bits));
            if let Some(next) = bits.checked_add(1) {
                prop_assert!(quantile(bits) < quantile(next));
            }
            prop_assert_eq!(is_tail(bits), centred(bits).abs() > 0.425);
        }

        #[test]
        fn the_logarithm_is_that_of_the_library(
            bits in 1u64 << 52..2047 << 52, near in 0.5f64..2.0,
        ) {
            for x in [f64::from_bits(bits), near] {
                prop_assert!((logarithm(x) - x.ln()).abs() <= 2.0 * ulp(x.ln()), "{}", x);
            }
        }
    }
}
