//! Rows to codes of few bits and scales.
//!
//! A code stands for a level, and a value is its level times the scale of its row. The levels of 8
//! bits are the whole numbers from -127 to 127; those of 4, 2 and 1 are odd, `2 c - (2^bits - 1)`
//! of code `c`, so that none is wasted.
//!
//! A code is that of the nearest level, so the scale decides it, and the best scale for given codes
//! is `<x, l> / <l, l>` (Lloyd, "Least squares quantization in PCM", IEEE Transactions on
//! Information Theory 28, 1982). How much is lost is no smooth function of the scale: many are
//! tried, and the best is fitted to its codes, and they to it.

use super::encode::not_finite;
use crate::error::Error;
use crate::kernels::InstructionSet;
use crate::stop::Watch;

/// How many scales are tried at least.
const TRIED: f64 = 30.0;
/// The same times the root of the number of values: what a short row loses is less smooth.
const SHORT: f64 = 700.0;
/// How many of them are spread over all that may be the best, where that may be far from the scale
/// of the largest value.
const SPREAD: u32 = 10;
/// How often codes and scale are fitted to each other after that, at most.
const ROUNDS: usize = 3;
/// How far from a level a value may be, in levels, that lies on it but for rounding to f32.
const ON_LEVEL: f64 = 1.0 / (1 << 15) as f64;
/// Values that are looked at before all of a row, for whether they may lie on levels.
const WITNESSES: usize = 8;
/// Norms up to this below the largest f32 leave room to be rounded up.
const ROOM: f64 = 1.0 + 1e-6;

/// Rows as codes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Quantised {
    /// `[n, ceil(dim * bits / 8)]`
    pub packed: Vec<u8>,
    /// `[n]`: what the levels of a row are multiplied with.
    pub scales: Vec<f32>,
    /// `[n]`: `|x - x'| / |x|` of a row `x` that is read as `x'`; 0 for a row of zeros.
    pub errors: Vec<f32>,
}

/// Codes of `bits` bits, 8, 4, 2 or 1, of `rows`, `[n, dim]`.
///
/// The codes of a row lie in `ceil(dim * bits / 8)` bytes, the lowest bits of the first byte first;
/// what is left of the last byte is 0. A code of 8 bits is its level. A row of zeros has scale 0.
/// The squared error is about the least that any scale gives; a row that is levels times a scale
/// comes back. Sums are in one order: the same bits on every machine. O(n · dim) time for rows of
/// 512 values and more, O(n · sqrt(dim)) for shorter ones.
///
/// # Errors
/// [`Error::Shape`] if `rows` does not divide into rows of `dim`; [`Error::Argument`] if `bits` is
/// another number; [`Error::NotFinite`] if a row holds a NaN or an infinity, or its norm exceeds
/// f32; [`Error::Stopped`].
pub fn quantise(
    rows: &[f32],
    dim: usize,
    bits: usize,
    watch: &Watch<'_>,
) -> Result<Quantised, Error> {
    match bits {
        1 => quantised::<1>(rows, dim, watch),
        2 => quantised::<2>(rows, dim, watch),
        4 => quantised::<4>(rows, dim, watch),
        8 => quantised::<8>(rows, dim, watch),
        _ => Err(Error::argument("bits", "1, 2, 4 or 8", bits)),
    }
}

fn quantised<const B: usize>(
    rows: &[f32],
    dim: usize,
    watch: &Watch<'_>,
) -> Result<Quantised, Error> {
    if dim == 0 || !rows.len().is_multiple_of(dim) {
        return Err(Error::shape("rows", format!("[n, {dim}]"), rows.len()));
    }
    let set = InstructionSet::best();
    let count = rows.len() / dim;
    let width = (dim * B).div_ceil(8);
    let mut made = Quantised {
        packed: vec![0; count * width],
        scales: Vec::with_capacity(count),
        errors: Vec::with_capacity(count),
    };
    let mut fitter = Fitter::<B>::new(set, dim);
    for (index, (row, packed)) in
        rows.chunks_exact(dim).zip(made.packed.chunks_exact_mut(width)).enumerate()
    {
        watch.check()?;
        let norm = set.squares(row).sqrt();
        if !((norm * ROOM) as f32).is_finite() {
            return Err(not_finite(row, index, norm));
        }
        let (scale, square) = fitter.fit(row);
        pack::<B>(&fitter.codes, packed);
        made.scales.push(scale);
        made.errors.push(if norm > 0.0 { (square.sqrt() / norm).min(1.0) as f32 } else { 0.0 });
    }
    Ok(made)
}

