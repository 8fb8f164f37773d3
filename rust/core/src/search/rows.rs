//! Where rows come from: shards, numbered through.

use std::ops::Range;

use crate::error::Error;
use crate::kernels::InstructionSet;
use crate::memory;
use crate::parallel::{collect, share};
use crate::random::absorb;
use crate::sketch::MAX_DIM;
use crate::stop::{Asker, Watch};
use crate::store::{Cursor, READ, Shard};

/// The number of the row of an example, by `[checkpoints, examples]` numbers; none at all stand for
/// one checkpoint, whose rows have the numbers of their examples.
#[inline]
pub(super) fn number(numbers: &[u64], examples: usize, checkpoint: usize, example: usize) -> u64 {
    if numbers.is_empty() { example as u64 } else { numbers[checkpoint * examples + example] }
}

/// Nothing, if there are as many numbers as that takes.
pub(super) fn check_numbers(
    argument: &'static str,
    numbers: &[u64],
    checkpoints: usize,
    examples: usize,
) -> Result<(), Error> {
    if numbers.is_empty() && checkpoints == 1
        || checkpoints.checked_mul(examples) == Some(numbers.len())
    {
        return Ok(());
    }
    Err(Error::shape(argument, format!("[{checkpoints}, {examples}]"), numbers.len()))
}

/// What tells some examples from others: the sum over examples of a hash of each one's rows, times
/// a power of its number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest(pub u64);

impl Digest {
    /// Odd, so that no power of it is nothing.
    const BASE: u64 = 0x9E37_79B9_7F4A_7C15;

    /// Examples from number `first` on, by their hashes.
    pub(super) fn add(&mut self, first: u32, hashes: &[u64]) {
        let mut power = Self::BASE.wrapping_pow(first);
        for &hash in hashes {
            self.0 = self.0.wrapping_add(hash.wrapping_mul(power));
            power = power.wrapping_mul(Self::BASE);
        }
    }

    /// That of `count` examples, and then others.
    pub(super) fn followed(self, count: u32, more: Self) -> Self {
        let after = more.0.wrapping_mul(Self::BASE.wrapping_pow(count));
        Self(self.0.wrapping_add(after))
    }
}

/// A hash of rows so far, and one more of the same example.
pub(super) fn hashed(hash: u64, values: &[f32], scale: f32) -> u64 {
    let checksum = crc32fast::hash(bytemuck::cast_slice(values));
    absorb(hash, u64::from(checksum) << 32 | u64::from(scale.to_bits()))
}

/// Rows in shards, numbered through: those of the first shard, then of the second, and so on.
pub struct Rows {
    shards: Vec<Shard>,
    starts: Vec<u64>,
    /// Empty if all are 1.
    scales: Vec<f32>,
    count: usize,
    dim: usize,
}

impl Rows {
    /// The rows of `shards`, each `dim` wide, with one scale a row.
    ///
    /// # Errors
    /// [`Error::Shape`] if rows have another width, or there are not as many scales as rows;
    /// [`Error::Argument`] unless `1 <= dim <=` [`MAX_DIM`].
    pub fn new(shards: Vec<Shard>, scales: Vec<f32>, dim: usize) -> Result<Self, Error> {
        if dim == 0 || dim > MAX_DIM {
            return Err(Error::argument("dim", format!("from 1 to {MAX_DIM}"), dim));
        }
        let mut total = 0u64;
        let mut starts = Vec::with_capacity(shards.len());
        for shard in &shards {
            if shard.dim() != dim {
                return Err(Error::shape("shards", format!("rows of {dim}"), shard.dim()));
            }
            starts.push(total);
            total = total.saturating_add(shard.rows());
        }
        if total != scales.len() as u64 {
            return Err(Error::shape("scales", format!("{total} values"), scales.len()));
        }
        let count = scales.len();
        let scales = if scales.iter().all(|&scale| scale == 1.0) { Vec::new() } else { scales };
        Ok(Self { shards, starts, scales, count, dim })
    }

