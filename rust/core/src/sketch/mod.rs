//! Per-sample gradients to rows of a fixed width: the chunked sparse Johnson-Lindenstrauss map.
//!
//! The coordinates of a parameter, in row-major order, form chunks of 16. Chunk `c` has one offset
//! `h(c)`, uniform over the `dim` buckets, and 16 signs; coordinate `16 c + i` is added to bucket
//! `(h(c) + i) mod dim` with sign `i`. Inner products of such rows are unbiased estimates of those
//! of the gradients, with variance
//! `(1/dim) sum over i, j in different chunks of (x_i^2 y_j^2 + x_i y_i x_j y_j)`,
//! which is at most `(|x|^2 |y|^2 + (x.y)^2) / dim`.
//!
//! Sums have a fixed shape, so the bits do not depend on how the work is split: a parameter is cut
//! into super-blocks of 2^20 coordinates; each is summed in f32 from zero, chunk by chunk, then
//! added to the row's f64 total. Super-blocks with fewer than `dim` coordinates are added to the
//! total directly. Parameters that come in the same order give the same bits; one that is fed by
//! several calls gives the same bits if the calls split it at super-blocks, and else differs by
//! rounding.

mod flat;
mod lookup;
mod outer;

pub use flat::Value;
pub use outer::Sequences;

use std::sync::{Mutex, MutexGuard};

use crate::error::Error;
use crate::kernels::{InstructionSet, LANES, Slot};
use crate::random;
use crate::stop::Watch;

/// The widest row a sketch makes.
pub const MAX_DIM: usize = 1 << 20;
/// The most coordinates a parameter may have.
pub const MAX_COORDINATES: u64 = 1 << 48;
/// Coordinates summed in f32 before they are added to the f64 total.
const SUPER_BLOCK: u64 = 1 << 20;
/// Chunks whose slots are computed at a time: 8 KiB of slots for 64 KiB of values.
const SLOTS: usize = 1024;

/// A map from gradients to rows of `dim` values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sketch {
    dim: usize,
    seed: u64,
    set: InstructionSet,
}

/// One parameter of the model: its stream of randomness and its number of coordinates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameter {
    key: u64,
    len: u64,
}

impl Sketch {
    /// A sketch of width `dim`.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `1 <= dim <=` [`MAX_DIM`].
    pub fn new(dim: usize, seed: u64) -> Result<Self, Error> {
        if dim == 0 || dim > MAX_DIM {
            return Err(Error::argument("dim", format!("from 1 to {MAX_DIM}"), dim));
        }
        Ok(Self { dim, seed, set: InstructionSet::best() })
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
        let len = shape.iter().try_fold(1u64, |len, &size| len.checked_mul(size));
        match len {
            Some(len) if len <= MAX_COORDINATES => {
                Ok(Parameter { key: random::parameter_key(self.seed, name, shape), len })
            }
            _ => Err(Error::shape(
                "shape",
                format!("a shape of at most {MAX_COORDINATES} values"),
                format!("{shape:?}"),
            )),
        }
    }

    /// The slot of chunk `chunk` of `parameter`: bucket of its first coordinate, and signs.
    #[inline]
    #[must_use]
    pub fn slot(&self, parameter: Parameter, chunk: u64) -> Slot {
        let bits = random::value(parameter.key, chunk);
        // The product of two 32-bit numbers: its upper half is uniform below dim.
        let offset = ((bits >> 32) * self.dim as u64) >> 32;
        Slot { offset: offset as u32, signs: bits as u16 }
    }

    /// The slots of all chunks of `parameter`.
    #[must_use]
    pub fn slots(&self, parameter: Parameter) -> Vec<Slot> {
        (0..parameter.len.div_ceil(LANES as u64)).map(|chunk| self.slot(parameter, chunk)).collect()
    }

    /// Rejects `totals` that are not `[batch, dim]`.
    fn check_totals(&self, totals: &[f64], batch: usize) -> Result<(), Error> {
        if batch.checked_mul(self.dim) == Some(totals.len()) {
            return Ok(());
        }
        Err(Error::shape("totals", format!("[{batch}, {}]", self.dim), totals.len()))
    }
}

/// Adds values of one parameter to one row.
struct Adder<'a> {
    sketch: &'a Sketch,
    parameter: Parameter,
    total: &'a mut [f64],
    /// The sums of the current super-block: `dim` buckets and the overhang of the last chunk.
    block: &'a mut Vec<f32>,
    super_block: u64,
    /// Values added by `add_anywhere` since the last flush.
    since_flush: u64,
    used: bool,
    finite: bool,
}

impl<'a> Adder<'a> {
    /// `block` is scratch: empty, or as an earlier adder of the same sketch left it.
    fn new(
        sketch: &'a Sketch,
        parameter: Parameter,
        total: &'a mut [f64],
        block: &'a mut Vec<f32>,
    ) -> Self {
        if block.is_empty() {
            block.resize(sketch.dim + LANES, 0.0);
        }
        Self {
            sketch,
            parameter,
            total,
            block,
            super_block: 0,
            since_flush: 0,
            used: false,
            finite: true,
        }
    }