/// Codes into bytes, the first into the lowest bits.
fn pack<const B: usize>(codes: &[u8], packed: &mut [u8]) {
    let byte_of = |codes: &[u8]| {
        codes.iter().enumerate().fold(0, |byte, (index, &code)| byte | code << (index * B))
    };
    let whole = codes.chunks_exact(8 / B);
    let rest = whole.remainder();
    for (byte, codes) in packed.iter_mut().zip(whole) {
        *byte = byte_of(codes);
    }
    if let (false, Some(byte)) = (rest.is_empty(), packed.last_mut()) {
        *byte = byte_of(rest);
    }
}

/// Finds scales of rows.
struct Fitter<const B: usize> {
    set: InstructionSet,
    /// Of the row's values, as shares of the largest; where a level is 0, of those that are not.
    sizes: Vec<f32>,
    codes: Vec<u8>,
    spare: Vec<u8>,
}

/// What the codes of a scale lose with the scale that fits them best, and that one.
#[derive(Clone, Copy)]
struct Tried {
    lost: f64,
    fitted: f64,
}

impl<const B: usize> Fitter<B> {
    /// The largest level.
    const TOP: f64 = if B == 8 { 127.0 } else { ((1u32 << B) - 1) as f64 };
    /// From a level to the next.
    const GAP: f64 = if B == 8 { 1.0 } else { 2.0 };
    /// The smallest level that is not negative.
    const FIRST: f64 = if B == 8 { 0.0 } else { 1.0 };
    fn new(set: InstructionSet, dim: usize) -> Self {
        Self { set, sizes: Vec::with_capacity(dim), codes: vec![0; dim], spare: vec![0; dim] }
    }

    /// The best scale of a finite row, and its squared error; its codes are left in `codes`.
    fn fit(&mut self, row: &[f32]) -> (f32, f64) {
        let largest = f64::from(self.set.largest(row));
        if largest == 0.0 {
            return (0.0, self.code(row, 0.0));
        }
        let inverse = largest.recip();
        let sizes = row.iter().map(|&value| (f64::from(value.abs()) * inverse) as f32);
        self.sizes.clear();
        self.sizes.extend(sizes.filter(|&size| size > 0.0 || B < 8));
        let mut best = match self.on_levels() {
            Some(scale) => self.tried(scale),
            None if B == 1 => self.tried(1.0), // all scales have the same codes
            None => self.best_of_many(),
        };
        for _ in 0..ROUNDS {
            let next = self.tried(best.fitted as f32);
            if next.lost >= best.lost {
                break;
            }
            best = next;
        }
        let scale = (best.fitted * largest) as f32;
        let mut found = (scale, self.code(row, scale));
        if scale < f32::MIN_POSITIVE {
            // Few digits are left, and a neighbour can be better.
            for other in [scale.next_down().max(0.0), scale.next_up()] {
                std::mem::swap(&mut self.codes, &mut self.spare);
                let square = self.code(row, other);
                if square < found.1 {
                    found = (other, square);
                } else {
                    std::mem::swap(&mut self.codes, &mut self.spare);
                }
            }
        }
        found
    }

    /// Codes a row at a scale; the squared error.
    fn code(&mut self, row: &[f32], scale: f32) -> f64 {
        if scale > 0.0 {
            return self.set.level_codes::<B>(row, f64::from(scale), &mut self.codes);
        }
        // Every value is 0 then, whatever its code.
        self.set.level_codes::<B>(row, f64::from(f32::MAX), &mut self.codes);
        self.set.squares(row)
    }

    fn tried(&self, scale: f32) -> Tried {
        let [lost, along, square] = self.set.fit_levels::<B>(&self.sizes, scale);
        if square == 0.0 {
            return Tried { lost: f64::INFINITY, fitted: f64::from(scale) };
        }
        let change = along / square;
        Tried { lost: lost - along * change, fitted: f64::from(scale) + change }
    }

