//! The orthogonal map before rows become codes: inner products stay, coordinates get alike.
//!
//! First, where a basis is given, rows are reflected so that its directions become the first
//! coordinates: those that hold most of the rows' energy. Then the coordinates are cut into
//! segments, and each is rotated in itself by random signs and Walsh-Hadamard transforms, after
//! which its coordinates are of one size, and one scale serves them all (Ailon and Chazelle, "The
//! fast Johnson-Lindenstrauss transform", 2009). All in f64, whose rounding is below what bounds
//! count.

use crate::error::Error;
use crate::kernels::InstructionSet;
use crate::random;

/// Coordinates of a segment are a multiple of this.
pub const UNIT: usize = 64;
/// The longest segment, whose sums of products of codes fit 32 bits.
pub const MAX_SEGMENT: usize = 8192;
/// The most segments.
pub const MAX_SEGMENTS: usize = 1 << 16;

/// An orthogonal map of vectors of some length to vectors of at least that length.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotation {
    length: usize,
    segments: Vec<usize>,
    /// `[directions, length]`: what is reflected, one after the other, and twice the inverse
    /// squared length of each.
    directions: Vec<f64>,
    factors: Vec<f64>,
    seed: u64,
}

impl Rotation {
    /// The map of vectors of `length`, whose first coordinates, as many as `prefix` says in all,
    /// are segments of their own; `directions` are reflected first, `[directions, length]`.
    ///
    /// # Errors
    /// [`Error::Argument`] if `length` is 0 or needs too many segments, or `prefix` is not made of
    /// multiples of [`UNIT`] up to [`MAX_SEGMENT`] that leave at least one coordinate;
    /// [`Error::Shape`] if `directions` are not whole; [`Error::NotFinite`] if one of them is not
    /// finite, or zero.
    pub fn new(
        length: usize,
        prefix: &[usize],
        directions: &[f64],
        seed: u64,
    ) -> Result<Self, Error> {
        if length == 0 || length / MAX_SEGMENT > MAX_SEGMENTS / 2 {
            let must = format!("from 1 to {}", MAX_SEGMENT * (MAX_SEGMENTS / 2));
            return Err(Error::argument("length", must, length));
        }
        let mut left = length;
        for &segment in prefix {
            if segment == 0
                || !segment.is_multiple_of(UNIT)
                || segment > MAX_SEGMENT
                || segment >= left
            {
                let must =
                    format!("multiples of {UNIT} up to {MAX_SEGMENT}, below {length} in all");
                return Err(Error::argument("prefix", must, format!("{prefix:?}")));
            }
            left -= segment;
        }
        let mut segments = prefix.to_vec();
        let rest = left.next_multiple_of(UNIT);
        let parts = rest.div_ceil(MAX_SEGMENT);
        // Of one size, but for a unit.
        segments.extend((0..parts).map(|part| {
            let end = |part: usize| rest / UNIT * part / parts * UNIT;
            end(part + 1) - end(part)
        }));
        if !directions.len().is_multiple_of(length) {
            let must = format!("[directions, {length}]");
            return Err(Error::shape("directions", must, directions.len()));
        }
        let mut factors = Vec::with_capacity(directions.len() / length);
        for (index, direction) in directions.chunks_exact(length).enumerate() {
            let square: f64 = direction.iter().map(|value| value * value).sum();
            let factor = 2.0 / square;
            if !factor.is_finite() || factor == 0.0 {
                let place = format!("the squared length of direction {index}");
                return Err(Error::NotFinite { argument: "directions", place, value: square });
            }
            factors.push(factor);
        }
        Ok(Self { length, segments, directions: directions.to_vec(), factors, seed })
    }

    /// The length of what is mapped.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// The lengths of the segments of what comes out.
    #[must_use]
    pub fn segments(&self) -> &[usize] {
        &self.segments
    }

    /// `[directions, length]`: what is reflected first.
    #[must_use]
    pub fn directions(&self) -> &[f64] {
        &self.directions
    }

