//! Linear layers: the gradient `sum over t of left[t] right[t]^T` of each sample, never stored.
//!
//! The gradient is made a tile of 8 x 32 at a time. Where its rows are whole chunks of the sketch, a
//! tile goes into the sketch as it is, tile after tile, down the columns first; the sum in f32 has
//! that order then. Else a strip of rows is put together first, and goes in as a flat gradient
//! would. Which it is depends on the shape alone. No buffer of the parameter's size exists.

use super::{Adder, Parameter, RowsMut, SLOTS, Sketch, join};
use crate::error::Error;
use crate::kernels::{LANES, Slot, TILE_COLUMNS, TILE_ROWS, Tile};
use crate::parallel::share;
use crate::stop::{Asker, Watch};

/// The most slots that are computed once for all samples, in tile order: 16 MiB.
const SHARED_SLOTS: usize = 1 << 21;
/// Values a strip of the gradient may hold: 128 KiB, so that it stays in the second cache.
const STRIP: usize = 1 << 15;

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

    /// Copies sample `sample` into panels of `W` columns, `[panel, term, W]`, padded with zeros.
    fn pack<const W: usize>(&self, sample: usize, panels: &mut Vec<f32>) {
        let [_, terms, width] = self.shape;
        let [across_samples, across_terms, across_width] = self.strides;
        let count = width.div_ceil(W);
        panels.clear();
        panels.resize(count * terms * W, 0.0);
        if panels.is_empty() {
            return;
        }
        for (index, panel) in panels.chunks_exact_mut(terms * W).enumerate() {
            let columns = W.min(width - index * W);
            for (term, values) in panel.chunks_exact_mut(W).enumerate() {
                let at = sample * across_samples + term * across_terms + index * W * across_width;
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

/// What a worker keeps between samples.
struct Scratch {
    block: Vec<f32>,
    left: Vec<f32>,
    right: Vec<f32>,
    strip: Vec<f32>,
    slots: Box<[Slot; SLOTS]>,
    panel: Vec<Slot>,
    bad: Vec<usize>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            block: Vec::new(),
            left: Vec::new(),
            right: Vec::new(),
            strip: Vec::new(),
            slots: Box::new([Slot::default(); SLOTS]),
            panel: Vec::new(),
            bad: Vec::new(),
        }
    }
}

impl Sketch {
    /// Adds, for each sample, the matrix `sum over t of left[t] right[t]^T`, which is the
    /// row-major block of coordinates from `start` on of `parameter`, to `totals`, `[batch, dim]`.
    /// Returns the rows in which a sum was NaN or infinite.
    ///
    /// For a linear layer `left` is the gradient of its output and `right` its input. Sums over `t`
    /// are fused, in order. Takes O(batch · terms · rows · columns) time and
    /// O(threads · (terms · (rows + columns) + dim)) memory.
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
        totals: &mut [f64],
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
        self.check_totals(totals, batch)?;
        let end = (rows as u64).checked_mul(columns as u64).and_then(|n| n.checked_add(start));
        if end.is_none_or(|end| end > parameter.len) {
            return Err(Error::shape(
                "left",
                format!("a block of at most {} values from {start}", parameter.len),
                format!("{rows} x {columns}"),
            ));
        }
        if terms == 0 || rows == 0 || columns == 0 {
            return Ok(Vec::new());
        }
        let block = Block { parameter, start, left, right };
        let aligned = columns.is_multiple_of(LANES) && start.is_multiple_of(LANES as u64);
        // Slots are the same for every sample: computed once, unless they would take much memory.
        let mut shared = Vec::new();
        if aligned && batch > 1 && rows * (columns / LANES) <= SHARED_SLOTS {
            for panel in 0..columns.div_ceil(TILE_COLUMNS) {
                self.panel_slots(block, panel, &mut shared);
            }
        }
        let totals = RowsMut::new(totals, self.dim);
        let work = batch.saturating_mul(terms).saturating_mul(rows).saturating_mul(columns);
        // Threads cost more than the work below about 2^22 products each.
        let threads = threads.min(1 + (work >> 22));
        let states = share(batch, threads, asker, Scratch::default, |scratch, sample, watch| {
            let mut total = totals.take(sample)?;
            left.pack::<TILE_ROWS>(sample, &mut scratch.left);
            right.pack::<TILE_COLUMNS>(sample, &mut scratch.right);
            let finite = if aligned {
                self.add_tiles(block, &shared, &mut total, scratch, watch)?
            } else {
                self.add_strips(block, &mut total, scratch, watch)?
            };
            if !finite {
                scratch.bad.push(sample);
            }
            Ok(())
        })?;
        Ok(join(states.into_iter().map(|state| state.bad)))
    }

    /// Appends the slots of a panel of columns: down the rows, and across each row's chunks.
    fn panel_slots(&self, block: Block<'_>, panel: usize, slots: &mut Vec<Slot>) {
        let (rows, columns) = (block.left.shape[2], block.right.shape[2]);
        let first = panel * TILE_COLUMNS;
        let chunks = (TILE_COLUMNS.min(columns - first) / LANES) as u64;
        for row in 0..rows {
            let chunk = (block.start + (row * columns + first) as u64) / LANES as u64;
            slots.extend((0..chunks).map(|next| self.slot(block.parameter, chunk + next)));
        }
    }

    /// Adds the gradient of the packed sample tile by tile; `false` if a sum was NaN or infinite.
    fn add_tiles(
        &self,
        block: Block<'_>,
        shared: &[Slot],
        total: &mut [f64],
        scratch: &mut Scratch,
        watch: &Watch<'_>,
    ) -> Result<bool, Error> {
        let [_, terms, rows] = block.left.shape;
        let columns = block.right.shape[2];
        let mut adder = Adder::new(self, block.parameter, total, &mut scratch.block);
        let mut used = 0;
        for (panel, right) in scratch.right.chunks_exact(terms * TILE_COLUMNS).enumerate() {
            let width = TILE_COLUMNS.min(columns - panel * TILE_COLUMNS);
            let chunks = width / LANES;
            let slots = if shared.is_empty() {
                scratch.panel.clear();
                self.panel_slots(block, panel, &mut scratch.panel);
                &scratch.panel[..]
            } else {
                let slots = &shared[used..used + rows * chunks];
                used += rows * chunks;
                slots
            };
            let tiles = scratch.left.chunks_exact(terms * TILE_ROWS);
            for (left, slots) in tiles.zip(slots.chunks(TILE_ROWS * chunks)) {
                let mut tile: Tile = [[0.0; TILE_COLUMNS]; TILE_ROWS];
                self.set.outer_tile(left, right, &mut tile);
                if width == TILE_COLUMNS {
                    let values = &tile.as_flattened()[..slots.len() * LANES];
                    adder.add_anywhere(slots, values);
                } else {
                    for (slots, values) in slots.chunks_exact(chunks).zip(&tile) {
                        adder.add_anywhere(slots, &values[..width]);
                    }
                }
            }
            watch.check()?;
        }
        Ok(adder.finish())
    }

    /// Adds the gradient of the packed sample strip by strip; `false` if a sum was NaN or infinite.
    fn add_strips(
        &self,
        block: Block<'_>,
        total: &mut [f64],
        scratch: &mut Scratch,
        watch: &Watch<'_>,
    ) -> Result<bool, Error> {
        let [_, terms, rows] = block.left.shape;
        let columns = block.right.shape[2];
        let height = (STRIP / columns).clamp(TILE_ROWS, rows.next_multiple_of(TILE_ROWS));
        let height = height / TILE_ROWS * TILE_ROWS;
        scratch.strip.resize(height * columns, 0.0);
        let mut adder = Adder::new(self, block.parameter, total, &mut scratch.block);
        let panel = terms * TILE_ROWS;
        for (index, panels) in scratch.left.chunks(panel * (height / TILE_ROWS)).enumerate() {
            let first = index * height;
            let here = height.min(rows - first);
            for (column, right) in scratch.right.chunks_exact(terms * TILE_COLUMNS).enumerate() {
                let column = column * TILE_COLUMNS;
                let width = TILE_COLUMNS.min(columns - column);
                watch.check()?;
                for (tile_row, left) in panels.chunks_exact(panel).enumerate() {
                    let mut tile: Tile = [[0.0; TILE_COLUMNS]; TILE_ROWS];
                    self.set.outer_tile(left, right, &mut tile);
                    let tile_row = tile_row * TILE_ROWS;
                    for (r, values) in tile.iter().enumerate().take(here - tile_row) {
                        scratch.strip[(tile_row + r) * columns + column..][..width]
                            .copy_from_slice(&values[..width]);
                    }
                }
            }
            let at = block.start + (first * columns) as u64;
            adder.add(at, &scratch.strip[..here * columns], &mut scratch.slots, watch)?;
        }
        Ok(adder.finish())
    }
}