    /// The largest scale of which all sizes are levels, if there is one.
    fn on_levels(&self) -> Option<f32> {
        let off = |size: f32, top: f64| {
            let index = (f64::from(size) * top - Self::FIRST) / Self::GAP;
            (index - f64::from((index + 0.5) as i32)).abs() > ON_LEVEL
        };
        let mut witnesses = [1.0; WITNESSES];
        for (witness, &size) in
            witnesses.iter_mut().zip(self.sizes.iter().filter(|&&size| size < 1.0))
        {
            *witness = size;
        }
        let mut top = 1.0;
        while top <= Self::TOP {
            let on = |sizes: &[f32]| !sizes.iter().any(|&size| off(size, top));
            if on(&witnesses) && on(&self.sizes) {
                return Some(top.recip() as f32);
            }
            top += Self::GAP;
        }
        None
    }

    /// The best of many scales, first of all that may be it, then of those near the best.
    fn best_of_many(&self) -> Tried {
        let values = self.sizes.len() as f64;
        #[allow(clippy::cast_sign_loss)] // both are positive
        let count = (SHORT / values.sqrt()).max(TRIED) as u32;
        let near = (count - SPREAD) / 3;
        let stages = if B == 8 { &[count][..] } else { &[SPREAD, 2 * near, near] };
        let [mut low, mut high] = Self::window(values).map(f32::to_bits);
        let mut at = (Self::TOP.recip() as f32).to_bits();
        let mut best = self.tried(f32::from_bits(at));
        for &count in stages {
            let gap = ((high - low) / (count + 1)).max(1);
            for step in 1..=count {
                // Equal differences of bits are about equal ratios.
                let bits = low + step * gap;
                let tried = self.tried(f32::from_bits(bits));
                if tried.lost < best.lost {
                    (best, at) = (tried, bits);
                }
            }
            (low, high) = (at - gap, at + gap);
        }
        best
    }

