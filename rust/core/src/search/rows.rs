//! Where rows come from: shards, numbered through.

use crate::error::Error;
use crate::sketch::MAX_DIM;
use crate::store::{Cursor, Shard};

/// Rows in shards, numbered through: those of the first shard, then of the second, and so on.
pub struct Rows {
    shards: Vec<Shard>,
    starts: Vec<u64>,
    scales: Vec<f32>,
    dim: usize,
}

impl Rows {
    /// The rows of `shards`, each `dim` wide, with one scale a row.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not as many scales as rows; [`Error::Argument`] unless
    /// `1 <= dim <=` [`MAX_DIM`].
    pub fn new(shards: Vec<Shard>, scales: Vec<f32>, dim: usize) -> Result<Self, Error> {
        if dim == 0 || dim > MAX_DIM {
            return Err(Error::argument("dim", format!("from 1 to {MAX_DIM}"), dim));
        }
        let mut total = 0u64;
        let mut starts = Vec::with_capacity(shards.len());
        for shard in &shards {
            starts.push(total);
            total = total.saturating_add(shard.rows());
        }
        if total != scales.len() as u64 {
            return Err(Error::shape("scales", format!("{total} values"), scales.len()));
        }
        Ok(Self { shards, starts, scales, dim })
    }

    /// The width of a row.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The number of rows.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.scales.len() as u64
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.scales.is_empty()
    }

    /// Reads the rows with these numbers, stored values and scales apart.
    ///
    /// # Errors
    /// [`Error::Argument`] if a number is not that of a row; [`Error::Io`].
    pub fn read(
        &self,
        numbers: &[u64],
        values: &mut [f32],
        scales: &mut Vec<f32>,
        cursor: &mut Cursor,
    ) -> Result<(), Error> {
        scales.clear();
        let mut done = 0;
        while done < numbers.len() {
            let first = numbers[done];
            if first >= self.len() {
                return Err(Error::argument("rows", format!("below {}", self.len()), first));
            }
            // The last shard that starts at or before the row; empty ones start with their heirs.
            let shard = self.starts.partition_point(|&start| start <= first) - 1;
            let at = first - self.starts[shard];
            let left = self.shards[shard].rows() - at;
            let run = numbers[done..]
                .iter()
                .zip(first..first + left)
                .take_while(|&(&number, expected)| number == expected)
                .count();
            let out = &mut values[done * self.dim..(done + run) * self.dim];
            self.shards[shard].read(at, out, cursor)?;
            scales.extend_from_slice(&self.scales[first as usize..first as usize + run]);
            done += run;
        }
        Ok(())
    }

    /// The rows with these numbers, `[numbers, dim]`, scaled back.
    ///
    /// # Errors
    /// As [`Rows::read`]; [`Error::Shape`] if they are more than memory could hold.
    pub fn scaled(&self, numbers: &[u64]) -> Result<Vec<f32>, Error> {
        if let Some(number) = numbers.iter().find(|&&number| number >= self.len()) {
            return Err(Error::argument("rows", format!("below {}", self.len()), number));
        }
        let size = numbers
            .len()
            .checked_mul(self.dim)
            .ok_or_else(|| Error::shape("rows", "fewer than memory could hold", numbers.len()))?;
        let mut values = vec![0.0; size];
        let mut scales = Vec::new();
        self.read(numbers, &mut values, &mut scales, &mut Cursor::default())?;
        for (row, scale) in values.chunks_exact_mut(self.dim).zip(scales) {
            for value in row {
                *value *= scale;
            }
        }
        Ok(values)
    }
}
