//! The chunked sparse Johnson-Lindenstrauss map, the default kind.
//!
//! The coordinates of a parameter, in row-major order, form chunks of 16. Chunk `c` has one offset
//! `h(c)`, uniform over the `dim` buckets, and 16 signs; coordinate `16 c + i` is added to bucket
//! `h(c) xor i` with sign `i`. So a chunk goes to 16 neighbouring sums that begin at a multiple of
//! 16, one line of the cache, in one of 16 orders. Two coordinates of different chunks meet with
//! probability `1/dim`, for one of all `h` takes the second to where the first is; two of one chunk
//! never do. Inner products of such rows are unbiased estimates of those of the gradients, with
//! variance `(1/dim) sum over i, j in different chunks of (x_i^2 y_j^2 + x_i y_i x_j y_j)`, which is
//! at most `(|x|^2 |y|^2 + (x.y)^2) / dim`.
//!
//! Where `dim` is no multiple of 16, its last 16 to 31 buckets form a ring (all of them, if there are
//! fewer than 32): with an offset there, coordinate `16 c + i` is added `i` buckets on, around the
//! ring. The law is the same, but for a `dim` below 16, where a chunk meets itself.
//!
//! Sums: a parameter is cut into super-blocks of 2^18 coordinates (or of 64 rows' worth, if that
//! is more); each is summed in f32 from zero, chunk by chunk, then added to the row's f64 total.
//! Super-blocks with fewer than `dim` coordinates are added to the total directly.

use std::ops::Range;

use super::flat::{Matrix, Value};
use super::{Parameter, Row, Sketch, join, take};
use crate::error::Error;
use crate::kernels::{LANES, Slot};
use crate::parallel::share;
use crate::stop::{Asker, Watch};

/// The fewest coordinates summed in f32 before they are added to the f64 total.
const SUPER_BLOCK: u64 = 1 << 18;
/// Chunks whose slots are computed at a time: 16 KiB of slots for 128 KiB of values.
const SLOTS: usize = 2048;
/// Samples that share the slots.
const GROUP: usize = 16;
/// Samples that are added chunk by chunk together.
const ABREAST: usize = 4;
const WIDTH: u64 = LANES as u64;

/// Coordinates summed in f32 before they are added to the f64 total: a power of two.
fn super_block(dim: usize) -> u64 {
    SUPER_BLOCK.max((64 * dim as u64).next_power_of_two())
}

/// Some coordinates of a parameter that go in together: whole chunks of one super-block, or a part
/// of one chunk.
struct Piece<'a> {
    /// The first chunk.
    chunk: u64,
    /// The lane of the first coordinate in its chunk.
    lane: usize,
    /// The first value, counted from the start of the walk, and the end.
    from: usize,
    to: usize,
    slots: &'a [Slot],
}

impl Piece<'_> {
    fn is_whole(&self) -> bool {
        self.to - self.from == self.slots.len() * LANES
    }
}

impl Sketch {
    /// Calls `work` for pieces that make up the `width` coordinates from `start` on, in order.
    fn walk(
        &self,
        parameter: Parameter,
        start: u64,
        width: usize,
        slots: &mut Vec<Slot>,
        watch: &Watch<'_>,
        mut work: impl FnMut(&Piece<'_>),
    ) -> Result<(), Error> {
        slots.resize(SLOTS, Slot::default());
        let block = super_block(self.dim);
        let mut from = 0;
        while from < width {
            watch.check()?;
            let at = start + from as u64;
            let (chunk, lane) = (at / WIDTH, (at % WIDTH) as usize);
            let left = width - from;
            let count = if lane > 0 || left < LANES {
                1
            } else {
                (left / LANES).min(SLOTS).min(((block - at % block) / WIDTH) as usize)
            };
            let to = from + left.min(count * LANES - lane);
            self.set.slots(parameter.key, self.dim, chunk, &mut slots[..count]);
            work(&Piece { chunk, lane, from, to, slots: &slots[..count] });
            from = to;
        }
        Ok(())
    }
}

/// Sums from zero, which begin a line of the cache as 16 of them do.
#[derive(Default)]
pub(super) struct Sums(Vec<f32>);

impl Sums {
    /// The sums, of which there are as many as in an earlier call.
    fn of(&mut self, count: usize) -> &mut [f32] {
        if self.0.is_empty() {
            self.0.resize(count + LANES, 0.0);
        }
        // Past the end, if the address is not known: only speed depends on it.
        let first = self.0.as_ptr().align_offset(LANES * size_of::<f32>()).min(LANES);
        &mut self.0[first..first + count]
    }
}

/// Adds values of one parameter to one row.
pub(super) struct Adder<'a> {
    sketch: &'a Sketch,
    parameter: Parameter,
    total: &'a mut [f64],
    /// The sums of the current super-block: `dim` buckets and the overhang of the ring.
    block: &'a mut [f32],
    super_block: u64,
    /// Values that [`Adder::sums`] was asked for since the last flush.
    since_flush: u64,
    used: bool,
    finite: bool,
}

