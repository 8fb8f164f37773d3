//! Rows as codes of 4 bits, and 4 more, with what they lose bounded.
//!
//! A row is rotated, and each segment of it divided by a scale of its own into whole numbers from 0
//! to 255: `value = scale (code - 127.5)`. The upper four bits of all codes of a segment lie
//! together, in a plane, and the lower four in another: the upper plane alone is a code with steps
//! 16 times as wide, `16 scale (upper - 7.5)`. Beside them stand the norms of what either loses, and
//! of what comes after the segment: by Cauchy and Schwarz they bound how far a product with codes is
//! from that with the row. Rows are in falling order of their norms, and each block knows the largest
//! norm from it on: where that times the query's is too little, the search ends.
//!
//! Where the upper plane is all there is, its scale is such that the product of a row with its code
//! is that of the row with itself: what is lost is then at a right angle to the row, and the estimates
//! of rows that are nearly alike keep their order (as in `RaBitQ`; Gao and Long, SIGMOD 2024).
//!
//! Bounds are rounded up, to 16 bits.

use std::sync::Mutex;

use half::bf16;

use super::Rows;
use super::rotation::{Rotation, UNIT};
use super::rows::{Digest, check_numbers, hashed, number};
use crate::error::Error;
use crate::kernels::Lines;
use crate::memory::{self, joined};
use crate::order;
use crate::parallel::share;
use crate::stop::{Asker, Watch};
use crate::store::Cursor;

/// Rows that are looked at together.
pub const BLOCK: usize = 128;
/// The most rows: their numbers have 32 bits.
pub const MAX_ROWS: usize = u32::MAX as usize;

/// How many bits of a code are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    /// The upper plane alone.
    Four,
    /// Both planes.
    Eight,
}

/// One segment of all rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Segment {
    /// Bytes of a row in a plane: half as many as the segment has coordinates.
    pub width: usize,
    /// `[rows, width]`: byte `32 g + j` has coordinates `64 g + j` and, in its upper half,
    /// `64 g + 32 + j`.
    pub upper: Lines,
    /// The same of the lower four bits; empty if they are not kept.
    pub lower: Vec<u8>,
    /// `[rows]`
    pub scales: Vec<f32>,
    /// `[rows]`: the norm of what the upper plane alone loses.
    pub upper_errors: Vec<bf16>,
    /// `[rows]`: the norm of what both planes lose; empty if there is one.
    pub errors: Vec<bf16>,
    /// `[rows]`: the norm of all segments after this; empty for the last.
    pub tails: Vec<bf16>,
}

/// The codes of the rows of all examples, in falling order of their norms.
#[derive(Clone, Debug, PartialEq)]
pub struct Codes {
    rotation: Rotation,
    /// How often each checkpoint counts.
    weights: Vec<f32>,
    /// The example at each place.
    order: Vec<u32>,
    segments: Vec<Segment>,
    /// For each block: the largest norm of a row in it, or of its codes.
    reaches: Vec<f32>,
    /// Of the rows that they are of.
    digest: Digest,
}

/// The next number of 16 bits that is not below a number that is not negative; NaN of any NaN.
fn up(value: f64) -> bf16 {
    if value.is_nan() {
        return bf16::NAN; // whose bits, whatever they are, must not be rounded to those of 0
    }
    let bits = up_f32(value).to_bits();
    bf16::from_bits(((bits + 0xFFFF) >> 16) as u16)
}

/// The next f32 that is not below.
pub(super) fn up_f32(value: f64) -> f32 {
    let nearest = value as f32;
    if f64::from(nearest) < value { nearest.next_up() } else { nearest }
}

/// A row as it is coded, before it gets its place.
struct Coder {
    bits: Bits,
    /// By segment: planes, and scale, errors and tail.
    upper: Vec<Vec<u8>>,
    lower: Vec<Vec<u8>>,
    numbers: Vec<(f32, [bf16; 3])>,
    /// The largest norm of the row or of its codes.
    reach: f32,
}

impl Coder {
    fn new(rotation: &Rotation, bits: Bits) -> Self {
        let planes = || rotation.segments().iter().map(|&segment| vec![0; segment / 2]).collect();
        Self {
            bits,
            upper: planes(),
            lower: planes(),
            numbers: vec![(0.0, [bf16::ZERO; 3]); rotation.segments().len()],
            reach: 0.0,
        }
    }

