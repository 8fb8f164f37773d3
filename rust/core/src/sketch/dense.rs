//! Maps whose entries are all random, and are never stored: they are made again for each group of
//! samples, in tiles that stay in the first cache.
//!
//! `rademacher`: every entry is `+-1 / sqrt(dim)`. Inner products are unbiased, with variance
//! `(1/dim) sum over i != j of (x_i^2 y_j^2 + x_i y_i x_j y_j)`, which is
//! `(|x|^2 |y|^2 + (x.y)^2 - 2 sum over i of x_i^2 y_i^2) / dim`. (Achlioptas, "Database-friendly
//! random projections", JCSS 2003, theorem 1.1.)
//!
//! `gaussian`: every entry is a standard normal number over `sqrt(dim)`, rounded to f32. Inner
//! products are unbiased, with variance `(|x|^2 |y|^2 + (x.y)^2) / dim`; that the numbers have 32
//! bits changes this by less than one part in 10^7. (Indyk and Motwani, "Approximate nearest
//! neighbors: towards removing the curse of dimensionality", STOC 1998; Dasgupta and Gupta, "An
//! elementary proof of a theorem of Johnson and Lindenstrauss", 2003.)
//!
//! Sums: those of a sample and a bucket over the coordinates of a piece are fused, in order, in
//! f32; the sum of the piece is scaled in f64.

use std::ops::Range;

use super::slab::{Slab, pieces};
use super::{Kind, Parameter, Row, Sketch, join, take};
use crate::error::Error;
use crate::kernels::{TILE_COLUMNS, TILE_ROWS, Tile};
use crate::parallel::share;
use crate::stop::{Asker, Watch};

/// Coordinates whose entries are made at a time: 32 KiB of a panel of buckets.
const STEP: usize = 256;
/// Samples that share the entries made.
const GROUP: usize = 128;
/// Panels whose sums are kept together: at most 512 KiB for a group.
const BAND: usize = 32;

/// What the entries are, before they are scaled.
#[derive(Clone, Copy)]
pub(super) enum Entries {
    Signs,
    Normals,
}

/// What a worker keeps between pieces.
#[derive(Default)]
pub(super) struct Scratch {
    /// `[tile, coordinate]`.
    left: Vec<[f32; TILE_ROWS]>,
    entries: Vec<[f32; TILE_COLUMNS]>,
    /// `[panel, tile]`.
    sums: Vec<Tile>,
}

impl Entries {
    /// Those of a kind that is dense.
    pub(super) fn of(kind: Kind) -> Option<Self> {
        match kind {
            Kind::Rademacher => Some(Self::Signs),
            Kind::Gaussian => Some(Self::Normals),
            _ => None,
        }
    }