impl<'a> Adder<'a> {
    /// `sums` is scratch: new, or as an earlier adder of the same sketch left it.
    pub(super) fn new(
        sketch: &'a Sketch,
        parameter: Parameter,
        total: &'a mut [f64],
        sums: &'a mut Sums,
    ) -> Self {
        Self {
            sketch,
            parameter,
            total,
            block: sums.of(sketch.dim + LANES),
            super_block: 0,
            since_flush: 0,
            used: false,
            finite: true,
        }
    }

    /// Adds `values` at the coordinates from `start` on. Calls must come in order of `start`.
    pub(super) fn add<T: Value>(
        &mut self,
        start: u64,
        values: &[T],
        slots: &mut Vec<Slot>,
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        let (sketch, parameter) = (self.sketch, self.parameter);
        sketch.walk(parameter, start, values.len(), slots, watch, |piece| {
            self.add_piece(piece, &values[piece.from..piece.to]);
        })
    }

    /// The f32 sums of the super-block that a piece is in; none if its values are added to the
    /// total directly.
    fn sums_of(&mut self, piece: &Piece<'_>) -> Option<&mut [f32]> {
        let block = super_block(self.sketch.dim);
        let super_block = piece.chunk * WIDTH / block;
        if super_block != self.super_block {
            self.flush();
            self.super_block = super_block;
        }
        if (self.parameter.len - super_block * block).min(block) < self.sketch.dim as u64 {
            return None;
        }
        self.used = true;
        Some(self.block)
    }

    fn add_piece<T: Value>(&mut self, piece: &Piece<'_>, values: &[T]) {
        let mut padded = [T::ZERO; LANES];
        let whole = if piece.is_whole() {
            values
        } else {
            // The other lanes are zeros, which change nothing.
            padded[piece.lane..piece.lane + values.len()].copy_from_slice(values);
            &padded
        };
        let set = self.sketch.set;
        if let Some(sums) = self.sums_of(piece) {
            T::scatter(set, [piece.slots], [whole], [sums]);
        } else {
            self.add_directly(piece.slots, whole);
        }
    }

    /// Whether the parameter is so small that its values are added to the total directly.
    pub(super) fn is_direct(&self) -> bool {
        self.parameter.len < self.sketch.dim as u64
    }

    /// The f32 sums, for chunks of `values` values that need not follow each other; they are
    /// flushed now and then.
    pub(super) fn sums(&mut self, values: usize) -> &mut [f32] {
        if self.since_flush >= super_block(self.sketch.dim) {
            self.flush();
        }
        self.used = true;
        self.since_flush += values as u64;
        self.block
    }

    /// Adds whole chunks that need not follow each other.
    pub(super) fn add_anywhere(&mut self, slots: &[Slot], values: &[f32]) {
        if self.is_direct() {
            self.add_directly(slots, values);
        } else {
            let set = self.sketch.set;
            set.scatter([slots], [values], [self.sums(values.len())]);
        }
    }

    fn add_directly<T: Value>(&mut self, slots: &[Slot], values: &[T]) {
        let dim = self.sketch.dim;
        for (slot, chunk) in slots.iter().zip(values.as_chunks::<LANES>().0) {
            let mut signed = [0.0; LANES];
            for (lane, (signed, value)) in signed.iter_mut().zip(chunk).enumerate() {
                let sign = u32::from(slot.signs() >> lane & 1) << 31;
                *signed = f32::from_bits(value.widen().to_bits() ^ sign);
            }
            self.finite &= signed.iter().all(|value| value.is_finite());
            for (lane, signed) in signed.into_iter().enumerate() {
                self.total[slot.bucket(lane, dim)] += f64::from(signed);
            }
        }
    }