    /// Codes a rotated row, in segments.
    fn encode(&mut self, values: &[f64]) {
        let mut norms = [squares(values), 0.0, 0.0];
        let mut rest = values;
        for (index, (upper, lower)) in self.upper.iter_mut().zip(&mut self.lower).enumerate() {
            let (here, after) = rest.split_at(2 * upper.len());
            rest = after;
            let mut step = f64::from(up_f32(largest(here) / 127.5));
            let inverse = if step > 0.0 { step.recip() } else { 0.0 };
            let (mut along, mut square) = (0.0, 0.0);
            for (values, (upper, lower)) in here
                .chunks_exact(UNIT)
                .zip(upper.chunks_exact_mut(UNIT / 2).zip(lower.chunks_exact_mut(UNIT / 2)))
            {
                let mut codes = [0u8; UNIT];
                for (code, &value) in codes.iter_mut().zip(values) {
                    #[allow(clippy::cast_sign_loss)] // clamped; what is no number becomes 0
                    let nearest = (value * inverse + 128.0).clamp(0.0, 255.0) as u8;
                    *code = nearest;
                    along += value * 16.0 * (f64::from(nearest >> 4) - 7.5);
                    square += value * value;
                }
                let (first, second) = codes.split_at(UNIT / 2);
                for (byte, (a, b)) in upper.iter_mut().zip(first.iter().zip(second)) {
                    *byte = a >> 4 | (b & 0xF0);
                }
                for (byte, (a, b)) in lower.iter_mut().zip(first.iter().zip(second)) {
                    *byte = (a & 15) | b << 4;
                }
            }
            if self.bits == Bits::Four && along > 0.0 {
                let fitting = square / along;
                // Of numbers near the smallest there are the quotient can be anything.
                if fitting < 2.0 * step {
                    step = f64::from(fitting as f32);
                }
            }
            let mut errors = [0.0; 2];
            for (values, (upper, lower)) in here
                .chunks_exact(UNIT)
                .zip(upper.chunks_exact(UNIT / 2).zip(lower.chunks_exact(UNIT / 2)))
            {
                for (index, &value) in values.iter().enumerate() {
                    let shift = if index < UNIT / 2 { 0 } else { 4 };
                    let half = |plane: &[u8]| plane[index % (UNIT / 2)] >> shift & 15;
                    let (upper, lower) = (half(upper), half(lower));
                    let coded = [
                        16.0 * step * (f64::from(upper) - 7.5),
                        step * (f64::from(16 * upper + lower) - 127.5),
                    ];
                    for ((error, norm), coded) in errors.iter_mut().zip(&mut norms[1..]).zip(coded)
                    {
                        *error += (value - coded) * (value - coded);
                        *norm += coded * coded;
                    }
                }
            }
            let tail = squares(after);
            let [upper_error, error] = errors.map(|square| up(rounded_up(square).sqrt()));
            let bounds = [upper_error, error, up(rounded_up(tail).sqrt())];
            self.numbers[index] = (step as f32, bounds);
        }
        let kept = if self.bits == Bits::Eight { 3 } else { 2 };
        let norm = norms[..kept].iter().fold(0f64, |largest, &norm| largest.max(norm));
        self.reach = up_f32(rounded_up(norm).sqrt());
    }
}

/// The nearest whole number to one that is small, of two the even one. Without a call, unlike
/// `f64::round`: what is added leaves no room for less than a whole.
fn rounded(value: f64) -> f64 {
    const ROOM: f64 = 1.5 / f64::EPSILON;
    (value + ROOM) - ROOM
}

/// Sums that are added up side by side, so that none waits for the other.
const SUMS: usize = 8;

/// The sum of the squares.
fn squares(values: &[f64]) -> f64 {
    let (whole, rest) = values.as_chunks::<SUMS>();
    let mut sums = [0.0; SUMS];
    for values in whole {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += value * value;
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|value| value * value).sum::<f64>()
}

