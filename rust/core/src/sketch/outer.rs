//! Linear layers: the gradient `sum over t of left[t] right[t]^T` of each sample, never stored.
//!
//! The gradient is made a tile of 8 x 32 at a time. Where its rows are whole chunks of the sketch,
//! tiles go straight from the registers into the chunked sketch: 64 columns after 64 columns, down
//! the rows; the sum in f32 has that order then. Else strips of rows are put together first, and go
//! in as a flat gradient would. Which it is depends on kind and shape alone. No buffer of the
//! parameter's size exists for a sample.
//!
//! The sum of all samples' gradients is the batch's own weight gradient, and comes from the same
//! tiles if it is asked for.

use std::ops::Range;
use std::sync::Mutex;

use super::chunked::Adder;
use super::flat::Matrix;
use super::slab::Slab;
use super::{Kind, Parameter, Row, Sketch, Totals, join, take};
use crate::error::Error;
use crate::kernels::{LANES, Slot, TILE_COLUMNS, TILE_ROWS, Tile};
use crate::parallel::share;
use crate::stop::{Asker, Watch};

/// Samples that go through the same tiles together, and are summed first in a sum of all.
const GROUP: usize = 4;
/// Tiles of a sample that are made one after the other, so that their columns stay in the cache.
const BAND: usize = 8;
/// Terms of a tile that are summed at a time: 40 KiB of rows and columns.
const TERMS: usize = 256;
/// Values that a strip may hold, unless eight rows hold more. Sums are split where strips end.
const STRIP: usize = 1 << 16;

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

    /// Appends columns `from..from + W` of sample `sample`, `[terms, W]`, padded with zeros.
    fn pack<const W: usize>(&self, sample: usize, from: usize, panel: &mut Vec<f32>) {
        let [_, terms, width] = self.shape;
        let [across_samples, across_terms, across_width] = self.strides;
        let columns = W.min(width - from);
        let begin = panel.len();
        panel.resize(begin + terms * W, 0.0);
        let begin = panel[begin..].as_chunks_mut::<W>().0.iter_mut();
        for (term, values) in begin.enumerate() {
            let at = sample * across_samples + term * across_terms + from * across_width;
            if across_width == 1 && columns == W {
                values.copy_from_slice(&self.values[at..at + W]); // of known size: a few moves
            } else if across_width == 1 {
                values[..columns].copy_from_slice(&self.values[at..at + columns]);
            } else {
                for (column, value) in values[..columns].iter_mut().enumerate() {
                    *value = self.values[at + column * across_width];
                }
            }
        }
    }

    /// Replaces `panels` by all columns of a sample, `[panel, terms, W]`.
    fn pack_all<const W: usize>(&self, sample: usize, panels: &mut Vec<f32>) {
        panels.clear();
        for from in (0..self.shape[2]).step_by(W) {
            self.pack::<W>(sample, from, panels);
        }
    }
}

/// A matrix of a parameter: `left^T right` from coordinate `start` on.
#[derive(Clone, Copy)]
struct Block<'a> {
    parameter: Parameter,
    start: u64,
    left: Sequences<'a>,
    right: Sequences<'a>,
}

impl Block<'_> {
    fn terms(&self) -> usize {
        self.left.shape[1]
    }

    fn rows(&self) -> usize {
        self.left.shape[2]
    }

    fn columns(&self) -> usize {
        self.right.shape[2]
    }
}

