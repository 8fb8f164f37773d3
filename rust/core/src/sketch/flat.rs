//! Gradients that are already there, as `[batch, coordinates]` arrays.

use half::{bf16, f16};

use super::slab::{self, Slab};
use super::{Kind, Parameter, Sketch, Totals, chunked};
use crate::error::Error;
use crate::kernels::{InstructionSet, Slot};
use crate::stop::Asker;

/// A type that gradients come in.
pub trait Value: Copy + Sync {
    /// Zero.
    const ZERO: Self;
    /// The same number as f32; exact.
    fn widen(self) -> f32;
    /// [`InstructionSet::scatter`] of values of this type.
    fn scatter<const N: usize>(
        set: InstructionSet,
        slots: [&[Slot]; N],
        values: [&[Self]; N],
        blocks: [&mut [f32]; N],
    );
    /// The values themselves, if they are f32.
    fn as_f32(values: &[Self]) -> Option<&[f32]>;
}

impl Value for f32 {
    const ZERO: Self = 0.0;
    fn widen(self) -> f32 {
        self
    }
    fn scatter<const N: usize>(
        set: InstructionSet,
        slots: [&[Slot]; N],
        values: [&[Self]; N],
        blocks: [&mut [f32]; N],
    ) {
        set.scatter(slots, values, blocks);
    }
    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }
}

impl Value for f16 {
    const ZERO: Self = f16::ZERO;
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn scatter<const N: usize>(
        set: InstructionSet,
        slots: [&[Slot]; N],
        values: [&[Self]; N],
        blocks: [&mut [f32]; N],
    ) {
        set.scatter_f16(slots, values, blocks);
    }
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
}

impl Value for bf16 {
    const ZERO: Self = bf16::ZERO;
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn scatter<const N: usize>(
        set: InstructionSet,
        slots: [&[Slot]; N],
        values: [&[Self]; N],
        blocks: [&mut [f32]; N],
    ) {
        set.scatter_bf16(slots, values, blocks);
    }
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
}

/// A borrowed `[rows, width]` array whose rows lie anywhere.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    rows: &'a [&'a [T]],
    from: usize,
    width: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// The array of these rows.
    ///
    /// # Errors
    /// [`Error::Shape`] if they are not of one width.
    pub fn new(rows: &'a [&'a [T]]) -> Result<Self, Error> {
        let width = rows.first().map_or(0, |row| row.len());
        match rows.iter().find(|row| row.len() != width) {
            Some(row) => Err(Error::shape("values", format!("rows of {width}"), row.len())),
            None => Ok(Self { rows, from: 0, width }),
        }
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    pub(super) fn row(&self, row: usize) -> &'a [T] {
        &self.rows[row][self.from..][..self.width]
    }

    /// `count` rows from `first` on.
    pub(super) fn some(self, first: usize, count: usize) -> Self {
        Self { rows: &self.rows[first..first + count], ..self }
    }

    /// `width` columns from `first` on.
    pub(super) fn columns(self, first: usize, width: usize) -> Self {
        Self { from: self.from + first, width, ..self }
    }
}

/// Samples that are widened at a time: 16 MiB.
const GROUP: usize = 64;

impl Sketch {
    /// Adds `values`, `[batch, width]`, at the coordinates `start..start + width` of `parameter`
    /// to `totals`. Returns the rows in which a sum was NaN or infinite.
    ///
    /// Takes O(batch · width) time for the sparse kinds and O(threads · dim) memory.
    ///
    /// # Errors
    /// [`Error::Shape`] if `totals` has another batch, or the coordinates go past the parameter's
    /// end; [`Error::Stopped`].
    pub fn add_flat<T: Value>(
        &self,
        parameter: Parameter,
        start: u64,
        values: Matrix<'_, T>,
        totals: Totals<'_>,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Vec<usize>, Error> {
        let rows = totals.share(self, values.rows.len())?;
        if start.checked_add(values.width as u64).is_none_or(|end| end > parameter.len) {
            return Err(Error::shape(
                "values",
                format!("at most {} wide from coordinate {start}", parameter.len),
                values.width,
            ));
        }
        if values.width == 0 || values.rows.is_empty() {
            return Ok(Vec::new());
        }
        if self.kind == Kind::ChunkedSjlt {
            return chunked::add_flat(self, parameter, start, values, &rows, threads, asker);
        }
        let narrow: Vec<&[f32]> = values.rows.iter().filter_map(|row| T::as_f32(row)).collect();
        if narrow.len() == values.rows.len() {
            let slab =
                Slab { start, values: Matrix { rows: &narrow, from: 0, width: values.width } };
            return slab.add(self, parameter, &rows, threads, asker);
        }
        let mut bad = Vec::new();
        let mut wide = Vec::new();
        for (first, rows) in (0..).step_by(GROUP).zip(rows.chunks(GROUP)) {
            for (from, width) in slab::pieces(start, values.width) {
                wide.clear();
                for row in first..first + rows.len() {
                    wide.extend(values.row(row)[from..][..width].iter().map(|value| value.widen()));
                }
                let start = start + from as u64;
                let views: Vec<&[f32]> = wide.chunks_exact(width).collect();
                let slab = Slab { start, values: Matrix::new(&views)? };
                let here = slab.add(self, parameter, rows, threads, asker)?;
                bad.push(here.into_iter().map(|row| first + row).collect());
            }
        }
        Ok(super::join(bad))
    }
}
