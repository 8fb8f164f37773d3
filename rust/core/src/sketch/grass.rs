//! `grass`: some coordinates are kept, and sketched by a `CountSketch`.
//!
//! Of the `n` coordinates of a parameter `m = min(n, 4 dim)` are kept, one from each of the strata
//! `[floor(k n / m), floor((k + 1) n / m))`, each of a stratum as likely as another, times the root
//! of the stratum's size `n_k`. The kept value of stratum `k` is added to a bucket with a sign. So
//! inner products are unbiased. With `p = x y` value by value, and `X_k`, `Y_k` and `P_k` for the
//! sums of `x^2`, `y^2` and `p` over stratum `k`, their variance is
//!
//! ```text
//! sum over k of (n_k sum over c in k of p_c^2 - P_k^2)  +  (1/dim) sum over k != l of (X_k Y_l + P_k P_l)
//! ```
//!
//! The second part, that of the sketch, is at most `(|x|^2 |y|^2 + (x.y)^2) / dim`. The first, that
//! of the choice, is about `(1/m - 1/n) (|x|^2 |y|^2 + (x.y)^2)` if values are spread as independent
//! normal numbers are, which is a quarter of the second for a large parameter; but it grows with
//! their kurtosis, to `(n/m - 1) |x|^2 |y|^2` if all is in one coordinate.
//!
//! Most values are never looked at, so one that is NaN or infinite need not be noticed.
//!
//! (Hu et al., "`GraSS`: scalable data attribution with gradient sparsification and sparse
//! projection", arXiv 2505.18976, section 3: the random mask and the sparse projection. The mask
//! there is any set of so many coordinates, and unscaled. Strata spread it evenly, and are found for
//! any part of a parameter alone; scaled, inner products are unbiased.)

use std::ops::Range;

use super::factors::COLUMNS;
use super::outer::Block;
use super::slab::Slab;
use super::{Parameter, Row, Sketch, join, take};
use crate::error::Error;
use crate::kernels::Column;
use crate::parallel::share;
use crate::random;
use crate::stop::{Asker, Watch};

/// One of each stratum of some things.
#[derive(Clone, Copy)]
pub(super) struct Choice {
    key: u64,
    /// The counter of the first stratum.
    counter: u64,
    things: u64,
    strata: u64,
}

impl Choice {
    /// A choice of `most` of `things`, or of all if there are no more.
    pub(super) fn new(key: u64, counter: u64, things: u64, most: u64) -> Self {
        Self { key, counter, things, strata: things.min(most) }
    }

    /// How many are chosen.
    pub(super) fn count(self) -> u64 {
        self.strata
    }

    /// Where stratum `stratum` begins.
    fn start(self, stratum: u64) -> u64 {
        (u128::from(stratum) * u128::from(self.things) / u128::from(self.strata)) as u64
    }

    /// The stratum of a thing.
    fn stratum(self, thing: u64) -> u64 {
        let end = (u128::from(thing) + 1) * u128::from(self.strata);
        ((end - 1) / u128::from(self.things)) as u64
    }

    /// The strata that have some of these things.
    fn strata(self, things: Range<u64>) -> Range<u64> {
        if things.is_empty() {
            return 0..0;
        }
        self.stratum(things.start)..self.stratum(things.end - 1) + 1
    }

    /// The thing chosen of a stratum, and the root of the stratum's size.
    fn of(self, stratum: u64) -> (u64, f64) {
        let start = self.start(stratum);
        let size = self.start(stratum + 1) - start;
        let bits = random::value(self.key, self.counter.wrapping_add(stratum));
        let place = (u128::from(bits) * u128::from(size)) >> 64;
        (start + place as u64, (size as f64).sqrt())
    }

    /// The strata whose choice is one of these things: they follow each other.
    pub(super) fn chosen(self, things: Range<u64>) -> Range<u64> {
        let mut strata = self.strata(things.clone());
        if !strata.is_empty() && self.of(strata.start).0 < things.start {
            strata.start += 1;
        }
        if !strata.is_empty() && self.of(strata.end - 1).0 >= things.end {
            strata.end -= 1;
        }
        strata
    }

    /// The things chosen of some strata, and the roots of the strata's sizes.
    pub(super) fn all(self, strata: Range<u64>) -> impl Iterator<Item = (u64, f64)> {
        strata.map(move |stratum| self.of(stratum))
    }
}

