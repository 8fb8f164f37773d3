//! Linear layers: the gradient `sum over t of left[t] right[t]^T` of each sample, never stored.
//!
//! The gradient is made a tile of 8 x 32 at a time. Where its rows are whole chunks of the sketch,
//! tiles go straight from the registers into the chunked sketch: part by part of 256 x 256, and in
//! it 16 rows after 16 rows, down each tile column; the sum in f32 has that order then. Else strips
//! of rows are put together first, and go in as a flat gradient would. Which it is depends on kind
//! and shape alone. No buffer of the parameter's size exists for a sample.
//!
//! The sum of all samples' gradients is the batch's own weight gradient, and comes from the same
//! tiles if it is asked for.

use std::ops::Range;
use std::sync::Mutex;

use super::chunked::{Adder, Sums};
use super::flat::Matrix;
use super::slab::{self, Slab};
use super::{Kind, Parameter, Row, Sketch, Totals, join, take};
use crate::error::Error;
use crate::kernels::{InstructionSet, LANES, Slot, TILE_COLUMNS, TILE_ROWS, Tile};
use crate::parallel::share;
use crate::stop::{Asker, Watch};

/// Samples that go through the same tiles together, and are summed first in a sum of all.
pub(super) const GROUP: usize = 4;
/// Samples that go through the same tiles together where no sum of all is asked for.
const PAIR: usize = 2;
/// Tiles of a sample that are made one after the other, so that their columns stay in the cache.
const BAND: usize = 2;
/// Rows and columns of the part of a matrix that is packed together: a multiple of a tile's.
const PART: usize = 256;
/// Terms of a tile that are summed at a time: 40 KiB of rows and columns.
const TERMS: usize = 256;
/// Values that a strip may hold, unless eight rows hold more. Sums are split where strips end.
pub(super) const STRIP: usize = 1 << 16;

/// A borrowed `[batch, terms, width]` array with any strides, counted in values.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    pub(super) values: &'a [f32],
    pub(super) shape: [usize; 3],
    pub(super) strides: [usize; 3],
}

impl<'a> Sequences<'a> {
    /// The array of this shape whose element `[b, t, w]` lies at `b s0 + t s1 + w s2`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the last element lies past the end of `values`.
    pub fn new(
        argument: &'static str,
        values: &'a [f32],
        shape: [usize; 3],
        strides: [usize; 3],
    ) -> Result<Self, Error> {
        let last = shape.iter().zip(strides).try_fold(0usize, |last, (&size, stride)| {
            last.checked_add(size.checked_sub(1)?.checked_mul(stride)?)
        });
        let empty = shape.contains(&0);
        if empty || last.is_some_and(|last| last < values.len()) {
            return Ok(Self { values, shape, strides });
        }
        Err(Error::shape(
            argument,
            format!("{} values for shape {shape:?}", last.map_or(usize::MAX, |last| last + 1)),
            values.len(),
        ))
    }

    /// The values of a term; `buffer` is where they are put if they do not lie side by side.
    pub(super) fn term<'v>(
        &'v self,
        sample: usize,
        term: usize,
        buffer: &'v mut Vec<f32>,
    ) -> &'v [f32] {
        let [across_samples, across_terms, across_width] = self.strides;
        let at = sample * across_samples + term * across_terms;
        if across_width == 1 {
            return &self.values[at..at + self.shape[2]];
        }
        buffer.clear();
        buffer.extend((0..self.shape[2]).map(|column| self.values[at + column * across_width]));
        buffer
    }

    /// Replaces `packed` by columns `from..from + count` of sample `sample`, in panels of `W`
    /// columns, `[panel, term, W]`, padded with zeros; [`panel`] finds them.
    fn pack<const W: usize>(
        &self,
        sample: usize,
        from: usize,
        count: usize,
        packed: &mut Vec<f32>,
        set: InstructionSet,
    ) {
        /// Columns that are copied term by term together: 1 KiB of a row is read at a time.
        const BESIDE: usize = 256;
        /// Terms by which they are asked for before, for pieces of rows are no stream.
        const FETCHED: usize = 8;
        let terms = self.shape[1];
        let [across_samples, across_terms, across_width] = self.strides;
        packed.resize(count.div_ceil(W) * panel_len::<W>(terms), 0.0);
        for begin in (0..count).step_by(BESIDE) {
            let here = BESIDE.min(count - begin);
            let panels = &mut packed[begin / W * panel_len::<W>(terms)..];
            for term in 0..terms {
                let at =
                    sample * across_samples + term * across_terms + (from + begin) * across_width;
                if across_width != 1 {
                    let panels = panels.chunks_exact_mut(panel_len::<W>(terms));
                    let columns = (0..here).step_by(W);
                    for (panel, first) in panels.zip(columns) {
                        let values = &mut panel[term * W..][..W];
                        values.fill(0.0);
                        for (column, value) in values.iter_mut().take(here - first).enumerate() {
                            *value = self.values[at + (first + column) * across_width];
                        }
                    }
                    continue;
                }
                let soon = at + FETCHED * across_terms;
                InstructionSet::fetch(self.values.get(soon..soon + here).unwrap_or_default());
                let (values, out) = (&self.values[at..at + here], &mut panels[term * W..]);
                set.spread::<W>(values, panel_len::<W>(terms), out);
                let rest = values.as_chunks::<W>().1;
                if !rest.is_empty() {
                    let out = &mut out[here / W * panel_len::<W>(terms)..][..W];
                    out.fill(0.0);
                    out[..rest.len()].copy_from_slice(rest);
                }
            }
        }
    }
}

