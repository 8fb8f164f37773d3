//! Per-sample gradients to rows of a fixed width.
//!
//! A [`Sketch`] is a random linear map of a [`Kind`]. Gradients come in three forms: flat, as the
//! sum of outer products that a linear layer's gradient is, and as the few rows of a table that an
//! embedding's gradient has. [`chunked`] is the default kind and has inner loops for each form.
//! The other kinds take blocks of coordinates of many samples ([`slab`]), and some the outer
//! products as they are ([`factors`]).
//!
//! Sums have a fixed shape, so the bits do not depend on how the work is split: coordinates are
//! summed in f32 for a while, then added to the row's f64 total. Parameters that come in the same
//! order give the same bits; one that is fed by several calls differs by rounding from one that is
//! fed whole, unless the calls split it where the sums are split.

mod chunked;
mod columns;
mod dense;
mod factgrass;
mod factors;
mod flat;
mod fourier;
mod grass;
mod hadamard;
mod kronecker;
mod lookup;
mod outer;
mod slab;
mod tensorsketch;

pub use flat::{Matrix, Value};
pub use outer::Sequences;

use std::sync::{Mutex, MutexGuard};

use crate::error::Error;
use crate::kernels::{InstructionSet, LANES, Slot};
use crate::memory;
use crate::random;
use crate::stop::Watch;

/// The widest row a sketch makes.
pub const MAX_DIM: usize = 1 << 20;
/// The most coordinates a parameter may have.
pub const MAX_COORDINATES: u64 = 1 << 48;

/// What the map is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One nonzero a column; 16 neighbouring coordinates share an offset.
    ChunkedSjlt,
    /// This many nonzeros a column, one in each of as many equal parts of the row.
    Sjlt(usize),
    /// Independent signs.
    Rademacher,
    /// Independent normal numbers.
    Gaussian,
    /// Some values of a Walsh-Hadamard transform of each block of coordinates.
    Srht,
    /// Hashes of an entry are sums of those of its row and its column.
    TensorSketch,
    /// Rows and columns are projected.
    Kronecker,
    /// Some coordinates, and one nonzero a column for each.
    Grass,
    /// Some rows and columns, and the chunked map of what is in both.
    FactGrass,
}

impl Kind {
    /// The kind of this name; `nonzeros` is that of a column, for `sjlt`.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is none, or `nonzeros` is not 1, 2, 4 or 8.
    pub fn named(name: &str, nonzeros: usize) -> Result<Self, Error> {
        match name {
            "chunked_sjlt" => Ok(Self::ChunkedSjlt),
            "sjlt" if matches!(nonzeros, 1 | 2 | 4 | 8) => Ok(Self::Sjlt(nonzeros)),
            "rademacher" => Ok(Self::Rademacher),
            "gaussian" => Ok(Self::Gaussian),
            "srht" => Ok(Self::Srht),
            "tensorsketch" => Ok(Self::TensorSketch),
            "kronecker" => Ok(Self::Kronecker),
            "grass" => Ok(Self::Grass),
            "factgrass" => Ok(Self::FactGrass),
            "sjlt" => Err(Error::argument("nonzeros", "1, 2, 4 or 8", nonzeros)),
            _ => Err(Error::argument("kind", "the name of a kind", name)),
        }
    }
}

/// A map from gradients to rows of `dim` values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sketch {
    kind: Kind,
    dim: usize,
    seed: u64,
    set: InstructionSet,
}

/// One parameter of the model: its stream of randomness, and its shape as a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameter {
    key: u64,
    len: u64,
    /// The product of all sizes but the first; 1 for a vector.
    columns: u64,
}

impl Parameter {
    /// The key of its stream of randomness.
    #[must_use]
    pub fn key(self) -> u64 {
        self.key
    }
}

impl Sketch {
    /// A sketch of width `dim`.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `1 <= dim <=` [`MAX_DIM`], and the kind has such rows.
    pub fn new(kind: Kind, dim: usize, seed: u64) -> Result<Self, Error> {
        if dim == 0 || dim > MAX_DIM {
            return Err(Error::argument("dim", format!("from 1 to {MAX_DIM}"), dim));
        }
        match kind {
            Kind::Sjlt(nonzeros) if !dim.is_multiple_of(nonzeros) => {
                return Err(Error::argument(
                    "dim",
                    format!("a multiple of nonzeros={nonzeros}"),
                    dim,
                ));
            }
            _ => {}
        }
        Ok(Self { kind, dim, seed, set: InstructionSet::best() })
    }