/// A coordinate that is kept.
#[derive(Clone, Copy)]
pub(super) struct Kept {
    pub(super) coordinate: u64,
    pub(super) column: Column,
    pub(super) weight: f64,
}

impl Kept {
    /// Adds the kept coordinate's value to a row; whether it is finite.
    #[inline]
    pub(super) fn add(self, value: f32, total: &mut [f64]) -> bool {
        total[self.column.bucket()] += f64::from(self.column.signed(value)) * self.weight;
        value.is_finite()
    }
}

/// Adds the kept coordinates of a piece of a slab; says which rows are finite there.
pub(super) fn add_kept(
    kept: &[Kept],
    piece: Slab<'_>,
    rows: &[Row<'_>],
) -> Result<Vec<bool>, Error> {
    let add = |(index, row): (usize, &Row<'_>)| {
        let values = piece.values.row(index);
        let mut total = take(row)?;
        let mut finite = true;
        for kept in kept {
            finite &= kept.add(values[(kept.coordinate - piece.start) as usize], &mut total);
        }
        Ok(finite)
    };
    rows.iter().enumerate().map(add).collect()
}

/// The coordinates of a range that are kept.
fn kept(sketch: &Sketch, parameter: Parameter, coordinates: Range<u64>) -> Vec<Kept> {
    let choice = Choice::new(parameter.key, COLUMNS, parameter.len, 4 * sketch.dim as u64);
    let strata = choice.chosen(coordinates);
    let mut columns = vec![Column::default(); (strata.end - strata.start) as usize];
    sketch.set.columns(parameter.key, sketch.dim, 1, strata.start, &mut columns);
    let chosen = choice.all(strata).zip(columns);
    chosen.map(|((coordinate, weight), column)| Kept { coordinate, column, weight }).collect()
}

/// Adds a piece of a slab; says which rows are finite.
pub(super) fn add(
    sketch: &Sketch,
    parameter: Parameter,
    piece: Slab<'_>,
    rows: &[Row<'_>],
    watch: &Watch<'_>,
) -> Result<Vec<bool>, Error> {
    watch.check()?;
    let end = piece.start + piece.values.width() as u64;
    add_kept(&kept(sketch, parameter, piece.start..end), piece, rows)
}

/// What a worker keeps between samples.
#[derive(Default)]
struct Scratch {
    left: Vec<f32>,
    right: Vec<f32>,
    bad: Vec<usize>,
}

/// Adds the kept entries of a sum of outer products: each is a product of a row of the left
/// factors and one of the right, as [`crate::kernels::InstructionSet::dots`] takes it.
pub(super) fn add_outer(
    sketch: &Sketch,
    block: Block<'_>,
    totals: &[Row<'_>],
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Vec<usize>, Error> {
    /// Entries whose products are taken between looks at the watch.
    const STEP: usize = 1024;
    let columns = block.columns() as u64;
    let end = block.start + block.rows() as u64 * columns;
    let kept = kept(sketch, block.parameter, block.start..end);
    let place = |kept: &Kept| {
        let place = kept.coordinate - block.start;
        ((place / columns) as u32, (place % columns) as u32)
    };
    let pairs: Vec<(u32, u32)> = kept.iter().map(place).collect();
    let states = share(totals.len(), threads, asker, Scratch::default, |mine, sample, watch| {
        let Scratch { left, right, bad } = mine;
        let mut finite = true;
        if block.terms() == 1 {
            let left = block.left.term(sample, 0, left);
            let right = block.right.term(sample, 0, right);
            let mut total = take(&totals[sample])?;
            for (kept, &(row, column)) in kept.iter().zip(&pairs) {
                let value = left[row as usize] * right[column as usize];
                finite &= kept.add(value, &mut total);
            }
        } else {
            let width = block.left.columns(sketch.set, sample, left);
            block.right.columns(sketch.set, sample, right);
            let mut total = take(&totals[sample])?;
            let mut values = [0.0; STEP];
            for (kept, pairs) in kept.chunks(STEP).zip(pairs.chunks(STEP)) {
                watch.check()?;
                let values = &mut values[..pairs.len()];
                sketch.set.dots_of_pairs(left, right, width, pairs, values);
                for (kept, &mut value) in kept.iter().zip(values) {
                    finite &= kept.add(value, &mut total);
                }
            }
        }
        if !finite {
            bad.push(sample);
        }
        Ok(())
    })?;
    Ok(join(states.into_iter().map(|state| state.bad)))
}