    /// Adds the sums of the current super-block to the total.
    fn flush(&mut self) {
        if !self.used {
            return;
        }
        let dim = self.sketch.dim;
        let ring = Slot::ring(dim);
        for lane in (0..LANES).take_while(|_| ring < dim) {
            let overhang = std::mem::take(&mut self.block[dim + lane]);
            self.block[ring + lane % (dim - ring)] += overhang;
        }
        self.finite &= self.sketch.set.flush(&mut self.block[..dim], self.total);
        self.used = false;
        self.since_flush = 0;
    }

    /// Ends the row; `false` if a sum was NaN or infinite.
    pub(super) fn finish(mut self) -> bool {
        self.flush();
        self.finite
    }
}

/// What a worker keeps between jobs.
#[derive(Default)]
struct Scratch {
    blocks: Vec<Sums>,
    slots: Vec<Slot>,
    bad: Vec<usize>,
}

/// Adds the coordinates from `start` on of all samples; returns the rows that are not finite.
pub(super) fn add_flat<T: Value>(
    sketch: &Sketch,
    parameter: Parameter,
    start: u64,
    matrix: Matrix<'_, T>,
    rows: &[Row<'_>],
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Vec<usize>, Error> {
    let batch = rows.len();
    // Threads cost more than the work below about half a million values each.
    let threads = threads.min(1 + batch.saturating_mul(matrix.width()) / (1 << 19));
    let few = batch < ABREAST && matrix.width() as u64 >= 2 * super_block(sketch.dim);
    if threads > batch || few {
        return add_long(sketch, parameter, start, matrix, rows, threads, asker);
    }
    let group = batch.div_ceil(threads).min(GROUP);
    let states =
        share(batch.div_ceil(group), threads, asker, Scratch::default, |mine, job, watch| {
            let first = job * group;
            let here = first..batch.min(first + group);
            let mut totals = rows[here.clone()].iter().map(take).collect::<Result<Vec<_>, _>>()?;
            mine.blocks.resize_with(group, Sums::default);
            let pairs = totals.iter_mut().zip(&mut mine.blocks);
            let mut adders: Vec<_> =
                pairs.map(|(total, block)| Adder::new(sketch, parameter, total, block)).collect();
            sketch.walk(parameter, start, matrix.width(), &mut mine.slots, watch, |piece| {
                let values = |row: usize| &matrix.row(here.start + row)[piece.from..piece.to];
                for (index, adders) in adders.chunks_mut(ABREAST).enumerate() {
                    let row = index * ABREAST;
                    if let ([a, b, c, d], true) = (&mut *adders, piece.is_whole())
                        && let (Some(a), Some(b)) = (a.sums_of(piece), b.sums_of(piece))
                        && let (Some(c), Some(d)) = (c.sums_of(piece), d.sums_of(piece))
                    {
                        let rows = [values(row), values(row + 1), values(row + 2), values(row + 3)];
                        T::scatter(sketch.set, [piece.slots; ABREAST], rows, [a, b, c, d]);
                        continue;
                    }
                    for (adder, row) in adders.iter_mut().zip(row..) {
                        adder.add_piece(piece, values(row));
                    }
                }
            })?;
            for (adder, row) in adders.into_iter().zip(here) {
                if !adder.finish() {
                    mine.bad.push(row);
                }
            }
            Ok(())
        })?;
    Ok(join(states.into_iter().map(|state| state.bad)))
}

/// What a worker keeps that sums super-blocks side by side.
#[derive(Default)]
struct Side {
    scratch: [Sums; ABREAST],
    slots: [Vec<Slot>; ABREAST],
    /// Super-blocks, their sums, and whether these are finite.
    done: Vec<(u64, Vec<f64>, bool)>,
}

impl Side {
    /// Sums the super-blocks of at most [`ABREAST`] that `range` is in.
    fn add<T: Value>(
        &mut self,
        sketch: &Sketch,
        parameter: Parameter,
        range: Range<u64>,
        values: &[T],
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        let block = super_block(sketch.dim);
        let blocks = range.start / block..range.end.div_ceil(block);
        let mut sums = vec![vec![0.0; sketch.dim]; (blocks.end - blocks.start) as usize];
        let pairs = sums.iter_mut().zip(&mut self.scratch).zip(blocks.clone());
        let mut adders: Vec<_> = pairs
            .map(|((sum, scratch), super_block)| {
                let adder = Adder::new(sketch, parameter, sum, scratch);
                Adder { super_block, ..adder }
            })
            .collect();
        let whole = range.start.is_multiple_of(block) && range.end.is_multiple_of(block);
        let width = block as usize;
        if let ([a, b, c, d], true) = (&mut adders[..], whole) {
            for adder in [&mut *a, b, c, d] {
                adder.used = true;
            }
            for from in (0..width).step_by(SLOTS * LANES) {
                watch.check()?;
                let count = (width - from).min(SLOTS * LANES);
                for (slots, at) in self.slots.iter_mut().zip((range.start..).step_by(width)) {
                    slots.resize(count / LANES, Slot::default());
                    let chunk = (at + from as u64) / WIDTH;
                    sketch.set.slots(parameter.key, sketch.dim, chunk, slots);
                }
                let slots = self.slots.each_ref().map(|slots| &slots[..]);
                let rows = [0, 1, 2, 3].map(|row| &values[row * width + from..][..count]);
                let blocks = [&mut *a, b, c, d].map(|adder| &mut adder.block[..]);
                T::scatter(sketch.set, slots, rows, blocks);
            }
        } else {
            for (adder, at) in adders.iter_mut().zip(blocks.clone()) {
                let from = (at * block).max(range.start);
                let to = ((at + 1) * block).min(range.end);
                let values = &values[(from - range.start) as usize..(to - range.start) as usize];
                adder.add(from, values, &mut self.slots[0], watch)?;
            }
        }
        let finite: Vec<bool> = adders.into_iter().map(Adder::finish).collect();
        let sums = blocks.zip(sums).zip(finite);
        self.done.extend(sums.map(|((at, sum), finite)| (at, sum, finite)));
        Ok(())
    }
}

/// Adds few rows: their super-blocks are summed side by side, by several threads and chunk by chunk
/// together, and added in order.
fn add_long<T: Value>(
    sketch: &Sketch,
    parameter: Parameter,
    start: u64,
    matrix: Matrix<'_, T>,
    rows: &[Row<'_>],
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Vec<usize>, Error> {
    /// Super-blocks a thread sums before all are added.
    const WAVE: u64 = 8;
    let block = super_block(sketch.dim);
    let end = start + matrix.width() as u64;
    let mut bad = Vec::new();
    for (row, totals) in rows.iter().enumerate() {
        let values = matrix.row(row);
        let mut finite = true;
        let (mut first, mut last) = (start / block, end.div_ceil(block));
        // A short super-block at the parameter's end is added to the total value by value.
        let short = parameter.len - (last - 1) * block < sketch.dim as u64;
        last -= u64::from(short);
        while first < last {
            let count = (last - first).min(WAVE * threads as u64);
            let jobs = (count as usize).div_ceil(ABREAST);
            let states = share(jobs, threads, asker, Side::default, |side, job, watch| {
                let begin = first + (job * ABREAST) as u64;
                let blocks = begin..(first + count).min(begin + ABREAST as u64);
                let range = (blocks.start * block).max(start)..(blocks.end * block).min(end);
                let values = &values[(range.start - start) as usize..(range.end - start) as usize];
                side.add(sketch, parameter, range, values, watch)
            })?;
            let mut sums: Vec<_> = states.into_iter().flat_map(|state| state.done).collect();
            sums.sort_unstable_by_key(|sum| sum.0);
            let mut total = take(totals)?;
            for (_, sum, each) in sums {
                finite &= each;
                for (total, sum) in total.iter_mut().zip(sum) {
                    *total += sum;
                }
            }
            first += count;
        }
        if short {
            let from = (last * block).max(start);
            let values = &values[(from - start) as usize..];
            let states = share(
                1,
                1,
                asker,
                || true,
                |finite, _, watch| {
                    let mut scratch = Sums::default();
                    let mut total = take(totals)?;
                    let mut adder = Adder::new(sketch, parameter, &mut total, &mut scratch);
                    adder.add(from, values, &mut Vec::new(), watch)?;
                    *finite = adder.finish();
                    Ok(())
                },
            )?;
            finite &= states.into_iter().all(|each| each);
        }
        if !finite {
            bad.push(row);
        }
    }
    Ok(bad)
}
