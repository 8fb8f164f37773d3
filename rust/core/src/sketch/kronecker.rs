//! `kronecker`: both sides of a matrix are projected: the Kronecker product of two random maps.
//!
//! `dim = k_left k_right`, where `k_left` is the largest divisor of `dim` that is at most its
//! square root. The row is `P_left^T G P_right / sqrt(dim)`, row by row, with `P_left` of
//! `[rows, k_left]` and `P_right` of `[columns, k_right]` signs. With the Gram matrices
//! `A = X^T Y` of columns and `B = X Y^T` of rows inner products are unbiased, with variance
//!
//! ```text
//!   (1/k_right) sum over j != l of (A_jl^2 + A_jl A_lj)
//! + (1/k_left)  sum over i != k of (B_ik^2 + B_ik B_ki)
//! + (1/dim)     sum over i != k, j != l of (X_ij^2 Y_kl^2 + X_ij Y_ij X_kl Y_kl
//!                                         + X_ij Y_kl X_il Y_kj + X_ij Y_kl X_kj Y_il)
//! ```
//!
//! which is at most `(2/k_left + 2/k_right + 4/dim) |X|^2 |Y|^2`. It is about
//! `(|X|^2 |Y|^2 + (X.Y)^2) / dim` where no direction dominates the matrices. Of rank one, `u v^T`
//! and `p q^T`, they are seen through the two products alone, which have `k` values each: up to
//! terms that are small where the factors are spread out, the second moment is
//! `(a^2 + (1 + a^2) / k_left) (b^2 + (1 + b^2) / k_right)` for the cosines `a` and `b` of the
//! sides, and the variance what this is more than `(a b)^2`.
//!
//! A vector has one side only: its map is that of `chunked_sjlt`.
//!
//! (Choe et al., "What is your data worth to GPT?", arXiv 2405.13954, section 3, which calls it
//! `LoGra`; Chang et al., "Scalable influence and fact tracing for large language model
//! pretraining", arXiv 2410.17413, section 3, which calls what it is part of `TrackStar`.)
//!
//! Sums over rows, columns and terms are fused, in order, in f32.

use super::chunked::{Adder, Sums};
use super::factors::COLUMNS;
use super::outer::{Block, Sequences};
use super::slab::Slab;
use super::{Parameter, Row, Sketch, join, take};
use crate::error::Error;
use crate::kernels::{InstructionSet, TILE_COLUMNS, TILE_ROWS, Tile};
use crate::parallel::share;
use crate::stop::{Asker, Watch};

/// Rows or columns whose signs are made at a time: 32 KiB of a panel of them.
const STEP: usize = 256;
/// Panels of 32 projections that are made from the same packed values.
const PANELS: usize = 4;
/// Rows of a slab that share the signs of columns.
const ROWS: usize = 64;
/// Samples that share signs, if they have few terms.
const GROUP: usize = 16;

/// The random map of one side.
#[derive(Clone, Copy)]
struct Side {
    key: u64,
    /// Projections.
    dim: usize,
}

/// The maps of both sides.
struct Sides {
    left: Side,
    right: Side,
}

impl Sides {
    fn of(sketch: &Sketch, parameter: Parameter) -> Self {
        let key = parameter.key;
        let (left, right) = sizes(sketch.dim);
        // Value 2^63 + n of a stream is value n of the stream with the key 2^63 away.
        let (left, right) =
            (Side { key, dim: left }, Side { key: key.wrapping_add(COLUMNS), dim: right });
        Self { left, right }
    }
}

/// The projections of rows and of columns: a divisor of `dim` close to its root, and the other.
fn sizes(dim: usize) -> (usize, usize) {
    let left = (1..=dim.isqrt()).rev().find(|&left| dim.is_multiple_of(left)).unwrap_or(1);
    (left, dim / left)
}

/// Neighbouring panels of a side.
#[derive(Clone, Copy)]
struct Panels {
    side: Side,
    /// The first projection, and the number of panels from there on.
    first: usize,
    count: usize,
}

impl Side {
    fn panels(self) -> impl Iterator<Item = Panels> {
        let step = PANELS * TILE_COLUMNS;
        (0..self.dim).step_by(step).map(move |first| {
            let count = (self.dim - first).min(step).div_ceil(TILE_COLUMNS);
            Panels { side: self, first, count }
        })
    }
}

/// What a worker keeps between jobs.
#[derive(Default)]
struct Scratch {
    packed: Vec<[f32; TILE_ROWS]>,
    signs: Vec<[f32; TILE_COLUMNS]>,
    /// `[panel, tile]`: the rows of the tiles are the items.
    left: Vec<Tile>,
    right: Vec<Tile>,
    /// `[eight of the projections of rows, row or item]`.
    eights: Vec<[f32; TILE_ROWS]>,
    sums: Vec<Tile>,
}

impl Panels {
    /// The number of projections.
    fn width(self) -> usize {
        (self.side.dim - self.first).min(self.count * TILE_COLUMNS)
    }

