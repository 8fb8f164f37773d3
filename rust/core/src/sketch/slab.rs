//! Blocks of coordinates of many samples: the form in which every kind takes gradients.

use super::dense::Entries;
use super::flat::Matrix;
use super::{
    Kind, Parameter, Row, Sketch, chunked, columns, factgrass, grass, hadamard, join, kronecker,
    tensorsketch,
};
use crate::error::Error;
use crate::parallel::share;
use crate::stop::{Asker, Watch};

/// Coordinates whose sums in f32 are added to the f64 totals together: sums are split at the
/// multiples of this number.
pub(super) const PIECE: u64 = 1 << 16;

/// Neighbouring coordinates of a parameter for each sample of a batch.
#[derive(Clone, Copy)]
pub(super) struct Slab<'a> {
    /// The first coordinate.
    pub(super) start: u64,
    /// `[batch, width]`.
    pub(super) values: Matrix<'a, f32>,
}

/// Where the coordinates `start..start + width` are cut: places counted from `start`, and widths.
pub(super) fn pieces(start: u64, width: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let left = width - from;
        let here = ((PIECE - (start + from as u64) % PIECE) as usize).min(left);
        from += here;
        (here > 0).then_some((from - here, here))
    })
}

impl Slab<'_> {
    /// Adds the coordinates of all samples; returns the rows that are not finite.
    pub(super) fn add(
        self,
        sketch: &Sketch,
        parameter: Parameter,
        rows: &[Row<'_>],
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Vec<usize>, Error> {
        if sketch.kind == Kind::ChunkedSjlt {
            let Self { start, values } = self;
            return chunked::add_flat(sketch, parameter, start, values, rows, threads, asker);
        }
        if let Some(entries) = Entries::of(sketch.kind) {
            return entries.add_slab(sketch, parameter, self, rows, threads, asker);
        }
        let batch = rows.len();
        let group = batch.div_ceil(threads.max(1)).clamp(1, GROUP);
        let states = share(batch.div_ceil(group), threads, asker, Vec::new, |bad, job, watch| {
            let first = job * group;
            let count = group.min(batch - first);
            let here = Slab { start: self.start, values: self.values.some(first, count) };
            let found = here.add_here(sketch, parameter, &rows[first..first + count], watch)?;
            bad.extend(found.into_iter().map(|row| first + row));
            Ok(())
        })?;
        Ok(join(states))
    }

    /// The same on this thread, for at most [`GROUP`] samples and a kind that is not chunked.
    pub(super) fn add_here(
        self,
        sketch: &Sketch,
        parameter: Parameter,
        rows: &[Row<'_>],
        watch: &Watch<'_>,
    ) -> Result<Vec<usize>, Error> {
        let mut bad = Vec::new();
        for (from, width) in pieces(self.start, self.values.width()) {
            watch.check()?;
            let values = self.values.columns(from, width);
            let piece = Slab { start: self.start + from as u64, values };
            let finite = match sketch.kind {
                Kind::ChunkedSjlt => return Err(Error::Internal("chunked rows in a slab".into())),
                Kind::Sjlt(nonzeros) => {
                    columns::add_sjlt(sketch, parameter, nonzeros, piece, rows, watch)?
                }
                Kind::Rademacher => Entries::Signs.add(sketch, parameter, piece, rows, watch)?,
                Kind::Gaussian => Entries::Normals.add(sketch, parameter, piece, rows, watch)?,
                Kind::Srht => hadamard::add(sketch, parameter, piece, rows, watch)?,
                Kind::TensorSketch => tensorsketch::add(sketch, parameter, piece, rows, watch)?,
                Kind::Kronecker => kronecker::add(sketch, parameter, piece, rows, watch)?,
                Kind::FactGrass if parameter.columns == 1 => {
                    grass::add(sketch, parameter, piece, rows, watch)?
                }
                Kind::Grass => grass::add(sketch, parameter, piece, rows, watch)?,
                Kind::FactGrass => factgrass::add(sketch, parameter, piece, rows, watch)?,
            };
            bad.push((0..rows.len()).filter(|&row| !finite[row]).collect());
        }
        Ok(join(bad))
    }
}

/// Samples that a worker adds together: they share what is random.
pub(super) const GROUP: usize = 16;
