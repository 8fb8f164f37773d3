//! Kinds that take the factors of outer products as they are, and do not form the matrix.
//!
//! They see a parameter as a matrix: its rows are numbered by the first size, and its columns by
//! all others. What is random of columns comes from the same stream as what is random of rows, half
//! the counters away.

use std::sync::Mutex;

use super::outer::{Block, GROUP, STRIP, Scratch, Sequences, make_strip, sum_strips};
use super::{Kind, Row, Sketch, factgrass, grass, kronecker, tensorsketch};
use crate::error::Error;
use crate::kernels::{InstructionSet, LANES, TILE_ROWS};
use crate::parallel::share;
use crate::stop::Asker;

/// The first counter of what is random of columns: beyond all rows.
pub(super) const COLUMNS: u64 = 1 << 63;

impl Block<'_> {
    /// The row of the parameter with which the block begins, if it is made of whole rows of a
    /// parameter that has more than one column.
    pub(super) fn first_row(&self) -> Option<u64> {
        let columns = self.parameter.columns;
        let whole = self.columns() as u64 == columns && self.start.is_multiple_of(columns);
        (whole && columns > 1).then_some(self.start / columns)
    }
}

impl Sequences<'_> {
    /// One value.
    #[inline]
    pub(super) fn at(&self, sample: usize, term: usize, column: usize) -> f32 {
        let [across_samples, across_terms, across_width] = self.strides;
        self.values[sample * across_samples + term * across_terms + column * across_width]
    }

    /// Replaces `columns` by those of a sample, each with its terms side by side, and zeros up to
    /// the width that is returned.
    pub(super) fn columns(
        &self,
        set: InstructionSet,
        sample: usize,
        columns: &mut Vec<f32>,
    ) -> usize {
        /// Columns of which 16 terms are put side by side at a time: 16 KiB.
        const STEP: usize = 256;
        let [across_samples, across_terms, across_width] = self.strides;
        let [_, terms, count] = self.shape;
        // Of an odd number of cache lines, so that columns do not all compete for the same places.
        let width = (terms.div_ceil(LANES) | 1) * LANES;
        columns.clear();
        columns.resize(count * width, 0.0);
        if across_width != 1 {
            for (column, values) in columns.chunks_exact_mut(width).enumerate() {
                let at = sample * across_samples + column * across_width;
                for (term, value) in values[..terms].iter_mut().enumerate() {
                    *value = self.values[at + term * across_terms];
                }
            }
            return width;
        }
        let (mut wide, as_they_are) = ([[0.0; LANES]; STEP], [0; STEP]);
        let mut views = [&[][..]; LANES];
        for first in (0..terms).step_by(LANES) {
            let some = LANES.min(terms - first);
            for (lane, view) in views[..some].iter_mut().enumerate() {
                let at = sample * across_samples + (first + lane) * across_terms;
                *view = &self.values[at..at + count];
            }
            if some < LANES {
                wide.fill([0.0; LANES]);
            }
            for (from, columns) in (0..).step_by(STEP).zip(columns.chunks_mut(STEP * width)) {
                let wide = &mut wide[..columns.len() / width];
                set.side_by_side(&views[..some], from, &as_they_are[..wide.len()], wide);
                for (column, terms) in columns.chunks_exact_mut(width).zip(wide) {
                    column.as_chunks_mut().0[first / LANES] = *terms;
                }
            }
        }
        width
    }
}

impl Sketch {
    /// Adds outer products from their factors, and the matrices themselves to `sum`; returns the
    /// rows that are not finite, or nothing if strips of the matrix are the way.
    pub(super) fn add_factors(
        &self,
        block: Block<'_>,
        totals: &[Row<'_>],
        sum: Option<&mut [f32]>,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Option<Vec<usize>>, Error> {
        let bad = match (self.kind, block.first_row()) {
            (Kind::TensorSketch, Some(first)) if tensorsketch::is_quicker(self.dim, &block) => {
                tensorsketch::add_outer(self, block, first, totals, threads, asker)?
            }
            (Kind::Kronecker, Some(first)) => {
                kronecker::add_outer(self, block, first, totals, threads, asker)?
            }
            (Kind::Grass, _) if u32::try_from(block.rows().max(block.columns())).is_ok() => {
                grass::add_outer(self, block, totals, threads, asker)?
            }
            (Kind::FactGrass, Some(first)) => {
                factgrass::add_outer(self, block, first, totals, threads, asker)?
            }
            _ => return Ok(None),
        };
        if let Some(sum) = sum {
            self.add_sum(block, sum, threads, asker)?;
        }
        Ok(Some(bad))
    }

    /// Adds the matrices of all samples to `sum`, four at a time, in order.
    fn add_sum(
        &self,
        block: Block<'_>,
        sum: &mut [f32],
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<(), Error> {
        let (batch, columns) = (block.left.shape[0], block.columns());
        let height = (STRIP / columns).next_multiple_of(TILE_ROWS);
        let parts: Vec<_> = sum.chunks_mut(height * columns).map(Mutex::new).collect();
        let state = <(Scratch, Vec<f32>)>::default;
        share(parts.len(), threads, asker, state, |(scratch, strips), job, watch| {
            let mut sum = parts[job].lock().map_err(Error::panicked)?;
            let width = sum.len();
            for first in (0..batch).step_by(GROUP) {
                let samples = first..batch.min(first + GROUP);
                strips.resize(samples.len() * width, 0.0);
                for (strip, sample) in strips.chunks_exact_mut(width).zip(samples) {
                    make_strip(self, block, sample, job * height, strip, scratch, watch)?;
                }
                sum_strips(strips, width, &mut sum);
            }
            Ok(())
        })?;
        Ok(())
    }
}