    /// Replaces `tiles` by the projections of `items` lines of `len` values, those of the
    /// parameter's rows or columns from `start` on. `line(item)` is where a line begins, and how
    /// far apart its values are.
    fn project<'v>(
        self,
        set: InstructionSet,
        start: u64,
        len: usize,
        items: usize,
        packed: &mut Vec<[f32; TILE_ROWS]>,
        signs: &mut Vec<[f32; TILE_COLUMNS]>,
        tiles: &mut Vec<Tile>,
        watch: &Watch<'_>,
        line: impl Fn(usize) -> (&'v [f32], usize),
    ) -> Result<(), Error> {
        let groups = items.div_ceil(TILE_ROWS);
        tiles.clear();
        tiles.resize(self.count * groups, [[0.0; TILE_COLUMNS]; TILE_ROWS]);
        for from in (0..len).step_by(STEP) {
            watch.check()?;
            let step = STEP.min(len - from);
            signs.resize(self.count * step, [0.0; TILE_COLUMNS]);
            packed.resize(step, [0.0; TILE_ROWS]);
            for (panel, signs) in signs.chunks_exact_mut(step).enumerate() {
                let bucket = self.first + panel * TILE_COLUMNS;
                set.sign_rows(self.side.key, self.side.dim, start + from as u64, bucket, signs);
            }
            for group in 0..groups {
                packed.fill([0.0; TILE_ROWS]);
                let here = group * TILE_ROWS..items.min((group + 1) * TILE_ROWS);
                for (lane, item) in here.enumerate() {
                    let (values, stride) = line(item);
                    if stride == 1 {
                        for (packed, &value) in packed.iter_mut().zip(&values[from..]) {
                            packed[lane] = value;
                        }
                    } else {
                        for (index, packed) in (from..).zip(&mut *packed) {
                            packed[lane] = values[index * stride];
                        }
                    }
                }
                for (panel, signs) in signs.chunks_exact(step).enumerate() {
                    let tile = &mut tiles[panel * groups + group];
                    set.outer_tile(packed.as_flattened(), signs.as_flattened(), tile);
                }
            }
        }
        Ok(())
    }
}

/// Appends eight of the projections of all items, then the next eight, until there are `width`.
fn by_eights(panels: &[Tile], items: usize, width: usize, eights: &mut Vec<[f32; TILE_ROWS]>) {
    let groups = items.div_ceil(TILE_ROWS);
    for from in (0..width).step_by(TILE_ROWS) {
        let panel = &panels[from / TILE_COLUMNS * groups..][..groups];
        let eight = from % TILE_COLUMNS / TILE_ROWS;
        let rows = panel.as_flattened()[..items].iter();
        eights.extend(rows.map(|row| row.as_chunks::<TILE_ROWS>().0[eight]));
    }
}

/// Adds tiles, `[eight, panel]`, of the product of both maps to a sample's total; whether they are
/// finite.
fn add_tiles(sides: &Sides, panels: Panels, tiles: &[Tile], total: &mut [f64]) -> bool {
    let scale = 1.0 / (total.len() as f64).sqrt();
    let width = sides.right.dim;
    let mut finite = true;
    for (row, total) in total.chunks_exact_mut(width).enumerate() {
        for panel in 0..panels.count {
            let tile = &tiles[row / TILE_ROWS * panels.count + panel];
            let total = &mut total[panels.first + panel * TILE_COLUMNS..];
            for (total, &value) in total.iter_mut().zip(&tile[row % TILE_ROWS]) {
                finite &= value.is_finite();
                *total += f64::from(value) * scale;
            }
        }
    }
    finite
}

/// Some rows of a parameter, all with the same of its columns.
struct Band {
    row: u64,
    rows: usize,
    column: u64,
    columns: usize,
    /// Where the first value is.
    at: usize,
}

/// The bands that make up `width` coordinates from `start` on: the rest of a row, whole rows and
/// the beginning of one.
fn bands(start: u64, width: usize, columns: u64) -> impl Iterator<Item = Band> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let (place, left) = (start + at as u64, width - at);
        let (row, column) = (place / columns, place % columns);
        let to_end = columns - column;
        let rows = if column == 0 { left as u64 / columns } else { 0 };
        let (rows, here) = if rows > 0 {
            (ROWS.min(rows as usize), columns as usize)
        } else {
            (1, to_end.min(left as u64) as usize)
        };
        let band = Band { row, rows, column, columns: here, at };
        at += rows * here;
        (left > 0).then_some(band)
    })
}

