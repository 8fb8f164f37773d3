//! Roots of unity and Fourier transforms of a power of two of values, for cyclic convolutions.
//!
//! The square of `x + i y` has the imaginary part `2 x y`, also where products are cyclic
//! convolutions: so one complex transform of two real sequences, squared value by value, is all
//! that a convolution needs on the way there, and a sum of convolutions takes one way back.
//! (Cooley and Tukey, "An algorithm for the machine calculation of complex Fourier series", 1965;
//! the form with one root a block is described by Bernstein, "Multidigit multiplication for
//! mathematicians", 2001.)
//!
//! Roots come by halving angles in f64, with operations of which IEEE 754 leaves no bit open, and
//! are rounded to f32: they are the same on every machine, as those of `sin` and `cos` are not.

use std::sync::OnceLock;

use crate::kernels::{InstructionSet, LANES, LeafTurns, Turn};

/// The fewest values of a transform.
const SHORTEST: usize = LANES * LANES;
/// Lengths from the shortest on, each twice the one before, that there are plans for.
const LENGTHS: usize = 14;
/// The most values of a transform.
pub(super) const LONGEST: usize = SHORTEST << (LENGTHS - 1);

/// What all transforms of one length share.
pub(super) struct Fourier {
    length: usize,
    turns: Vec<Turn>,
    leaves: Vec<LeafTurns>,
}

/// Complex values: the real parts, and the imaginary ones.
#[derive(Clone, Debug, Default)]
pub(super) struct Values {
    pub(super) real: Vec<f32>,
    pub(super) imaginary: Vec<f32>,
}

impl Values {
    /// Makes them `length` zeros.
    pub(super) fn clear(&mut self, length: usize) {
        for part in [&mut self.real, &mut self.imaginary] {
            part.clear();
            part.resize(length, 0.0);
        }
    }

    fn parts(&mut self) -> [&mut [f32]; 2] {
        [&mut self.real, &mut self.imaginary]
    }
}

impl Fourier {
    /// The transform of at least `length` values, of the lengths there are, of which the longest
    /// is [`LONGEST`].
    pub(super) fn of(length: usize) -> &'static Self {
        static PLANS: [OnceLock<Fourier>; LENGTHS] = [const { OnceLock::new() }; LENGTHS];
        let length = length.clamp(SHORTEST, LONGEST).next_power_of_two();
        let index = (length / SHORTEST).ilog2() as usize;
        PLANS[index].get_or_init(|| Self::new(length))
    }

    fn new(length: usize) -> Self {
        // Root k is exp(2 pi i r) for the r below 1 whose binary digits are those of k in reverse:
        // that of 2k is half as far around, and that of 2k + 1 lies across.
        let mut roots = vec![(1.0, 0.0)];
        for index in 1..length / 4 {
            let across = |(x, y): (f64, f64)| (-x, -y);
            let even = index.is_multiple_of(2);
            roots.push(if even { half(roots[index / 2]) } else { across(roots[index - 1]) });
        }
        let turns: Vec<Turn> = roots.iter().map(|&root| turn(root)).collect();
        let leaves = (0..length / SHORTEST).map(|leaf| {
            let mut rows: LeafTurns = [[0.0; LANES]; 30];
            for lane in 0..LANES {
                let block = leaf * LANES + lane;
                let here = [turns[block]];
                let inner = &turns[4 * block..4 * block + 4];
                for (row, part) in rows.iter_mut().zip(here.iter().chain(inner).flatten()) {
                    row[lane] = *part;
                }
            }
            rows
        });
        let leaves = leaves.collect();
        Self { length, turns: turns[..length / 64].to_vec(), leaves }
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// Adds to `sum` the square of each value of the transform of `values`, which is overwritten.
    pub(super) fn add_square(&self, set: InstructionSet, values: &mut Values, sum: &mut Values) {
        set.add_squared_transform(&self.turns, &self.leaves, values.parts(), sum.parts());
    }

    /// Replaces a sum of squares, made by `set` too, by what it is the transform of, times the
    /// length.
    pub(super) fn back(&self, set: InstructionSet, sum: &mut Values) {
        set.transform_back(&self.turns, &self.leaves, sum.parts());
    }
}

/// The number of length 1 half as far around, from 0 to below 1/2 turn, as `(x, y)` is from 0 to
/// below 1.
fn half((x, y): (f64, f64)) -> (f64, f64) {
    // The larger part by a root, the other by a quotient: neither loses digits.
    if x < 0.0 {
        let high = (0.5 - x / 2.0).sqrt();
        (y / (2.0 * high), high)
    } else {
        let wide = (0.5 + x / 2.0).sqrt();
        let wide = if y < 0.0 { -wide } else { wide };
        (wide, y / (2.0 * wide))
    }
}

/// The turn a quarter as far around as `root`.
fn turn(root: (f64, f64)) -> Turn {
    let square = half(root);
    let once = half(square);
    let cube = (once.0 * square.0 - once.1 * square.1, once.0 * square.1 + once.1 * square.0);
    [once.0, once.1, square.0, square.1, cube.0, cube.1].map(|part| part as f32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    fn random_values(seed: u64, length: usize) -> Vec<f32> {
        let bits = |i| (random::value(seed, i as u64) >> 40) as f32;
        (0..length).map(|i| bits(i) / 8_388_608.0 - 1.0).collect()
    }

    /// The imaginary part of the cyclic square of `x + i y`, by the transform.
    fn doubled(set: InstructionSet, x: &[f32], y: &[f32]) -> Vec<f64> {
        let plan = Fourier::of(x.len());
        let mut values = Values { real: x.to_vec(), imaginary: y.to_vec() };
        let mut sum = Values::default();
        sum.clear(plan.length());
        plan.add_square(set, &mut values, &mut sum);
        plan.back(set, &mut sum);
        sum.imaginary.iter().map(|&value| f64::from(value) / x.len() as f64).collect()
    }

    #[test]
    fn turns_are_the_roots_of_unity_rounded() {
        let plan = Fourier::new(1 << 14);
        for (index, turn) in plan.turns.iter().enumerate() {
            let reversed = (index as u64).reverse_bits() as f64 / 2f64.powi(64);
            for power in 1..=3 {
                let angle = std::f64::consts::TAU * reversed / 4.0 * power as f64;
                let [x, y] = [turn[2 * power - 2], turn[2 * power - 1]].map(f64::from);
                assert!((x - angle.cos()).abs() < 6.1e-8 && (y - angle.sin()).abs() < 6.1e-8);
            }
        }
    }

    #[test]
    fn the_square_is_that_of_cyclic_convolution_in_every_set() {
        for length in [256, 512, 1024, 2048, 4096] {
            let (x, y) = (random_values(1, length), random_values(2, length));
            let mut expected = vec![0.0; length];
            for (i, x) in x.iter().enumerate() {
                for (j, y) in y.iter().enumerate() {
                    expected[(i + j) % length] += 2.0 * f64::from(*x) * f64::from(*y);
                }
            }
            let scalar = doubled(InstructionSet::SCALAR, &x, &y);
            for (found, expected) in scalar.iter().zip(expected) {
                // Values of size |x|^2 + |y|^2 = 2/3 length, log2(length) roundings of them.
                let bound = 6e-8 * length as f64 * f64::from(length.ilog2());
                assert!((found - expected).abs() < bound, "{found} {expected}");
            }
            for set in InstructionSet::available() {
                assert_eq!(doubled(set, &x, &y), scalar);
            }
        }
    }
}