/// What a worker keeps between jobs.
#[derive(Default)]
struct Scratch {
    blocks: Vec<Vec<f32>>,
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
    /// `[rows, columns]`, if there is one: four at a time, in order.
    ///
    /// For a linear layer `left` is the gradient of its output and `right` its input. Sums over `t`
    /// are fused, in order. Takes O(batch · terms · rows · columns) time and
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
        mut sum: Option<&mut [f32]>,
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
        if batch == 0 || terms == 0 || rows == 0 || columns == 0 {
            return Ok(Vec::new());
        }
        let block = Block { parameter, start, left, right };
        let work = batch.saturating_mul(terms).saturating_mul(rows).saturating_mul(columns);
        // Threads cost more than the work below about 2^22 products each.
        let threads = threads.min(1 + (work >> 22));
        let tiled = self.kind == Kind::ChunkedSjlt
            && columns.is_multiple_of(LANES)
            && start.is_multiple_of(LANES as u64);
        if !tiled {
            return self.add_strips(block, &totals, sum.as_deref_mut(), threads, asker);
        }
        // Without a sum, groups may be smaller, so that all threads have work.
        let group = if sum.is_some() { GROUP } else { batch.div_ceil(threads).min(GROUP) };
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
                    self.add_tiles(block, &totals, here, Some(&mut copy), mine, watch)?;
                    mine.sums.push((job, copy));
                    return Ok(());
                }
                if sum_is_direct {
                    let mut direct = direct.lock().map_err(broken)?;
                    return self.add_tiles(
                        block,
                        &totals,
                        here,
                        direct.as_deref_mut(),
                        mine,
                        watch,
                    );
                }
                self.add_tiles(block, &totals, here, None, mine, watch)
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
        const PANEL: usize = 2 * TILE_COLUMNS;
        let (terms, rows, columns) = (block.terms(), block.rows(), block.columns());
        let Scratch { blocks, left, right, tiles, slots, band, bad, .. } = scratch;
        blocks.resize(GROUP, Vec::new());
        left.resize(GROUP, Vec::new());
        right.resize(GROUP, Vec::new());
        let mut locked = totals[samples.clone()].iter().map(take).collect::<Result<Vec<_>, _>>()?;
        let pairs = locked.iter_mut().zip(blocks);
        let mut adders: Vec<_> =
            pairs.map(|(total, sums)| Adder::new(self, block.parameter, total, sums)).collect();
        for (left, sample) in left.iter_mut().zip(samples.clone()) {
            block.left.pack_all::<TILE_ROWS>(sample, left);
        }
        for panel in (0..columns).step_by(PANEL) {
            let width = PANEL.min(columns - panel);
            for (right, sample) in right.iter_mut().zip(samples.clone()) {
                right.clear();
                for column in (panel..panel + width).step_by(TILE_COLUMNS) {
                    block.right.pack::<TILE_COLUMNS>(sample, column, right);
                }
            }
            for top in (0..rows).step_by(BAND * TILE_ROWS) {
                watch.check()?;
                let height = (BAND * TILE_ROWS).min(rows - top);
                self.band_slots(block, top..top + height, panel..panel + width, slots);
                if sum.is_some() {
                    band.clear();
                    band.resize(height.next_multiple_of(TILE_ROWS) * PANEL, 0.0);
                }
                for (index, adder) in adders.iter_mut().enumerate() {
                    let left = left[index].chunks_exact(terms * TILE_ROWS);
                    let left = left.skip(top / TILE_ROWS).take(height.div_ceil(TILE_ROWS));
                    let right = right[index].chunks_exact(terms * TILE_COLUMNS);
                    let tiles = TileBand { terms, height, width, slots, tiles };
                    let sums = sum.is_some().then_some((&mut band[..], PANEL));
                    tiles.add(self, left, right, adder, sums);
                }
                if let Some(sum) = sum.as_deref_mut() {
                    for (row, values) in (top..top + height).zip(band.chunks_exact(PANEL)) {
                        let into = &mut sum[row * columns + panel..][..width];
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

    /// Replaces `slots` by those of some rows and columns: tile column by tile column, down the
    /// rows, across each row's chunks.
    fn band_slots(
        &self,
        block: Block<'_>,
        rows: Range<usize>,
        columns: Range<usize>,
        slots: &mut Vec<Slot>,
    ) {
        slots.clear();
        for first in columns.clone().step_by(TILE_COLUMNS) {
            let chunks = (TILE_COLUMNS.min(columns.end - first) / LANES) as u64;
            for row in rows.clone() {
                let chunk = (block.start + (row * block.columns() + first) as u64) / LANES as u64;
                slots.extend((0..chunks).map(|next| self.slot(block.parameter, chunk + next)));
            }
        }
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
                    let mut strip = parts[index].lock().map_err(broken)?;
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

fn broken<T>(_: std::sync::PoisonError<T>) -> Error {
    Error::Internal("a worker thread panicked".into())
}

/// Adds strips to their sum: those of [`GROUP`] samples are summed first.
fn sum_strips(strips: &[f32], width: usize, sum: &mut [f32]) {
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

/// The tiles of one sample in a band of rows and a panel of columns.
struct TileBand<'a> {
    terms: usize,
    height: usize,
    width: usize,
    slots: &'a [Slot],
    tiles: &'a mut Vec<Tile>,
}

impl TileBand<'_> {
    /// Makes the tiles and adds them to `adder`, and to `sums`, rows of some stride.
    fn add<'p>(
        self,
        sketch: &Sketch,
        left: impl Iterator<Item = &'p [f32]> + Clone,
        right: impl Iterator<Item = &'p [f32]>,
        adder: &mut Adder<'_>,
        mut sums: Option<(&mut [f32], usize)>,
    ) {
        let mut slots = self.slots;
        for (index, right) in right.enumerate() {
            let first = index * TILE_COLUMNS;
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
                    for (tile, left) in self.tiles.iter_mut().zip(left.clone()) {
                        let left = &left[from * TILE_ROWS..to * TILE_ROWS];
                        sketch.set.outer_tile(left, right, tile);
                    }
                }
            }
            for (tile, left) in left.clone().enumerate() {
                let rows = TILE_ROWS.min(self.height - tile * TILE_ROWS);
                let (these, rest) = slots.split_at(rows * chunks);
                slots = rest;
                let into = sums.as_mut().map(|(sums, stride)| {
                    (&mut sums[tile * TILE_ROWS * *stride + first..], *stride)
                });
                if fused {
                    let block = adder.sums(these.len() * LANES);
                    sketch.set.outer_scatter(left, right, these, block, into);
                    continue;
                }
                let values = &self.tiles[tile];
                if width == TILE_COLUMNS {
                    adder.add_anywhere(these, &values.as_flattened()[..these.len() * LANES]);
                } else {
                    for (slots, values) in these.chunks_exact(chunks).zip(values) {
                        adder.add_anywhere(slots, &values[..width]);
                    }
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
fn make_strip(
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
    left.clear();
    for row in (top..top + height).step_by(TILE_ROWS) {
        block.left.pack::<TILE_ROWS>(sample, row, left);
    }
    for column in (0..columns).step_by(TILE_COLUMNS) {
        watch.check()?;
        right.clear();
        block.right.pack::<TILE_COLUMNS>(sample, column, right);
        let width = TILE_COLUMNS.min(columns - column);
        for (index, left) in left.chunks_exact(terms * TILE_ROWS).enumerate() {
            let mut tile: Tile = [[0.0; TILE_COLUMNS]; TILE_ROWS];
            sketch.set.outer_tile(left, right, &mut tile);
            let row = index * TILE_ROWS;
            for (r, values) in tile.iter().enumerate().take(height - row) {
                strip[(row + r) * columns + column..][..width].copy_from_slice(&values[..width]);
            }
        }
    }
    Ok(())
}