    /// The width of a row.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The number of rows.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.count as u64
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Appends the scales of some rows.
    fn add_scales(&self, rows: Range<usize>, scales: &mut Vec<f32>) {
        if self.scales.is_empty() {
            scales.resize(scales.len() + rows.len(), 1.0);
        } else {
            scales.extend_from_slice(&self.scales[rows]);
        }
    }

    /// Reads the rows with these numbers, stored values and scales apart.
    ///
    /// # Errors
    /// [`Error::Argument`] if a number is not that of a row; as [`Shard::read`].
    pub fn read(
        &self,
        numbers: &[u64],
        values: &mut [f32],
        scales: &mut Vec<f32>,
        cursor: &mut Cursor,
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        scales.clear();
        let mut steps = watch.steps();
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
            steps.add(READ + out.len())?;
            self.shards[shard].read(at, out, cursor, watch)?;
            self.add_scales(first as usize..first as usize + run, scales);
            done += run;
        }
        Ok(())
    }

    /// The rows with these numbers, where they lie if that is together and in memory or in a map,
    /// or read into `values`; their scales go into `scales`.
    ///
    /// # Errors
    /// As [`Rows::read`].
    pub(super) fn lend<'a>(
        &'a self,
        numbers: &[u64],
        values: &'a mut Vec<f32>,
        scales: &mut Vec<f32>,
        cursor: &mut Cursor,
        watch: &Watch<'_>,
    ) -> Result<&'a [f32], Error> {
        if let (Some(&first), Some(&last)) = (numbers.first(), numbers.last())
            && last < self.len()
            && numbers.windows(2).all(|pair| pair[0].checked_add(1) == Some(pair[1]))
        {
            let shard = self.starts.partition_point(|&start| start <= first) - 1;
            let at = first - self.starts[shard];
            if let Some(lent) = self.shards[shard].lent(at, numbers.len(), watch)? {
                scales.clear();
                self.add_scales(first as usize..last as usize + 1, scales);
                return Ok(lent);
            }
        }
        values.resize(numbers.len() * self.dim, 0.0);
        self.read(numbers, values, scales, cursor, watch)?;
        Ok(values)
    }

    /// The same rows in the order of these numbers, in memory as they are stored.
    ///
    /// # Errors
    /// [`Error::Argument`] if a number is not that of a row; as [`Shard::read`].
    pub fn gathered(&self, numbers: &[u64], watch: &Watch<'_>) -> Result<Self, Error> {
        let mut places = Vec::with_capacity(numbers.len());
        let mut scales = Vec::with_capacity(numbers.len());
        let mut steps = watch.steps();
        for &number in numbers {
            steps.add(10)?;
            if number >= self.len() {
                return Err(Error::argument("rows", format!("below {}", self.len()), number));
            }
            let shard = self.starts.partition_point(|&start| start <= number) - 1;
            places.push((shard, number - self.starts[shard]));
            self.add_scales(number as usize..number as usize + 1, &mut scales);
        }
        let mut shards = Vec::new();
        if !self.shards.is_empty() {
            let cursor = &mut Cursor::default();
            shards.push(Shard::gathered(&self.shards, &places, cursor, watch)?);
        }
        Self::new(shards, scales, self.dim)
    }

    /// The norm of every row, scaled, in f64 rounded up to f32.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a row holds a NaN or an infinity, or its norm exceeds f32;
    /// [`Error::Io`]; [`Error::Stopped`].
    pub fn norms(&self, threads: usize, asker: &Asker<'_>) -> Result<Vec<f32>, Error> {
        const STEP: usize = 256;
        let rows = self.count;
        let parts = collect(
            rows.div_ceil(STEP),
            threads,
            asker,
            || (Vec::new(), Cursor::default(), Vec::new()),
            |(values, cursor, scales), job, watch| {
                let first = job * STEP;
                let numbers: Vec<u64> = (first as u64..rows.min(first + STEP) as u64).collect();
                values.resize(numbers.len() * self.dim, 0.0);
                self.read(&numbers, values, scales, cursor, watch)?;
                let norms = values.chunks_exact(self.dim).zip(&*scales).map(|(row, &scale)| {
                    watch.check()?;
                    let norm = InstructionSet::best().squares(row).sqrt() * f64::from(scale);
                    Ok(((norm * (1.0 + 1e-9)) as f32).next_up())
                });
                let norms = norms.collect::<Result<Vec<f32>, Error>>()?;
                if let Some(at) = norms.iter().position(|norm| !norm.is_finite()) {
                    return Err(Error::NotFinite {
                        argument: "rows",
                        place: format!("the norm of row {}", first + at),
                        value: f64::from(norms[at]),
                    });
                }
                Ok(norms)
            },
        )?;
        Ok(parts.concat())
    }

    /// What tells the first `count` examples from others: with `[checkpoints, examples]` numbers of
    /// their rows, or none for one checkpoint whose rows have the numbers of their examples.
    ///
    /// # Errors
    /// [`Error::Shape`] if the numbers do not fit; as [`Rows::read`]; [`Error::Stopped`].
    pub fn digest(
        &self,
        numbers: &[u64],
        (checkpoints, examples): (usize, usize),
        count: usize,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Digest, Error> {
        const STEP: usize = 256;
        check_numbers("numbers", numbers, checkpoints, examples)?;
        if count > examples || u32::try_from(count).is_err() {
            return Err(Error::argument("count", format!("at most {examples}"), count));
        }
        let parts = share(
            count.div_ceil(STEP),
            threads,
            asker,
            || (Digest::default(), Vec::new(), Vec::new(), Cursor::default()),
            |(digest, values, scales, cursor), job, watch| {
                let here = job * STEP..count.min((job + 1) * STEP);
                let mut hashes = vec![0; here.len()];
                for checkpoint in 0..checkpoints {
                    let row = |example| number(numbers, examples, checkpoint, example);
                    let numbers: Vec<u64> = here.clone().map(row).collect();
                    let values = self.lend(&numbers, values, scales, cursor, watch)?;
                    for ((hash, row), &scale) in
                        hashes.iter_mut().zip(values.chunks_exact(self.dim)).zip(&*scales)
                    {
                        watch.check()?;
                        *hash = hashed(*hash, row, scale);
                    }
                }
                digest.add(here.start as u32, &hashes);
                Ok(())
            },
        )?;
        Ok(Digest(parts.iter().fold(0, |sum, (part, ..)| sum.wrapping_add(part.0))))
    }

    /// Whether no row is in a file.
    #[must_use]
    pub fn in_memory(&self) -> bool {
        self.shards.iter().all(Shard::is_in_memory)
    }

    /// Bytes it takes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let shards: usize = self.shards.iter().map(Shard::bytes).sum();
        shards + 8 * self.starts.len() + 4 * self.scales.len()
    }

    /// The rows with these numbers, `[numbers, dim]`, scaled back.
    ///
    /// # Errors
    /// As [`Rows::read`]; [`Error::Shape`] if they are more than memory could hold.
    pub fn scaled(&self, numbers: &[u64], watch: &Watch<'_>) -> Result<Vec<f32>, Error> {
        if let Some(number) = numbers.iter().find(|&&number| number >= self.len()) {
            return Err(Error::argument("rows", format!("below {}", self.len()), number));
        }
        let size = numbers.len().checked_mul(self.dim);
        let room = size.map(|size| memory::try_filled(size, 0.0, watch)).transpose()?.flatten();
        let mut values = room
            .ok_or_else(|| Error::shape("rows", "fewer than memory could hold", numbers.len()))?;
        let mut scales = Vec::new();
        self.read(numbers, &mut values, &mut scales, &mut Cursor::default(), watch)?;
        let mut steps = watch.steps();
        for (row, scale) in values.chunks_exact_mut(self.dim).zip(scales) {
            steps.add(row.len())?;
            for value in row {
                *value *= scale;
            }
        }
        Ok(values)
    }
}
