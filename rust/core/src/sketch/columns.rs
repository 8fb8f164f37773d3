//! Maps whose columns have few nonzeros, each anywhere in the row.
//!
//! `sjlt`: the row has `s` equal parts; coordinate `c` has one nonzero in each, `+-1 / sqrt(s)`.
//! With `s = 1` it is the `CountSketch`. Inner products are unbiased, with variance
//! `(1/dim) sum over i != j of (x_i^2 y_j^2 + x_i y_i x_j y_j)` for any `s`; the tails are lighter
//! with a larger one. (Kane and Nelson, "Sparser Johnson-Lindenstrauss transforms", JACM 2014,
//! the block construction; Charikar, Chen and Farach-Colton, "Finding frequent items in data
//! streams", 2004.)

use super::slab::Slab;
use super::{Parameter, Row, Sketch, take};
use crate::error::Error;
use crate::kernels::{Column, LANES};
use crate::stop::Watch;

/// Coordinates that are put side by side for 16 samples at a time: 64 KiB.
const STEP: usize = 1024;
/// The fewest samples that are worth a kernel for 16.
const FEW: usize = 4;

/// Adds a piece of a slab; says which rows are finite.
pub(super) fn add_sjlt(
    sketch: &Sketch,
    parameter: Parameter,
    nonzeros: usize,
    piece: Slab<'_>,
    rows: &[Row<'_>],
    watch: &Watch<'_>,
) -> Result<Vec<bool>, Error> {
    let part = sketch.dim / nonzeros;
    add_columns(sketch, nonzeros, piece, rows, watch, |first, columns| {
        let start = first.wrapping_mul(nonzeros as u64);
        sketch.set.columns(parameter.key, part, nonzeros, start, columns);
    })
}

/// Adds a piece of a slab to the rows that `fill` names: it gets the first of some coordinates, and
/// room for the `nonzeros` columns of each.
pub(super) fn add_columns(
    sketch: &Sketch,
    nonzeros: usize,
    piece: Slab<'_>,
    rows: &[Row<'_>],
    watch: &Watch<'_>,
    fill: impl Fn(u64, &mut [Column]),
) -> Result<Vec<bool>, Error> {
    let Slab { start, values } = piece;
    let width = values.width();
    let scale = 1.0 / (nonzeros as f64).sqrt();
    let mut columns = vec![Column::default(); STEP.min(width) * nonzeros];
    let mut guards = rows.iter().map(take).collect::<Result<Vec<_>, _>>()?;
    let mut finite = vec![true; rows.len()];
    let steps = (0..width).step_by(STEP).map(|from| (from, STEP.min(width - from)));
    // A row's worth of sums is only cleared and flushed where that is little beside the values.
    if width < sketch.dim {
        for (from, count) in steps {
            watch.check()?;
            let columns = &mut columns[..count * nonzeros];
            fill(start + from as u64, columns);
            for (row, (total, finite)) in guards.iter_mut().zip(&mut finite).enumerate() {
                let values = &values.row(row)[from..][..count];
                for (&value, columns) in values.iter().zip(columns.chunks_exact(nonzeros)) {
                    *finite &= value.is_finite();
                    for column in columns {
                        total[column.bucket()] += f64::from(column.signed(value)) * scale;
                    }
                }
            }
        }
        return Ok(finite);
    }
    let wide = rows.len() >= FEW;
    let mut sums = vec![[0.0f32; LANES]; if wide { sketch.dim } else { 0 }];
    let mut single = vec![[[0.0f32; 1]].repeat(sketch.dim); if wide { 0 } else { rows.len() }];
    let views: Vec<&[f32]> = (0..rows.len()).map(|row| values.row(row)).collect();
    let as_they_are = vec![0; STEP.min(width)];
    let mut side_by_side = vec![[0.0f32; LANES]; STEP.min(width)];
    for (from, count) in steps {
        watch.check()?;
        let columns = &mut columns[..count * nonzeros];
        fill(start + from as u64, columns);
        if wide {
            let side_by_side = &mut side_by_side[..count];
            sketch.set.side_by_side(&views, from, &as_they_are[..count], side_by_side);
            sketch.set.add_columns(columns, nonzeros, side_by_side, &mut sums);
        } else {
            for (row, sums) in single.iter_mut().enumerate() {
                let values = values.row(row)[from..][..count].as_chunks::<1>().0;
                sketch.set.add_columns(columns, nonzeros, values, sums);
            }
        }
    }
    for (row, (total, finite)) in guards.iter_mut().zip(&mut finite).enumerate() {
        for (bucket, total) in total.iter_mut().enumerate() {
            let sum = if wide { sums[bucket][row] } else { single[row][bucket][0] };
            *finite &= sum.is_finite();
            *total += f64::from(sum) * scale;
        }
    }
    Ok(finite)
}