    /// The same sketch computed by `set`.
    #[must_use]
    pub fn with_instruction_set(self, set: InstructionSet) -> Self {
        Self { set, ..self }
    }

    /// The width of a row.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The parameter with this canonical name and shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if it has more than [`MAX_COORDINATES`] coordinates.
    pub fn parameter(&self, name: &str, shape: &[u64]) -> Result<Parameter, Error> {
        let product =
            |sizes: &[u64]| sizes.iter().try_fold(1u64, |len, &size| len.checked_mul(size));
        let (len, columns) = (product(shape), product(shape.get(1..).unwrap_or(&[])));
        match (len, columns) {
            (Some(len), Some(columns)) if len <= MAX_COORDINATES => {
                Ok(Parameter { key: random::parameter_key(self.seed, name, shape), len, columns })
            }
            _ => Err(Error::shape(
                "shape",
                format!("a shape of at most {MAX_COORDINATES} values"),
                format!("{shape:?}"),
            )),
        }
    }

    /// The slot of chunk `chunk` of `parameter` in a chunked sketch.
    #[inline]
    #[must_use]
    pub fn slot(&self, parameter: Parameter, chunk: u64) -> Slot {
        Slot::of(random::value(parameter.key, chunk), self.dim, Slot::ring(self.dim))
    }

    /// The slots of all chunks of `parameter` in a chunked sketch.
    ///
    /// # Errors
    /// [`Error::Shape`] if memory has no room for them; [`Error::Stopped`].
    pub fn slots(&self, parameter: Parameter, watch: &Watch<'_>) -> Result<Vec<Slot>, Error> {
        /// Chunks between two looks at the watch.
        const STEP: usize = 1 << 16;
        let chunks = parameter.len.div_ceil(LANES as u64) as usize;
        let Some(mut slots) = memory::try_filled(chunks, Slot::default(), watch)? else {
            return Err(Error::shape("shape", "one whose slots fit in memory", parameter.len));
        };
        for (slots, first) in slots.chunks_mut(STEP).zip((0..).step_by(STEP)) {
            watch.check()?;
            self.set.slots(parameter.key, self.dim, first, slots);
        }
        Ok(slots)
    }
}

/// The running f64 totals of a batch: `dim` neighbouring columns of a matrix of rows.
#[derive(Debug)]
pub struct Totals<'a> {
    values: &'a mut [f64],
    width: usize,
    first: usize,
}

impl<'a> Totals<'a> {
    /// The columns from `first` on of `values`, rows of `width`.
    #[must_use]
    pub fn new(values: &'a mut [f64], width: usize, first: usize) -> Self {
        Self { values, width, first }
    }

    /// The rows of a batch, each to be handed out to whichever worker asks for it.
    fn share(self, sketch: &Sketch, batch: usize) -> Result<Vec<Row<'a>>, Error> {
        let Self { values, width, first } = self;
        let fits = first.checked_add(sketch.dim).is_some_and(|end| end <= width);
        if !fits || batch.checked_mul(width) != Some(values.len()) {
            let must = format!("[{batch}, at least {first} + {}]", sketch.dim);
            return Err(Error::shape("totals", must, format!("{} of {width}", values.len())));
        }
        let rows = values.chunks_exact_mut(width);
        Ok(rows.map(|row| Mutex::new(&mut row[first..first + sketch.dim])).collect())
    }
}

/// The totals of one sample, for one worker at a time.
type Row<'a> = Mutex<&'a mut [f64]>;

fn take<'r, 'a>(row: &'r Row<'a>) -> Result<MutexGuard<'r, &'a mut [f64]>, Error> {
    row.lock().map_err(Error::panicked)
}

/// Collects, from the states of all workers, the rows that were not finite, in order.
fn join(parts: impl IntoIterator<Item = Vec<usize>>) -> Vec<usize> {
    let mut rows: Vec<usize> = parts.into_iter().flatten().collect();
    rows.sort_unstable();
    rows.dedup();
    rows
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_dense;
#[cfg(test)]
mod tests_structured;