/// Adds a piece of a slab; says which rows are finite.
pub(super) fn add(
    sketch: &Sketch,
    parameter: Parameter,
    piece: Slab<'_>,
    rows: &[Row<'_>],
    watch: &Watch<'_>,
) -> Result<Vec<bool>, Error> {
    let Slab { start, values } = piece;
    let mut guards = rows.iter().map(take).collect::<Result<Vec<_>, _>>()?;
    if parameter.columns == 1 {
        let (mut sums, mut slots) = (Sums::default(), Vec::new());
        let added = guards.iter_mut().enumerate().map(|(row, total)| {
            let mut adder = Adder::new(sketch, parameter, total, &mut sums);
            adder.add(start, values.row(row), &mut slots, watch)?;
            Ok(adder.finish())
        });
        return added.collect();
    }
    let (set, samples) = (sketch.set, guards.len());
    let sides = Sides::of(sketch, parameter);
    let eights_a_sample = sides.left.dim.div_ceil(TILE_ROWS);
    let mut finite = vec![true; samples];
    let mut scratch = Scratch::default();
    let Scratch { packed, signs, right, eights, sums, .. } = &mut scratch;
    for panels in sides.right.panels() {
        sums.clear();
        sums.resize(samples * eights_a_sample * panels.count, [[0.0; TILE_COLUMNS]; TILE_ROWS]);
        for band in bands(start, values.width(), parameter.columns) {
            let items = samples * band.rows;
            let (column, len) = (band.column, band.columns);
            let line = |item: usize| {
                (&values.row(item / band.rows)[band.at + item % band.rows * len..], 1)
            };
            panels.project(set, column, len, items, packed, signs, right, watch, line)?;
            // The signs of the band's rows, as if they were projections of as many items.
            eights.clear();
            signs.resize(band.rows, [0.0; TILE_COLUMNS]);
            for from in (0..sides.left.dim).step_by(TILE_ROWS) {
                let bucket = from / TILE_COLUMNS * TILE_COLUMNS;
                if bucket == from {
                    set.sign_rows(sides.left.key, sides.left.dim, band.row, bucket, signs);
                }
                let at = (from - bucket) / TILE_ROWS;
                eights.extend(signs.iter().map(|row| row.as_chunks::<TILE_ROWS>().0[at]));
            }
            let groups = items.div_ceil(TILE_ROWS);
            let mut tiles = sums.iter_mut();
            for sample in 0..samples {
                for eight in eights.chunks_exact(band.rows) {
                    for (panel, tile) in right.chunks_exact(groups).zip(&mut tiles) {
                        let rows = &panel.as_flattened()[sample * band.rows..][..band.rows];
                        set.outer_tile(eight.as_flattened(), rows.as_flattened(), tile);
                    }
                }
            }
        }
        let tiles = sums.chunks_exact(eights_a_sample * panels.count);
        for ((total, finite), tiles) in guards.iter_mut().zip(&mut finite).zip(tiles) {
            *finite &= add_tiles(&sides, panels, tiles, total);
        }
    }
    Ok(finite)
}

/// Adds the outer products of a block that begins with row `first`.
pub(super) fn add_outer<'a>(
    sketch: &Sketch,
    block: Block<'a>,
    first: u64,
    totals: &[Row<'_>],
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Vec<usize>, Error> {
    /// Terms, of all samples, that share signs.
    const TERMS: usize = 64;
    let (set, batch, terms) = (sketch.set, totals.len(), block.terms());
    let sides = Sides::of(sketch, block.parameter);
    let group = TERMS.div_ceil(terms).min(batch.div_ceil(threads.max(1))).clamp(1, GROUP);
    let state = <(Scratch, Vec<usize>)>::default;
    let states = share(batch.div_ceil(group), threads, asker, state, |(mine, bad), job, watch| {
        let Scratch { packed, signs, left, right, eights, sums } = mine;
        let start = job * group;
        let samples = group.min(batch - start);
        let items = samples * terms;
        let line = |factors: Sequences<'a>, item: usize| {
            let [across_samples, across_terms, across_width] = factors.strides;
            let at = (start + item / terms) * across_samples + item % terms * across_terms;
            (&factors.values[at..], across_width)
        };
        eights.clear();
        for panels in sides.left.panels() {
            let line = |item| line(block.left, item);
            panels.project(set, first, block.rows(), items, packed, signs, left, watch, line)?;
            by_eights(left, items, panels.width(), eights);
        }
        for panels in sides.right.panels() {
            let line = |item| line(block.right, item);
            panels.project(set, 0, block.columns(), items, packed, signs, right, watch, line)?;
            for (sample, total) in totals[start..start + samples].iter().enumerate() {
                watch.check()?;
                sums.clear();
                for eight in eights.chunks_exact(items) {
                    let eight = &eight[sample * terms..][..terms];
                    for panel in right.chunks_exact(items.div_ceil(TILE_ROWS)) {
                        let rows = &panel.as_flattened()[sample * terms..][..terms];
                        let mut tile = [[0.0; TILE_COLUMNS]; TILE_ROWS];
                        set.outer_tile(eight.as_flattened(), rows.as_flattened(), &mut tile);
                        sums.push(tile);
                    }
                }
                if !add_tiles(&sides, panels, sums, &mut take(total)?) {
                    bad.push(start + sample);
                }
            }
        }
        Ok(())
    })?;
    Ok(join(states.into_iter().map(|state| state.1)))
}