/// Values from one panel of `W` columns to the next. A cache line more than a panel has, so that
/// panels do not all begin at the same places of the cache.
const fn panel_len<const W: usize>(terms: usize) -> usize {
    terms * W + LANES
}

/// Panel `index` of packed columns, `[terms, W]`.
fn panel<const W: usize>(packed: &[f32], terms: usize, index: usize) -> &[f32] {
    &packed[index * panel_len::<W>(terms)..][..terms * W]
}

/// A matrix of a parameter: `left^T right` from coordinate `start` on.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    pub(super) parameter: Parameter,
    pub(super) start: u64,
    pub(super) left: Sequences<'a>,
    pub(super) right: Sequences<'a>,
    /// The bias of the layer, and the coordinate of the first row's.
    pub(super) bias: Option<(Parameter, u64)>,
}

impl Block<'_> {
    pub(super) fn terms(&self) -> usize {
        self.left.shape[1]
    }

    pub(super) fn rows(&self) -> usize {
        self.left.shape[2]
    }

    pub(super) fn columns(&self) -> usize {
        self.right.shape[2]
    }
}

/// What a worker keeps between jobs.
#[derive(Default)]
pub(super) struct Scratch {
    blocks: Vec<Sums>,
    left: Vec<Vec<f32>>,
    right: Vec<Vec<f32>>,
    tiles: Vec<Tile>,
    slots: Vec<Slot>,
    band: Vec<f32>,
    bad: Vec<usize>,
    sums: Vec<(usize, Vec<f32>)>,
}

