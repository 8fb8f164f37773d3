//! Embeddings: gradients that touch few rows of a table.

use super::chunked::{Adder, Sums};
use super::flat::Matrix;
use super::slab::Slab;
use super::{Kind, Parameter, Sketch, Totals, join, take};
use crate::error::Error;
use crate::parallel::share;
use crate::stop::Asker;

impl Sketch {
    /// Adds, for each sample, the gradient of a table of rows of `width` values: row `indices[t]`
    /// gets `values[t]`. `indices` is `[batch, terms]`, `values` `[batch, terms, width]`; terms
    /// whose index is `ignored` are left out. Returns the rows in which a sum was NaN or infinite.
    ///
    /// Rows that occur several times in a sample are summed in f32 in the order of `t` first, as
    /// the dense gradient would be. Takes O(batch · terms · (width + log terms)) time.
    ///
    /// # Errors
    /// [`Error::Shape`] if the arrays do not fit together, [`Error::Argument`] if an index is not
    /// a row of the table; [`Error::Stopped`].
    pub fn add_lookup(
        &self,
        parameter: Parameter,
        indices: &[i64],
        values: &[f32],
        width: usize,
        ignored: Option<i64>,
        batch: usize,
        totals: Totals<'_>,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Vec<usize>, Error> {
        let totals = totals.share(self, batch)?;
        let terms = indices.len().checked_div(batch).unwrap_or(0);
        if terms * batch != indices.len() {
            return Err(Error::shape("indices", format!("{batch} rows"), indices.len()));
        }
        if indices.len().checked_mul(width) != Some(values.len()) {
            return Err(Error::shape(
                "values",
                format!("[{batch}, {terms}, {width}]"),
                values.len(),
            ));
        }
        if terms == 0 || width == 0 {
            return Ok(Vec::new());
        }
        let rows = parameter.len / width as u64;
        if let Some(index) =
            indices.iter().find(|&&index| !u64::try_from(index).is_ok_and(|row| row < rows))
        {
            return Err(Error::argument("indices", format!("from 0 to below {rows}"), index));
        }
        let threads = threads.min(1 + values.len() / (1 << 20));
        let states = share(
            batch,
            threads,
            asker,
            || (Sums::default(), Vec::new(), Vec::new()),
            |(block, slots, bad), sample, watch| {
                let indices = &indices[sample * terms..][..terms];
                let values = &values[sample * terms * width..][..terms * width];
                let mut order: Vec<usize> = (0..terms).collect();
                order.sort_by_key(|&term| indices[term]); // stable: equal rows stay in order
                let row = &totals[sample..=sample];
                let mut guard;
                let mut adder = None;
                if self.kind == Kind::ChunkedSjlt {
                    guard = take(&row[0])?;
                    adder = Some(Adder::new(self, parameter, &mut guard, block));
                }
                let mut finite = true;
                let mut sum = vec![0.0; width];
                for same in order.chunk_by(|&a, &b| indices[a] == indices[b]) {
                    let index = indices[same[0]];
                    if Some(index) == ignored {
                        continue;
                    }
                    sum.copy_from_slice(&values[same[0] * width..][..width]);
                    for &term in &same[1..] {
                        for (sum, value) in sum.iter_mut().zip(&values[term * width..]) {
                            *sum += value;
                        }
                    }
                    let start = index.unsigned_abs() * width as u64;
                    if let Some(adder) = &mut adder {
                        adder.add(start, &sum, slots, watch)?;
                    } else {
                        let view = [&sum[..]];
                        let slab = Slab { start, values: Matrix::new(&view)? };
                        finite &= slab.add_here(self, parameter, row, watch)?.is_empty();
                    }
                }
                finite &= adder.is_none_or(Adder::finish);
                if !finite {
                    bad.push(sample);
                }
                Ok(())
            },
        )?;
        Ok(join(states.into_iter().map(|state| state.2)))
    }
}
