//! Gradients that are already there, as `[batch, coordinates]` arrays.

use half::{bf16, f16};

use super::{Adder, Parameter, RowsMut, SLOTS, Sketch, join};
use crate::error::Error;
use crate::kernels::{InstructionSet, LANES, Slot};
use crate::parallel::share;
use crate::stop::Asker;

/// A type that gradients come in.
pub trait Value: Copy + Sync {
    /// Zero.
    const ZERO: Self;
    /// The same number as f32; exact.
    fn widen(self) -> f32;
    /// [`InstructionSet::scatter`] of values of this type.
    fn scatter(set: InstructionSet, slots: &[Slot], values: &[Self], block: &mut [f32]);
}

impl Value for f32 {
    const ZERO: Self = 0.0;
    fn widen(self) -> f32 {
        self
    }
    fn scatter(set: InstructionSet, slots: &[Slot], values: &[Self], block: &mut [f32]) {
        set.scatter(slots, values, block);
    }
}

/// Widens a few chunks at a time into a buffer that stays in the first cache.
fn scatter_widened<T: Value>(
    set: InstructionSet,
    slots: &[Slot],
    values: &[T],
    block: &mut [f32],
    widen: impl Fn(&[T], &mut [f32]),
) {
    const CHUNKS: usize = 32;
    let mut buffer = [0.0; CHUNKS * LANES];
    for (slots, values) in slots.chunks(CHUNKS).zip(values.chunks(CHUNKS * LANES)) {
        let wide = &mut buffer[..values.len()];
        widen(values, wide);
        set.scatter(slots, wide, block);
    }
}

impl Value for f16 {
    const ZERO: Self = f16::ZERO;
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn scatter(set: InstructionSet, slots: &[Slot], values: &[Self], block: &mut [f32]) {
        scatter_widened(set, slots, values, block, |from, to| set.widen(from, to));
    }
}

impl Value for bf16 {
    const ZERO: Self = bf16::ZERO;
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn scatter(set: InstructionSet, slots: &[Slot], values: &[Self], block: &mut [f32]) {
        scatter_widened(
            set,
            slots,
            values,
            block,
            half::slice::HalfFloatSliceExt::convert_to_f32_slice,
        );
    }
}

impl Sketch {
    /// Adds `values`, `[batch, width]`, at the coordinates `start..start + width` of `parameter`
    /// to `totals`, `[batch, dim]`. Returns the rows in which a sum was NaN or infinite.
    ///
    /// Takes O(batch · width) time and O(threads · dim) memory.
    ///
    /// # Errors
    /// [`Error::Shape`] if `totals` is not `[batch, dim]`, `values` does not divide into `batch`
    /// rows, or the coordinates go past the parameter's end; [`Error::Stopped`].
    pub fn add_flat<T: Value>(
        &self,
        parameter: Parameter,
        start: u64,
        values: &[T],
        batch: usize,
        totals: &mut [f64],
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Vec<usize>, Error> {
        self.check_totals(totals, batch)?;
        let width = values.len().checked_div(batch).unwrap_or(0);
        if width * batch != values.len() {
            return Err(Error::shape("values", format!("{batch} rows"), values.len()));
        }
        if start.checked_add(width as u64).is_none_or(|end| end > parameter.len) {
            return Err(Error::shape(
                "values",
                format!("at most {} wide from coordinate {start}", parameter.len),
                width,
            ));
        }
        if width == 0 {
            return Ok(Vec::new());
        }
        let totals = RowsMut::new(totals, self.dim);
        // Threads cost more than the work below about a million values each.
        let threads = threads.min(1 + values.len() / (1 << 20));
        let states = share(
            batch,
            threads,
            asker,
            || (Vec::new(), Box::new([Slot::default(); SLOTS]), Vec::new()),
            |(block, slots, bad), row, watch| {
                let mut total = totals.take(row)?;
                let mut adder = Adder::new(self, parameter, &mut total, block);
                adder.add(start, &values[row * width..][..width], slots, watch)?;
                if !adder.finish() {
                    bad.push(row);
                }
                Ok(())
            },
        )?;
        Ok(join(states.into_iter().map(|state| state.2)))
    }
}