impl Sketch {
    /// Adds, for each sample, the matrix `sum over t of left[t] right[t]^T`, which is the
    /// row-major block of coordinates from `start` on of `parameter`, to `totals`. Returns the rows
    /// in which a sum was NaN or infinite. The matrices of all samples are added to `sum`,
    /// `[rows, columns]`, if there is one: four at a time, in order. If there is a `bias`, a
    /// parameter and a coordinate, `sum over t of left[t]` is added to it from there on.
    ///
    /// For a linear layer `left` is the gradient of its output and `right` its input. Sums over `t`
    /// are fused, in order, where the matrix is formed. Takes O(batch · terms · rows · columns) time,
    /// or less in a kind that takes the factors as they are, and
    /// O(threads · (terms · (rows + columns) + dim)) memory, and with a `sum` and several threads
    /// O(threads · rows · columns) more.
    ///
    /// # Errors
    /// [`Error::Shape`] if the arrays do not fit together, or the block does not fit in the
    /// parameter; [`Error::Stopped`].
    pub fn add_outer(
        &self,
        parameter: Parameter,
        start: u64,
        left: Sequences<'_>,
        right: Sequences<'_>,
        totals: Totals<'_>,
        sum: Option<&mut [f32]>,
        bias: Option<(Parameter, u64)>,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Vec<usize>, Error> {
        let [batch, terms, rows] = left.shape;
        let [_, _, columns] = right.shape;
        if right.shape[..2] != [batch, terms] {
            return Err(Error::shape(
                "right",
                format!("[{batch}, {terms}, columns]"),
                format!("{:?}", right.shape),
            ));
        }
        let totals = totals.share(self, batch)?;
        let len = (rows as u64).checked_mul(columns as u64);
        let end = len.and_then(|len| len.checked_add(start));
        if end.is_none_or(|end| end > parameter.len) {
            return Err(Error::shape(
                "left",
                format!("a block of at most {} values from {start}", parameter.len),
                format!("{rows} x {columns}"),
            ));
        }
        if let Some(sum) = &sum
            && Some(sum.len() as u64) != len
        {
            return Err(Error::shape("sum", format!("[{rows}, {columns}]"), sum.len()));
        }
        if let Some((bias, start)) = bias
            && start.checked_add(rows as u64).is_none_or(|end| end > bias.len)
        {
            let must = format!("a bias of at least {rows} values from {start}");
            return Err(Error::shape("bias", must, bias.len));
        }
        if batch == 0 || terms == 0 || rows == 0 || columns == 0 {
            return Ok(Vec::new());
        }
        let block = Block { parameter, start, left, right, bias };
        self.add_block(block, &totals, sum, threads, asker)
    }

    /// Adds a block that is not empty, and fits.
    pub(super) fn add_block(
        &self,
        block: Block<'_>,
        totals: &[Row<'_>],
        mut sum: Option<&mut [f32]>,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Vec<usize>, Error> {
        let sizes = [block.terms(), block.rows(), block.columns()];
        let work = sizes.into_iter().fold(totals.len(), usize::saturating_mul);
        // Threads cost more than the work below about 2^22 products each.
        let threads = threads.min(1 + (work >> 22));
        let tiled = self.kind == Kind::ChunkedSjlt
            && block.columns().is_multiple_of(LANES)
            && block.start.is_multiple_of(LANES as u64);
        let own = self.add_factors(block, totals, sum.as_deref_mut(), threads, asker)?;
        let bad = match own {
            Some(bad) => bad,
            None if tiled => self.add_all_tiles(block, totals, sum, threads, asker)?,
            None => self.add_strips(block, totals, sum, threads, asker)?,
        };
        let more = self.add_bias(block, totals, threads, asker)?;
        Ok(join([bad, more]))
    }

    /// Adds the gradients of all samples tile by tile, and their sum to `sum`.
    fn add_all_tiles(
        &self,
        block: Block<'_>,
        totals: &[Row<'_>],
        mut sum: Option<&mut [f32]>,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Vec<usize>, Error> {
        let (batch, rows, columns) = (totals.len(), block.rows(), block.columns());
        // Without a sum, groups are smaller: all threads have work, and the cache holds more.
        let group = if sum.is_some() { GROUP } else { batch.div_ceil(threads).min(PAIR) };
        let groups = batch.div_ceil(group);
        // With one thread the sum needs no copies: groups come in order.
        let copies = sum.is_some() && threads > 1;
        let wave = if copies { threads } else { groups };
        let sum_is_direct = sum.is_some() && !copies;
        let mut bad = Vec::new();
        for first in (0..groups).step_by(wave) {
            let count = wave.min(groups - first);
            let direct = Mutex::new(if copies { None } else { sum.as_deref_mut() });
            let states = share(count, threads, asker, Scratch::default, |mine, job, watch| {
                let here = (first + job) * group..batch.min((first + job + 1) * group);
                if copies {
                    let mut copy = vec![0.0; rows * columns];
                    self.add_tiles(block, totals, here, Some(&mut copy), mine, watch)?;
                    mine.sums.push((job, copy));
                    return Ok(());
                }
                if sum_is_direct {
                    let mut direct = direct.lock().map_err(Error::panicked)?;
                    return self.add_tiles(block, totals, here, direct.as_deref_mut(), mine, watch);
                }
                self.add_tiles(block, totals, here, None, mine, watch)
            })?;
            let mut sums = Vec::new();
            for state in states {
                bad.push(state.bad);
                sums.extend(state.sums);
            }
            sums.sort_unstable_by_key(|sum| sum.0);
            if let Some(sum) = sum.as_deref_mut() {
                for (_, copy) in sums {
                    for (sum, value) in sum.iter_mut().zip(copy) {
                        *sum += value;
                    }
                }
            }
        }
        Ok(join(bad))
    }

    /// Adds the gradients of a few samples tile by tile, and their sum to `sum`.
    fn add_tiles(
        &self,
        block: Block<'_>,
        totals: &[Row<'_>],
        samples: Range<usize>,
        mut sum: Option<&mut [f32]>,
        scratch: &mut Scratch,
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        let (terms, rows, columns) = (block.terms(), block.rows(), block.columns());
        let Scratch { blocks, left, right, tiles, slots, band, bad, .. } = scratch;
        blocks.resize_with(GROUP, Sums::default);
        for scratch in [&mut *left, &mut *right] {
            scratch.resize(GROUP, Vec::new());
        }
        let mut locked = totals[samples.clone()].iter().map(take).collect::<Result<Vec<_>, _>>()?;
        let pairs = locked.iter_mut().zip(blocks);
        let mut adders: Vec<_> =
            pairs.map(|(total, sums)| Adder::new(self, block.parameter, total, sums)).collect();
        // The shorter side is packed whole, the longer one as it is needed.
        let tall = rows > columns;
        for (index, sample) in samples.clone().enumerate() {
            if tall {
                block.right.pack::<TILE_COLUMNS>(sample, 0, columns, &mut right[index], self.set);
            } else {
                block.left.pack::<TILE_ROWS>(sample, 0, rows, &mut left[index], self.set);
            }
        }
        for (rows, columns) in parts(rows, columns) {
            for (index, sample) in samples.clone().enumerate() {
                if tall && columns.start == 0 {
                    let left = &mut left[index];
                    block.left.pack::<TILE_ROWS>(sample, rows.start, rows.len(), left, self.set);
                } else if !tall && rows.start == 0 {
                    let right = &mut right[index];
                    block.right.pack::<TILE_COLUMNS>(
                        sample,
                        columns.start,
                        columns.len(),
                        right,
                        self.set,
                    );
                }
            }
            // Where the packed panels begin.
            let (left_from, right_from) = if tall { (rows.start, 0) } else { (0, columns.start) };
            for top in rows.clone().step_by(BAND * TILE_ROWS) {
                watch.check()?;
                let height = (BAND * TILE_ROWS).min(rows.end - top);
                self.band_slots(block, top..top + height, columns.clone(), slots);
                if sum.is_some() {
                    band.clear();
                    band.resize(height.next_multiple_of(TILE_ROWS) * PART, 0.0);
                }
                for (index, adder) in adders.iter_mut().enumerate() {
                    let tiles = TileBand {
                        terms,
                        height,
                        width: columns.len(),
                        left: (&left[index], (top - left_from) / TILE_ROWS),
                        right: (&right[index], (columns.start - right_from) / TILE_COLUMNS),
                        slots,
                        tiles,
                    };
                    tiles.add(self, adder, sum.is_some().then_some((&mut band[..], PART)));
                }
                if let Some(sum) = sum.as_deref_mut() {
                    let across = block.columns();
                    for (row, values) in (top..top + height).zip(band.chunks_exact(PART)) {
                        let into = &mut sum[row * across + columns.start..][..columns.len()];
                        for (into, value) in into.iter_mut().zip(values) {
                            *into += value;
                        }
                    }
                }
            }
        }
        for (adder, sample) in adders.into_iter().zip(samples) {
            if !adder.finish() {
                bad.push(sample);
            }
        }
        Ok(())
    }

    /// Replaces `slots` by those of some rows and columns: down the rows, across their chunks.
    fn band_slots(
        &self,
        block: Block<'_>,
        rows: Range<usize>,
        columns: Range<usize>,
        slots: &mut Vec<Slot>,
    ) {
        let chunks = columns.len() / LANES;
        slots.resize(rows.len() * chunks, Slot::default());
        for (row, slots) in rows.zip(slots.chunks_exact_mut(chunks)) {
            let start = block.start + (row * block.columns() + columns.start) as u64;
            self.set.slots(block.parameter.key, self.dim, start / LANES as u64, slots);
        }
    }

    /// Adds the sums of the left factors to the bias, if there is one; returns the rows that are
    /// not finite.
    fn add_bias(
        &self,
        block: Block<'_>,
        totals: &[Row<'_>],
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Vec<usize>, Error> {
        let Some((parameter, start)) = block.bias else { return Ok(Vec::new()) };
        let rows = block.rows();
        let mut bad = Vec::new();
        let mut sums = Vec::new();
        for (first, totals) in (0..).step_by(slab::GROUP).zip(totals.chunks(slab::GROUP)) {
            sums.clear();
            sums.resize(totals.len() * rows, 0.0);
            let parts: Vec<_> = sums.chunks_exact_mut(rows).map(Mutex::new).collect();
            share(parts.len(), threads, asker, Vec::new, |values, sample, watch| {
                let mut sums = parts[sample].lock().map_err(Error::panicked)?;
                for term in 0..block.terms() {
                    watch.check()?;
                    let values = block.left.term(first + sample, term, values);
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum += value;
                    }
                }
                Ok(())
            })?;
            drop(parts);
            let views: Vec<&[f32]> = sums.chunks_exact(rows).collect();
            let slab = Slab { start, values: Matrix::new(&views)? };
            let here = slab.add(self, parameter, totals, threads, asker)?;
            bad.push(here.into_iter().map(|row| first + row).collect());
        }
        Ok(join(bad))
    }

    /// Adds the gradients of all samples strip by strip.
    fn add_strips(
        &self,
        block: Block<'_>,
        totals: &[Row<'_>],
        mut sum: Option<&mut [f32]>,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Vec<usize>, Error> {
        let (rows, columns) = (block.rows(), block.columns());
        let height = (STRIP / columns).next_multiple_of(TILE_ROWS);
        let height = height.clamp(TILE_ROWS, rows.next_multiple_of(TILE_ROWS));
        let most = ((16 * STRIP) / (height * columns)).clamp(1, 16).next_multiple_of(GROUP);
        let mut strips = vec![0.0; most.min(totals.len()) * height * columns];
        let mut bad = Vec::new();
        for (first, totals) in (0..).step_by(most).zip(totals.chunks(most)) {
            let batch = totals.len();
            for top in (0..rows).step_by(height) {
                let width = height.min(rows - top) * columns;
                let strips = &mut strips[..batch * width];
                let parts: Vec<_> = strips.chunks_exact_mut(width).map(Mutex::new).collect();
                share(batch, threads, asker, Scratch::default, |mine, index, watch| {
                    let mut strip = parts[index].lock().map_err(Error::panicked)?;
                    make_strip(self, block, first + index, top, &mut strip, mine, watch)
                })?;
                drop(parts);
                if let Some(sum) = sum.as_deref_mut() {
                    sum_strips(strips, width, &mut sum[top * columns..][..width]);
                }
                let views: Vec<&[f32]> = strips.chunks_exact(width).collect();
                let values = Matrix::new(&views)?;
                let start = block.start + (top * columns) as u64;
                let slab = Slab { start, values };
                let here = slab.add(self, block.parameter, totals, threads, asker)?;
                bad.push(here.into_iter().map(|row| first + row).collect());
            }
        }
        Ok(join(bad))
    }
}

/// Adds strips to their sum: those of [`GROUP`] samples are summed first.
pub(super) fn sum_strips(strips: &[f32], width: usize, sum: &mut [f32]) {
    let mut four = vec![0.0; width];
    for group in strips.chunks(GROUP * width) {
        four.fill(0.0);
        for strip in group.chunks_exact(width) {
            for (sum, value) in four.iter_mut().zip(strip) {
                *sum += value;
            }
        }
        for (sum, four) in sum.iter_mut().zip(&four) {
            *sum += four;
        }
    }
}

/// Parts of at most [`PART`] rows and columns that make up a matrix: along the shorter side first.
fn parts(rows: usize, columns: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let cut = |len: usize| (0..len).step_by(PART).map(move |at| at..len.min(at + PART));
    let tall = rows > columns;
    let (long, short) = if tall { (rows, columns) } else { (columns, rows) };
    cut(long).flat_map(move |long| {
        cut(short)
            .map(move |short| if tall { (long.clone(), short) } else { (short, long.clone()) })
    })
}

/// The tiles of one sample in a band of rows and a panel of columns.
struct TileBand<'a> {
    terms: usize,
    height: usize,
    width: usize,
    /// Packed panels, and the first of the band.
    left: (&'a [f32], usize),
    right: (&'a [f32], usize),
    slots: &'a [Slot],
    tiles: &'a mut Vec<Tile>,
}

impl TileBand<'_> {
    /// Makes the tiles and adds them to `adder`, and to `sums`, rows of some stride.
    fn add(self, sketch: &Sketch, adder: &mut Adder<'_>, mut sums: Option<(&mut [f32], usize)>) {
        let stride = self.width / LANES;
        let left = |tile: usize| panel::<TILE_ROWS>(self.left.0, self.terms, self.left.1 + tile);
        for first in (0..self.width).step_by(TILE_COLUMNS) {
            let index = self.right.1 + first / TILE_COLUMNS;
            let right = panel::<TILE_COLUMNS>(self.right.0, self.terms, index);
            let width = TILE_COLUMNS.min(self.width - first);
            let chunks = width / LANES;
            let fused = width == TILE_COLUMNS && self.terms <= TERMS && !adder.is_direct();
            if !fused {
                self.tiles.clear();
                self.tiles
                    .resize(self.height.div_ceil(TILE_ROWS), [[0.0; TILE_COLUMNS]; TILE_ROWS]);
                // Some terms of all tiles, then the next: the sum of a tile is the same.
                for from in (0..self.terms).step_by(TERMS) {
                    let to = self.terms.min(from + TERMS);
                    let right = &right[from * TILE_COLUMNS..to * TILE_COLUMNS];
                    for (index, tile) in self.tiles.iter_mut().enumerate() {
                        let left = &left(index)[from * TILE_ROWS..to * TILE_ROWS];
                        sketch.set.outer_tile(left, right, tile);
                    }
                }
            }
            for tile in 0..self.height.div_ceil(TILE_ROWS) {
                let rows = TILE_ROWS.min(self.height - tile * TILE_ROWS);
                let these = &self.slots[tile * TILE_ROWS * stride + first / LANES..];
                let these = &these[..(rows - 1) * stride + chunks];
                let into = sums.as_mut().map(|(sums, stride)| {
                    (&mut sums[tile * TILE_ROWS * *stride + first..], *stride)
                });
                if fused {
                    let block = adder.sums(rows * width);
                    sketch.set.outer_scatter(left(tile), right, (these, stride), block, into);
                    continue;
                }
                let values = &self.tiles[tile];
                for (slots, values) in these.chunks(stride).zip(values) {
                    adder.add_anywhere(&slots[..chunks], &values[..width]);
                }
                if let Some((sums, stride)) = into {
                    for (row, values) in values.iter().take(rows).enumerate() {
                        for (sum, value) in sums[row * stride..][..width].iter_mut().zip(values) {
                            *sum += value;
                        }
                    }
                }
            }
        }
    }
}

/// Makes rows from `top` on of a sample's matrix, as many as `strip` holds.
pub(super) fn make_strip(
    sketch: &Sketch,
    block: Block<'_>,
    sample: usize,
    top: usize,
    strip: &mut [f32],
    scratch: &mut Scratch,
    watch: &Watch<'_>,
) -> Result<(), Error> {
    let (terms, columns) = (block.terms(), block.columns());
    let height = strip.len() / columns;
    scratch.left.resize(1, Vec::new());
    scratch.right.resize(1, Vec::new());
    let (left, right) = (&mut scratch.left[0], &mut scratch.right[0]);
    block.left.pack::<TILE_ROWS>(sample, top, height, left, sketch.set);
    for column in (0..columns).step_by(TILE_COLUMNS) {
        watch.check()?;
        let width = TILE_COLUMNS.min(columns - column);
        block.right.pack::<TILE_COLUMNS>(sample, column, width, right, sketch.set);
        let right = panel::<TILE_COLUMNS>(right, terms, 0);
        for row in (0..height).step_by(TILE_ROWS) {
            let left = panel::<TILE_ROWS>(left, terms, row / TILE_ROWS);
            let mut tile: Tile = [[0.0; TILE_COLUMNS]; TILE_ROWS];
            sketch.set.outer_tile(left, right, &mut tile);
            for (r, values) in tile.iter().enumerate().take(height - row) {
                strip[(row + r) * columns + column..][..width].copy_from_slice(&values[..width]);
            }
        }
    }
    Ok(())
}