/// The largest size of a value.
fn largest(values: &[f64]) -> f64 {
    let (whole, rest) = values.as_chunks::<SUMS>();
    let mut sizes = [0f64; SUMS];
    for values in whole {
        for (size, value) in sizes.iter_mut().zip(values) {
            *size = size.max(value.abs());
        }
    }
    sizes.iter().chain(rest).fold(0.0, |largest, value| largest.max(value.abs()))
}

/// A sum of squares of f64, and what rounding may have taken from it.
pub(super) fn rounded_up(sum: f64) -> f64 {
    sum * (1.0 + 1e-9)
}

impl Codes {
    /// The codes of examples.
    ///
    /// Row `numbers[c * examples + i]` is that of example `i` at checkpoint `c` (row `i` if there are
    /// no numbers), and counts
    /// `weights[c]` times; `norms` are about those of the examples, whose order they decide. Reads
    /// the rows once, in order; O(examples · length of the rotation · log) time.
    ///
    /// # Errors
    /// [`Error::Shape`] if the arrays do not fit together; [`Error::NotFinite`] if the norm of an
    /// example is not a number of 32 bits; [`Error::Io`]; [`Error::Stopped`].
    pub fn new(
        rows: &Rows,
        numbers: &[u64],
        weights: &[f32],
        norms: &[f32],
        rotation: Rotation,
        bits: Bits,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Self, Error> {
        let (examples, dim) = (norms.len(), rows.dim());
        if examples > MAX_ROWS {
            return Err(Error::shape("norms", format!("at most {MAX_ROWS}"), examples));
        }
        check_numbers("numbers", numbers, weights.len(), examples)?;
        check_weights(weights)?;
        if weights.len().checked_mul(dim) != Some(rotation.length()) {
            let must = format!("{} x {dim} long", weights.len());
            return Err(Error::shape("rotation", must, rotation.length()));
        }
        let watch = &Watch::of(asker);
        let mut order: Vec<u32> = (0..examples as u32).collect();
        order::sort(&mut order, watch, |&a, &b| {
            norms[b as usize].total_cmp(&norms[a as usize]).then(a.cmp(&b))
        })?;
        let mut places = vec![0u32; examples];
        let mut steps = watch.steps();
        for (place, &example) in order.iter().enumerate() {
            steps.add(5)?;
            places[example as usize] = place as u32;
        }
        let last = rotation.segments().len() - 1;
        let segments = rotation.segments().iter().enumerate().map(|(index, &segment)| {
            let width = segment / 2;
            let two = if bits == Bits::Eight { examples } else { 0 };
            Ok(Segment {
                width,
                upper: Lines::zeros(examples * width, watch)?,
                lower: memory::filled(two * width, 0, watch)?,
                scales: vec![0.0; examples],
                upper_errors: vec![bf16::ZERO; examples],
                errors: vec![bf16::ZERO; two],
                tails: vec![bf16::ZERO; if index < last { examples } else { 0 }],
            })
        });
        let reaches = vec![0f32; examples.div_ceil(BLOCK)];
        let target =
            Mutex::new((segments.collect::<Result<Vec<_>, _>>()?, reaches, Digest::default()));
        let size: usize = rotation.segments().iter().sum();
        share(
            examples.div_ceil(BLOCK),
            threads,
            asker,
            || {
                let together = BLOCK.min(examples);
                let coders: Vec<_> = (0..together).map(|_| Coder::new(&rotation, bits)).collect();
                let (values, scales) = (vec![0f32; together * dim], Vec::<f32>::new());
                (coders, vec![0f64; together * size], values, scales, Cursor::default())
            },
            |(coders, vectors, values, scales, cursor), job, watch| {
                let first = job * BLOCK;
                let here = BLOCK.min(examples - first);
                vectors.fill(0.0);
                let mut hashes = vec![0; here];
                for (checkpoint, &weight) in weights.iter().enumerate() {
                    watch.check()?;
                    let row = |example| number(numbers, examples, checkpoint, example);
                    let numbers: Vec<u64> = (first..first + here).map(row).collect();
                    let values = &mut values[..here * dim];
                    rows.read(&numbers, values, scales, cursor, watch)?;
                    for (((vector, hash), row), &scale) in vectors
                        .chunks_exact_mut(size)
                        .zip(&mut hashes)
                        .zip(values.chunks_exact(dim))
                        .zip(&*scales)
                    {
                        *hash = hashed(*hash, row, scale);
                        let factor = f64::from(scale) * f64::from(weight);
                        for (out, &value) in vector[checkpoint * dim..].iter_mut().zip(row) {
                            *out = f64::from(value) * factor;
                        }
                    }
                }
                for (index, (vector, coder)) in
                    vectors.chunks_exact_mut(size).zip(coders.iter_mut()).enumerate().take(here)
                {
                    watch.check()?;
                    rotation.apply(vector);
                    coder.encode(vector);
                    if coder.reach.is_nan() || coder.reach >= f32::MAX / 4.0 {
                        return Err(Error::NotFinite {
                            argument: "rows",
                            place: format!("the norm of example {} (from 0)", first + index),
                            value: f64::from(coder.reach),
                        });
                    }
                }
                let mut target = target.lock().map_err(Error::panicked)?;
                let (segments, reaches, digest) = &mut *target;
                digest.add(first as u32, &hashes);
                for (coder, &place) in coders.iter().zip(&places[first..first + here]) {
                    put(segments, coder, place as usize);
                    let reach = &mut reaches[place as usize / BLOCK];
                    *reach = reach.max(coder.reach);
                }
                Ok(())
            },
        )?;
        let (segments, reaches, digest) = target.into_inner().map_err(Error::panicked)?;
        Ok(Self { rotation, weights: weights.to_vec(), order, segments, reaches, digest })
    }

    /// Codes that were taken apart and kept: by [`Codes::segments`], [`Codes::order`],
    /// [`Codes::reaches`], [`Codes::weights`], [`Codes::rotation`] and [`Codes::digest`].
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Argument`] if they are not such as a search can rely on: sizes
    /// that fit, every example at one place, numbers that bound something; [`Error::Stopped`].
    /// Whether they are of the right rows only a checksum can tell.
    pub fn from_parts(
        rotation: Rotation,
        weights: Vec<f32>,
        order: Vec<u32>,
        segments: Vec<Segment>,
        reaches: Vec<f32>,
        digest: Digest,
        watch: &Watch<'_>,
    ) -> Result<Self, Error> {
        let rows = order.len();
        check_weights(&weights)?;
        if !rotation.length().is_multiple_of(weights.len()) {
            let must = format!("one for each of equal parts of {}", rotation.length());
            return Err(Error::shape("weights", must, weights.len()));
        }
        let mut seen = vec![false; rows];
        let mut steps = watch.steps();
        for &example in &order {
            steps.add(5)?;
            match seen.get_mut(example as usize) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(Error::argument("order", "every example once", example)),
            }
        }
        if segments.len() != rotation.segments().len() {
            let must = format!("{} of them", rotation.segments().len());
            return Err(Error::shape("segments", must, segments.len()));
        }
        let eight = segments.first().is_some_and(|segment| !segment.lower.is_empty());
        let last = segments.len() - 1;
        for (index, (segment, &length)) in segments.iter().zip(rotation.segments()).enumerate() {
            let both = if eight { rows } else { 0 };
            let tails = if index < last { rows } else { 0 };
            let planes = [(&segment.upper[..], rows), (&segment.lower[..], both)];
            let numbers =
                [(&segment.upper_errors, rows), (&segment.errors, both), (&segment.tails, tails)];
            let fits = segment.width == length / 2
                && planes.iter().all(|(plane, rows)| plane.len() == rows * segment.width)
                && numbers.iter().all(|(numbers, rows)| numbers.len() == *rows)
                && segment.scales.len() == rows;
            if !fits {
                let must = format!("{rows} rows of {} bytes a plane", length / 2);
                return Err(Error::shape("segments", must, format!("others in segment {index}")));
            }
            watch.check()?;
            let bound = |number: &bf16| number.is_finite() && !number.is_sign_negative();
            let scales = segment.scales.iter().all(|scale| scale.is_finite() && *scale >= 0.0);
            if !scales || !numbers.iter().all(|(numbers, _)| numbers.iter().all(bound)) {
                let must = "made of numbers that are finite and not negative";
                return Err(Error::argument(
                    "segments",
                    must,
                    format!("others in segment {index}"),
                ));
            }
        }
        let norms = reaches.iter().all(|reach| reach.is_finite() && *reach >= 0.0);
        if reaches.len() != rows.div_ceil(BLOCK) || !norms {
            let must = format!("{} norms", rows.div_ceil(BLOCK));
            return Err(Error::shape("reaches", must, reaches.len()));
        }
        Ok(Self { rotation, weights, order, segments, reaches, digest })
    }

    /// These codes and those of more examples, which are numbered on from the last; in falling order
    /// of norms the ones, and then the others.
    ///
    /// O(all) time and memory.
    ///
    /// # Errors
    /// [`Error::Argument`] if they were made by another rotation, or with other weights or bits;
    /// [`Error::Shape`] if all are more than [`MAX_ROWS`]; [`Error::Stopped`].
    pub fn appended(&self, more: &Self, watch: &Watch<'_>) -> Result<Self, Error> {
        let (before, rows) = (self.len(), self.len().saturating_add(more.len()));
        if rows > MAX_ROWS {
            return Err(Error::shape("codes", format!("at most {MAX_ROWS}"), rows));
        }
        let alike = self.rotation == more.rotation && self.weights == more.weights;
        let empty = self.is_empty() || more.is_empty();
        if !alike || !(empty || self.bits() == more.bits()) {
            let must = "made as those that they follow";
            return Err(Error::argument("codes", must, "another rotation, weights or bits"));
        }
        let mut order = joined(&[&self.order, &more.order], watch)?;
        for example in &mut order[before..] {
            *example += before as u32;
        }
        let segments = self.segments.iter().zip(&more.segments).map(|(mine, more)| {
            Ok(Segment {
                width: mine.width,
                upper: Lines::joined(&[&mine.upper, &more.upper], watch)?,
                lower: joined(&[&mine.lower, &more.lower], watch)?,
                scales: joined(&[&mine.scales, &more.scales], watch)?,
                upper_errors: joined(&[&mine.upper_errors, &more.upper_errors], watch)?,
                errors: joined(&[&mine.errors, &more.errors], watch)?,
                tails: joined(&[&mine.tails, &more.tails], watch)?,
            })
        });
        let segments = segments.collect::<Result<_, Error>>()?;
        // A block of all begins in one of the codes that come, whose norms fall.
        let mut reaches = self.reaches.clone();
        reaches.resize(rows.div_ceil(BLOCK), 0.0);
        for (block, reach) in reaches.iter_mut().enumerate().skip(before / BLOCK) {
            let first = (block * BLOCK).saturating_sub(before) / BLOCK;
            *reach = reach.max(more.reaches.get(first).copied().unwrap_or(0.0));
        }
        Ok(Self {
            rotation: self.rotation.clone(),
            weights: self.weights.clone(),
            order,
            segments,
            reaches,
            digest: self.digest.followed(before as u32, more.digest),
        })
    }

    /// What tells the rows that they are of from others: that of [`Rows::digest`].
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// How many examples have codes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// True if none has.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// The map before rows become codes.
    #[must_use]
    pub fn rotation(&self) -> &Rotation {
        &self.rotation
    }

    /// How often each checkpoint counts.
    #[must_use]
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// The example at each place.
    #[must_use]
    pub fn order(&self) -> &[u32] {
        &self.order
    }

    /// The codes, segment by segment.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// For each block of [`BLOCK`] places the largest norm in it.
    #[must_use]
    pub fn reaches(&self) -> &[f32] {
        &self.reaches
    }

    /// How many bits of a code are kept.
    #[must_use]
    pub fn bits(&self) -> Bits {
        let both = self.segments.iter().all(|segment| segment.errors.len() == self.len());
        if both && !self.is_empty() { Bits::Eight } else { Bits::Four }
    }

    /// Bytes it takes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let segment = |segment: &Segment| {
            let numbers = 2 * segment.scales.len()
                + segment.upper_errors.len()
                + segment.errors.len()
                + segment.tails.len();
            segment.upper.len() + segment.lower.len() + 2 * numbers
        };
        let segments: usize = self.segments.iter().map(segment).sum();
        self.rotation.bytes()
            + 4 * (self.weights.len() + self.order.len())
            + segments
            + 4 * self.reaches.len()
    }
}

fn check_weights(weights: &[f32]) -> Result<(), Error> {
    if weights.is_empty() || weights.iter().any(|&weight| !(weight.is_normal() && weight > 0.0)) {
        let must = "at least one, all finite and positive";
        return Err(Error::argument("weights", must, format!("{weights:?}")));
    }
    Ok(())
}

/// Writes a coded row at its place.
fn put(segments: &mut [Segment], coder: &Coder, place: usize) {
    for (index, segment) in segments.iter_mut().enumerate() {
        let (scale, [upper_error, error, tail]) = coder.numbers[index];
        let plane = place * segment.width..(place + 1) * segment.width;
        segment.upper[plane.clone()].copy_from_slice(&coder.upper[index]);
        segment.scales[place] = scale;
        segment.upper_errors[place] = upper_error;
        if coder.bits == Bits::Eight {
            segment.lower[plane].copy_from_slice(&coder.lower[index]);
            segment.errors[place] = error;
        }
        if let Some(here) = segment.tails.get_mut(place) {
            *here = tail;
        }
    }
}

/// A query as the codes meet it: rotated, and each segment divided by a scale of its own into
/// whole numbers from -127 to 127.
#[derive(Clone, Debug)]
pub(super) struct CodedQuery {
    pub(super) segments: Vec<CodedSegment>,
    /// Its norm.
    pub(super) norm: f32,
    /// The norm of what rounding has lost.
    pub(super) error: f32,
}

/// A segment of a query.
#[derive(Clone, Debug)]
pub(super) struct CodedSegment {
    /// The factors of a plane's lower halves, then of its upper halves.
    pub(super) factors: Vec<i8>,
    /// Their sum.
    pub(super) sum: i32,
    pub(super) scale: f32,
    /// The norm of the query's segment.
    pub(super) norm: f32,
    /// The norm of the query's segments after it.
    pub(super) rest: f32,
}

impl CodedQuery {
    /// A query, as long as what the rotation takes.
    pub(super) fn new(rotation: &Rotation, query: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = query.collect();
        values.resize(rotation.segments().iter().sum(), 0.0);
        rotation.apply(&mut values);
        let norm = |values: &[f64]| up_f32(rounded_up(squares(values)).sqrt());
        let mut lost = 0.0;
        let mut rest = &values[..];
        let mut errors = vec![0.0; rotation.segments().iter().copied().max().unwrap_or(0)];
        let segments = rotation.segments().iter().map(|&segment| {
            let (here, after) = rest.split_at(segment);
            rest = after;
            let scale = up_f32(largest(here) / 127.0);
            let inverse = if scale > 0.0 { f64::from(scale).recip() } else { 0.0 };
            let mut factors = vec![0i8; segment];
            let (low, high) = factors.split_at_mut(segment / 2);
            let mut sum = 0;
            let errors = &mut errors[..segment];
            for (index, (values, errors)) in
                here.chunks_exact(UNIT / 2).zip(errors.chunks_exact_mut(UNIT / 2)).enumerate()
            {
                let side = if index % 2 == 0 { &mut *low } else { &mut *high };
                let out = &mut side[index / 2 * (UNIT / 2)..][..UNIT / 2];
                for ((out, error), &value) in out.iter_mut().zip(errors).zip(values) {
                    let factor = rounded(value * inverse).clamp(-127.0, 127.0);
                    *out = factor as i8;
                    sum += i32::from(*out);
                    *error = value - factor * f64::from(scale);
                }
            }
            lost += squares(errors);
            CodedSegment { factors, sum, scale, norm: norm(here), rest: norm(after) }
        });
        let segments = segments.collect();
        Self { segments, norm: norm(&values), error: up_f32(rounded_up(lost).sqrt()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_of_no_number_is_no_number_whatever_its_bits() {
        for bits in [0x7FC0_0000, 0xFFC0_0000, 0x7FFF_FFFF, 0xFFFF_FFFF] {
            assert!(up(f64::from(f32::from_bits(bits))).is_nan());
        }
        assert_eq!(up(f64::INFINITY), bf16::INFINITY);
        assert_eq!(up(0.0), bf16::ZERO);
    }
}