    /// Of the random signs.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Bytes it takes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        8 * (self.directions.len() + self.factors.len()) + 8 * self.segments.len()
    }

    /// Maps `values` in place: a vector, followed by zeros up to the length of what comes out.
    ///
    /// O(length · (directions + log length)).
    pub fn apply(&self, values: &mut [f64]) {
        let set = InstructionSet::best();
        let vector = &mut values[..self.length];
        for (direction, &factor) in self.directions.chunks_exact(self.length).zip(&self.factors) {
            set.reflect(direction, factor, vector);
        }
        let mut rest = values;
        for (index, &segment) in self.segments.iter().enumerate() {
            let (here, after) = rest.split_at_mut(segment);
            let key = random::parameter_key(self.seed, "rotation", &[index as u64]);
            // Powers of two from both ends, which meet; twice, where they do not cover each other.
            let block = 1 << segment.ilog2();
            let rounds = if block == segment { 1 } else { 2 };
            for round in 0..rounds {
                turn_signs(key, round, here);
                for start in [0, segment - block].into_iter().take(rounds) {
                    let block = &mut here[start..start + block];
                    set.butterflies(block);
                    let factor = (block.len() as f64).sqrt().recip();
                    for value in block {
                        *value *= factor;
                    }
                }
            }
            rest = after;
        }
    }
}

/// Turns the signs that the stream of `key` has set: bit `i mod 64` of value
/// `round 2^32 + i / 64` for value `i`.
fn turn_signs(key: u64, round: usize, values: &mut [f64]) {
    for (word, values) in values.chunks_mut(64).enumerate() {
        let bits = random::value(key, (round as u64) << 32 | word as u64);
        for (lane, value) in values.iter_mut().enumerate() {
            *value = f64::from_bits(value.to_bits() ^ (bits >> lane) << 63);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(x, y)| x * y).sum()
    }

    proptest! {
        #[test]
        fn inner_products_stay(
            length in 1usize..700, segments in 0usize..3, count in 0usize..4, seed in any::<u64>(),
        ) {
            let random = |stream: u64, n: usize| -> Vec<f64> {
                (0..n).map(|i| (random::value(seed ^ stream, i as u64) >> 11) as f64 / 2f64.powi(52) - 1.0)
                    .collect()
            };
            let segments = segments.min((length - 1) / UNIT);
            let directions = random(1, count * length);
            let rotation = Rotation::new(length, &vec![UNIT; segments], &directions, seed).unwrap();
            let size: usize = rotation.segments().iter().sum();
            prop_assert!(size >= length && size < length + UNIT);
            let (left, right) = (random(2, length), random(3, length));
            let mut mapped = [left.clone(), right.clone()];
            for values in &mut mapped {
                values.resize(size, 0.0);
                rotation.apply(values);
            }
            let error = (dot(&mapped[0], &mapped[1]) - dot(&left, &right)).abs();
            prop_assert!(error <= 1e-12 * (length as f64));
        }
    }

    #[test]
    fn reflections_bring_a_basis_to_the_front() {
        // The direction that takes the unit vector along (3, 4, 0, ...) to the first axis.
        let mut vector = vec![0.0; 200];
        (vector[0], vector[1]) = (0.6, 0.8);
        let mut direction = vector.clone();
        direction[0] -= 1.0;
        let rotation = Rotation::new(200, &[UNIT], &direction, 5).unwrap();
        vector.resize(256, 0.0);
        rotation.apply(&mut vector);
        assert!((dot(&vector[..UNIT], &vector[..UNIT]) - 1.0).abs() < 1e-12);
        assert!(dot(&vector[UNIT..], &vector[UNIT..]) < 1e-24);
    }

    #[test]
    fn what_makes_no_rotation_is_refused() {
        for (length, prefix, directions) in [
            (0, vec![], vec![]),
            (usize::MAX, vec![], vec![]),
            (100, vec![0], vec![]),
            (100, vec![32], vec![]),
            (64, vec![64], vec![]),
            (3, vec![], vec![1.0, 2.0]),
            (2, vec![], vec![0.0, 0.0]),
            (2, vec![], vec![f64::NAN, 0.0]),
        ] {
            assert!(Rotation::new(length, &prefix, &directions, 0).is_err());
        }
    }
}