    /// Adds `values` at the coordinates from `start` on. Calls must come in order of `start`.
    fn add<T: Value>(
        &mut self,
        start: u64,
        values: &[T],
        slots: &mut [Slot; SLOTS],
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        const WIDTH: u64 = LANES as u64;
        let mut chunk = start / WIDTH;
        let skipped = (start % WIDTH) as usize;
        let mut values = values;
        if skipped > 0 {
            let (head, rest) = values.split_at((LANES - skipped).min(values.len()));
            self.add_partial(chunk, skipped, head);
            chunk += 1;
            values = rest;
        }
        let (mut whole, tail) = values.split_at(values.len() / LANES * LANES);
        while !whole.is_empty() {
            let left = (SUPER_BLOCK - chunk * WIDTH % SUPER_BLOCK) / WIDTH;
            let count = (whole.len() / LANES).min(SLOTS).min(left as usize);
            for (index, slot) in slots[..count].iter_mut().enumerate() {
                *slot = self.sketch.slot(self.parameter, chunk + index as u64);
            }
            let (these, rest) = whole.split_at(count * LANES);
            watch.check()?;
            self.add_chunks(chunk, &slots[..count], these);
            chunk += count as u64;
            whole = rest;
        }
        if !tail.is_empty() {
            self.add_partial(chunk, 0, tail);
        }
        Ok(())
    }

    /// Adds `values` at lanes `lane..` of a chunk. The other lanes are zeros, which change nothing.
    fn add_partial<T: Value>(&mut self, chunk: u64, lane: usize, values: &[T]) {
        let mut padded = [T::ZERO; LANES];
        padded[lane..lane + values.len()].copy_from_slice(values);
        let slot = self.sketch.slot(self.parameter, chunk);
        self.add_chunks(chunk, &[slot], &padded);
    }

    /// Adds whole chunks of one super-block, the first of which is `chunk`.
    fn add_chunks<T: Value>(&mut self, chunk: u64, slots: &[Slot], values: &[T]) {
        let super_block = chunk * LANES as u64 / SUPER_BLOCK;
        if super_block != self.super_block {
            self.flush();
            self.super_block = super_block;
        }
        let begin = super_block * SUPER_BLOCK;
        if (self.parameter.len - begin).min(SUPER_BLOCK) < self.sketch.dim as u64 {
            self.add_directly(slots, values);
        } else {
            self.used = true;
            T::scatter(self.sketch.set, slots, values, self.block);
        }
    }

    /// Adds whole chunks that need not follow each other; the f32 sum is flushed now and then.
    fn add_anywhere(&mut self, slots: &[Slot], values: &[f32]) {
        if self.parameter.len < self.sketch.dim as u64 {
            self.add_directly(slots, values);
            return;
        }
        self.used = true;
        self.sketch.set.scatter(slots, values, self.block);
        self.since_flush += values.len() as u64;
        if self.since_flush >= SUPER_BLOCK {
            self.flush();
        }
    }

    fn add_directly<T: Value>(&mut self, slots: &[Slot], values: &[T]) {
        let dim = self.sketch.dim;
        for (slot, chunk) in slots.iter().zip(values.chunks_exact(LANES)) {
            for (lane, &value) in chunk.iter().enumerate() {
                let value = value.widen();
                self.finite &= value.is_finite();
                let signed = if slot.signs >> lane & 1 == 1 { -value } else { value };
                self.total[(slot.offset as usize + lane) % dim] += f64::from(signed);
            }
        }
    }

    /// Adds the sums of the current super-block to the total.
    fn flush(&mut self) {
        if !self.used {
            return;
        }
        let dim = self.sketch.dim;
        for lane in 0..LANES {
            let overhang = std::mem::take(&mut self.block[dim + lane]);
            self.block[lane % dim] += overhang;
        }
        let mut finite = true;
        for (total, sum) in self.total.iter_mut().zip(&mut self.block[..dim]) {
            finite &= sum.is_finite();
            *total += f64::from(*sum);
            *sum = 0.0;
        }
        self.finite &= finite;
        self.used = false;
        self.since_flush = 0;
    }

    /// Ends the row; `false` if a sum was NaN or infinite.
    fn finish(mut self) -> bool {
        self.flush();
        self.finite
    }
}

/// The rows of a matrix, each handed out to whichever worker asks for it.
struct RowsMut<'a> {
    rows: Vec<Mutex<&'a mut [f64]>>,
}

impl<'a> RowsMut<'a> {
    fn new(values: &'a mut [f64], dim: usize) -> Self {
        Self { rows: values.chunks_exact_mut(dim).map(Mutex::new).collect() }
    }

    fn take(&self, row: usize) -> Result<MutexGuard<'_, &'a mut [f64]>, Error> {
        self.rows[row].lock().map_err(|_| Error::Internal("a worker thread panicked".into()))
    }
}

/// Collects, from the states of all workers, the rows that were not finite, in order.
fn join(parts: impl IntoIterator<Item = Vec<usize>>) -> Vec<usize> {
    let mut rows: Vec<usize> = parts.into_iter().flatten().collect();
    rows.sort_unstable();
    rows
}

#[cfg(test)]
mod tests;