    /// Between which scales the best one lies, as shares of the largest of so many values.
    ///
    /// Below some scale, what is lost of the values beyond the last level grows faster than what is
    /// won of the others, of which each loses at most half a gap. The rest is room for chance: the
    /// loss of few values varies more.
    fn window(values: f64) -> [f32; 2] {
        let root = values.sqrt();
        let [low, high] = if B == 8 {
            let low = (1.0 - 0.004 * root.sqrt()) / (Self::TOP + values / (12.0 * Self::TOP));
            [low, (1.0 + root.recip().min(0.5)) / Self::TOP]
        } else {
            [0.8 / (Self::TOP + values / Self::TOP), 0.5]
        };
        [low as f32, high as f32]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn quantise(rows: &[f32], dim: usize, bits: usize) -> (Vec<u8>, Vec<f32>, Vec<f32>) {
        let made = super::quantise(rows, dim, bits, &Watch::none()).unwrap();
        (made.packed, made.scales, made.errors)
    }

    /// The level of the code at an index of a packed row.
    fn level(packed: &[u8], index: usize, bits: usize) -> f32 {
        if bits == 8 {
            return f32::from(packed[index].cast_signed());
        }
        let (at, top) = (index * bits, (1 << bits) - 1);
        f32::from(2 * i16::from(packed[at / 8] >> (at % 8) & top) - i16::from(top))
    }

    proptest! {
        #[test]
        fn rows_on_levels_come_back(
            drawn in prop::collection::vec(any::<u8>(), 1..80), limit in 1u8..128,
            scale in 1e-30f32..1e30, exponent in 0usize..4,
        ) {
            let bits = 1 << exponent;
            let levels: Vec<f32> = drawn
                .iter()
                .map(|&drawn| match bits {
                    8 => f32::from(drawn % limit) * if drawn & 128 > 0 { -1.0 } else { 1.0 },
                    _ => f32::from(2 * i16::from(drawn % (1 << bits)) + 1 - (1 << bits)),
                })
                .collect();
            let row: Vec<f32> = levels.iter().map(|level| level * scale).collect();
            let (packed, scales, errors) = quantise(&row, row.len(), bits);
            prop_assert!(errors[0] <= 1e-6);
            for (index, value) in row.iter().enumerate() {
                let back = level(&packed, index, bits) * scales[0];
                prop_assert!((back - value).abs() <= 1e-6 * value.abs());
            }
        }

        #[test]
        fn errors_are_those_of_the_rows_that_are_read(
            rows in prop::collection::vec(-1f32..1.0, 24..60), exponent in -40i32..35,
            bits in 0usize..4,
        ) {
            let (dim, bits) = (12, 1 << bits);
            let rows: Vec<f32> = rows[..rows.len() / dim * dim]
                .iter()
                .map(|value| value * 10f32.powi(exponent / 2) * 10f32.powi(exponent - exponent / 2))
                .collect();
            let (packed, scales, errors) = quantise(&rows, dim, bits);
            for (index, (row, packed)) in
                rows.chunks(dim).zip(packed.chunks((dim * bits).div_ceil(8))).enumerate()
            {
                let (mut lost, mut square) = (0.0, 0.0);
                for (at, &value) in row.iter().enumerate() {
                    let back = f64::from(level(packed, at, bits)) * f64::from(scales[index]);
                    lost += (f64::from(value) - back).powi(2);
                    square += f64::from(value).powi(2);
                }
                let error = if square > 0.0 { (lost / square).sqrt() } else { 0.0 };
                prop_assert!((f64::from(errors[index]) - error).abs() <= 1e-6);
                prop_assert!(error <= 1.0);
            }
        }
    }

    #[test]
    fn codes_lie_in_bytes_with_the_lowest_bits_first() {
        assert_eq!(quantise(&[1.0, -127.0, 0.0], 3, 8).0, [1, 129, 0]);
        assert_eq!(quantise(&[-15.0, 15.0, 1.0], 3, 4).0, [0xF0, 0x08]);
        assert_eq!(quantise(&[-3.0, -1.0, 1.0, 3.0, 1.0], 5, 2).0, [0b11_10_01_00, 0b10]);
        let signs = [1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 1.0, -1.0, 1.0];
        assert_eq!(quantise(&signs, 10, 1).0, [0b1000_0011, 0b10]);
    }

    #[test]
    fn a_row_of_zeros_has_scale_zero() {
        for bits in [1, 2, 4, 8] {
            let (_, scales, errors) = quantise(&[0.0, -0.0, 0.0, 2.0, 2.0, 2.0], 3, bits);
            assert_eq!((scales[0], errors[0]), (0.0, 0.0));
            assert_eq!(errors[1], 0.0);
        }
    }

    #[test]
    fn values_near_the_smallest_keep_what_the_scale_can_hold() {
        let least = f32::from_bits(1);
        let row: Vec<f32> = (-127..128).map(|level| level as f32 * least).collect();
        let (packed, scales, errors) = quantise(&row, row.len(), 8);
        assert_eq!((scales[0], errors[0]), (least, 0.0));
        assert!(
            packed
                .iter()
                .zip(-127..128)
                .all(|(code, level)| i32::from(code.cast_signed()) == level)
        );
        // No scale of half the smallest number exists: next to it nothing is the better choice.
        let (_, scales, errors) = quantise(&[least, 0.0, 0.0, 0.0], 4, 4);
        assert_eq!((scales[0], errors[0]), (0.0, 1.0));
    }

    #[test]
    fn what_is_not_finite_or_of_another_shape_is_refused() {
        for row in [[1.0, f32::NAN], [f32::INFINITY, 0.0], [f32::MAX, f32::MAX], [f32::MAX, 0.0]] {
            for bits in [1, 8] {
                let found = super::quantise(&row, 2, bits, &Watch::none());
                assert!(matches!(found, Err(Error::NotFinite { .. })));
            }
        }
        assert!(super::quantise(&[1.0; 3], 2, 4, &Watch::none()).is_err());
        assert!(super::quantise(&[1.0; 3], 0, 4, &Watch::none()).is_err());
        assert!(super::quantise(&[1.0; 3], 3, 3, &Watch::none()).is_err());
    }
}