    /// Adds a slab; returns the rows that are not finite.
    pub(super) fn add_slab(
        self,
        sketch: &Sketch,
        parameter: Parameter,
        slab: Slab<'_>,
        rows: &[Row<'_>],
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Vec<usize>, Error> {
        // To make the entries takes most of the time: threads share out the buckets, of which each
        // has entries of its own, and the samples only where there are more threads.
        let (panels, batch) = (sketch.dim.div_ceil(TILE_COLUMNS), rows.len());
        let band = panels.div_ceil(threads.max(1)).min(BAND);
        let bands = panels.div_ceil(band);
        let group = batch.div_ceil(threads.div_ceil(bands).max(1));
        let group = group.next_multiple_of(TILE_ROWS).clamp(TILE_ROWS, GROUP);
        let jobs = batch.div_ceil(group) * bands;
        let state = <(Scratch, Vec<usize>)>::default;
        let states = share(jobs, threads, asker, state, |(scratch, bad), job, watch| {
            let (first, panel) = (job / bands * group, job % bands * band);
            let count = group.min(batch - first);
            let (rows, values) = (&rows[first..first + count], slab.values.some(first, count));
            let panels = panel..panels.min(panel + band);
            for (from, width) in pieces(slab.start, values.width()) {
                let start = slab.start + from as u64;
                let piece = Slab { start, values: values.columns(from, width) };
                let panels = panels.clone();
                let finite =
                    self.add_panels(sketch, parameter, panels, piece, rows, scratch, watch)?;
                bad.extend((first..).zip(finite).filter_map(|(row, ok)| (!ok).then_some(row)));
            }
            Ok(())
        })?;
        Ok(join(states.into_iter().map(|(_, bad)| bad)))
    }

    /// Adds a piece of a slab of few samples on this thread; says which rows are finite.
    pub(super) fn add(
        self,
        sketch: &Sketch,
        parameter: Parameter,
        piece: Slab<'_>,
        rows: &[Row<'_>],
        watch: &Watch<'_>,
    ) -> Result<Vec<bool>, Error> {
        let mut scratch = Scratch::default();
        let mut finite = vec![true; rows.len()];
        let panels = sketch.dim.div_ceil(TILE_COLUMNS);
        for panel in (0..panels).step_by(BAND) {
            let panels = panel..panels.min(panel + BAND);
            let here =
                self.add_panels(sketch, parameter, panels, piece, rows, &mut scratch, watch)?;
            for (finite, here) in finite.iter_mut().zip(here) {
                *finite &= here;
            }
        }
        Ok(finite)
    }

    /// Adds a piece to the buckets of some panels; says in which rows these are finite.
    fn add_panels(
        self,
        sketch: &Sketch,
        parameter: Parameter,
        panels: Range<usize>,
        piece: Slab<'_>,
        rows: &[Row<'_>],
        scratch: &mut Scratch,
        watch: &Watch<'_>,
    ) -> Result<Vec<bool>, Error> {
        let Slab { start, values } = piece;
        let Scratch { left, entries, sums } = scratch;
        let tiles = rows.len().div_ceil(TILE_ROWS);
        sums.clear();
        sums.resize(panels.len() * tiles, [[0.0; TILE_COLUMNS]; TILE_ROWS]);
        for from in (0..values.width()).step_by(STEP) {
            let count = STEP.min(values.width() - from);
            let first = start + from as u64;
            left.clear();
            left.resize(tiles * count, [0.0; TILE_ROWS]);
            for row in 0..rows.len() {
                let left = &mut left[row / TILE_ROWS * count..][..count];
                for (left, &value) in left.iter_mut().zip(&values.row(row)[from..]) {
                    left[row % TILE_ROWS] = value;
                }
            }
            entries.resize(count, [0.0; TILE_COLUMNS]);
            for (panel, sums) in panels.clone().zip(sums.chunks_exact_mut(tiles)) {
                watch.check()?;
                self.fill(sketch, parameter, first, panel * TILE_COLUMNS, entries);
                for (left, sums) in left.chunks_exact(count).zip(sums) {
                    sketch.set.outer_tile(left.as_flattened(), entries.as_flattened(), sums);
                }
            }
        }
        let scale = 1.0 / (sketch.dim as f64).sqrt();
        let mut finite = vec![true; rows.len()];
        for (index, (row, finite)) in rows.iter().zip(&mut finite).enumerate() {
            let mut total = take(row)?;
            let total = total[panels.start * TILE_COLUMNS..].chunks_mut(TILE_COLUMNS);
            for (total, sums) in total.zip(sums.chunks_exact(tiles)) {
                let sums = sums[index / TILE_ROWS][index % TILE_ROWS];
                for (total, sum) in total.iter_mut().zip(sums) {
                    *finite &= sum.is_finite();
                    *total += f64::from(sum) * scale;
                }
            }
        }
        Ok(finite)
    }

    /// Makes the entries of the coordinates from `first` on in the buckets from `bucket` on.
    fn fill(
        self,
        sketch: &Sketch,
        parameter: Parameter,
        first: u64,
        bucket: usize,
        entries: &mut [[f32; TILE_COLUMNS]],
    ) {
        let Sketch { set, dim, .. } = *sketch;
        match self {
            Self::Signs => set.sign_rows(parameter.key, dim, first, bucket, entries),
            Self::Normals => set.normal_rows(parameter.key, dim, first, bucket, entries),
        }
    }
}
