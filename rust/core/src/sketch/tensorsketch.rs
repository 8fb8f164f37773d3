//! `tensorsketch`: a `CountSketch` whose hashes of a matrix's entries are sums of those of its row
//! and its column, so that the sketch of an outer product is a convolution.
//!
//! Entry `(i, j)` is added to bucket `(h1(i) + h2(j)) mod dim` with sign `s1(i) s2(j)`; rows and
//! columns have independent hashes. A vector is its own `CountSketch`, by `h1` and `s1`. Inner
//! products are unbiased. With `g = 2` for an even `dim`, else 1, and the Gram matrices
//! `A = X^T Y` of columns and `B = X Y^T` of rows, their variance is
//!
//! ```text
//! (1/dim) [ sum over j != l of (A_jl^2 + A_jl A_lj) + sum over i != k of (B_ik^2 + B_ik B_ki)
//!           + sum over i != k, j != l of (X_ij^2 Y_kl^2 + X_ij Y_ij X_kl Y_kl
//!               + (g/dim) (X_ij Y_kl X_il Y_kj + X_ij Y_kl X_kj Y_il)) ]
//! ```
//!
//! which is about that of a `CountSketch`, `(|X|^2 |Y|^2 + (X.Y)^2) / dim`, where no direction
//! dominates the matrices, and at most `(6 + 2 g/dim) |X|^2 |Y|^2 / dim`. For matrices of length 1
//! and rank one whose sides have the cosines `a` and `b` it is about `(1 + a^2 + b^2 + 3 a^2 b^2) /
//! dim`, up to three times that of a `CountSketch`. (Pagh, "Compressed matrix multiplication", TOCT
//! 2013, for outer products; Pham and Pagh, "Fast and scalable polynomial kernels via explicit
//! feature maps", KDD 2013.)
//!
//! The sum of a sample's outer products is one transform a term, of both factors at once, and one
//! back. Where that is slower than to form the matrix and add it entry by entry, that is done: two
//! ways of one map, which agree to rounding.

use super::factors::COLUMNS;
use super::fourier::{Fourier, Values};
use super::outer::Block;
use super::slab::Slab;
use super::{Parameter, Row, Sketch, columns, join, take};
use crate::error::Error;
use crate::kernels::{Column, InstructionSet};
use crate::parallel::share;
use crate::stop::{Asker, Watch};

/// Adds a piece of a slab; says which rows are finite.
pub(super) fn add(
    sketch: &Sketch,
    parameter: Parameter,
    piece: Slab<'_>,
    rows: &[Row<'_>],
    watch: &Watch<'_>,
) -> Result<Vec<bool>, Error> {
    let Sketch { dim, set, .. } = *sketch;
    if parameter.columns == 1 {
        return columns::add_columns(sketch, 1, piece, rows, watch, |first, columns| {
            set.columns(parameter.key, dim, 1, first, columns);
        });
    }
    let (start, width) = (piece.start, parameter.columns);
    // Those of the columns that the piece has, in their order from its first one on.
    let mut across = vec![Column::default(); piece.values.width().min(width as usize)];
    let begin = start % width;
    let count = ((width - begin) as usize).min(across.len());
    let (to_end, from_begin) = across.split_at_mut(count);
    set.columns(parameter.key, dim, 1, COLUMNS + begin, to_end);
    set.columns(parameter.key, dim, 1, COLUMNS, from_begin);
    columns::add_columns(sketch, 1, piece, rows, watch, |first, columns| {
        let mut at = first;
        let mut rest = columns;
        while !rest.is_empty() {
            let mut row = [Column::default()];
            set.columns(parameter.key, dim, 1, at / width, &mut row);
            // A run ends with its row, or where the order of the columns begins again.
            let from = (at - start) as usize % across.len();
            let count = ((width - at % width) as usize).min(across.len() - from).min(rest.len());
            let (here, after) = rest.split_at_mut(count);
            set.shift_columns(row[0], dim, &across[from..from + count], here);
            at += count as u64;
            rest = after;
        }
    })
}

/// The transform for a width, at least as long as the convolution if that is not cyclic.
fn plan(dim: usize) -> &'static Fourier {
    let cyclic = Fourier::of(dim);
    if cyclic.length() == dim { cyclic } else { Fourier::of(2 * dim - 1) }
}

/// Whether to transform the factors of a block is quicker than to form its matrix; depends on
/// shapes alone.
pub(super) fn is_quicker(dim: usize, block: &Block<'_>) -> bool {
    // Nanoseconds on one core with AVX2 or AVX-512, of a value and stage of a transform, a value of
    // a factor, a product of two and an entry that is added; measured for widths from 512 to 16384,
    // 1 to 256 terms and sides from 64 to 1024, where the choice was wrong only near a tie.
    const TRANSFORM: f64 = 0.1;
    const FACTOR: f64 = 1.0;
    const PRODUCT: f64 = 0.025;
    const ENTRY: f64 = 2.0;
    let length = plan(dim).length() as f64;
    let (terms, rows, columns) =
        (block.terms() as f64, block.rows() as f64, block.columns() as f64);
    let transforms = (terms + 1.0) * TRANSFORM * length * length.log2();
    let factors = terms * (rows + columns) * FACTOR;
    transforms + factors < rows * columns * (terms * PRODUCT + ENTRY)
}

/// What a worker keeps between samples.
#[derive(Default)]
struct Scratch {
    left: Vec<f32>,
    right: Vec<f32>,
    values: Values,
    sum: Values,
    bad: Vec<usize>,
}

/// Adds the outer products of a block that begins with row `first`.
pub(super) fn add_outer(
    sketch: &Sketch,
    block: Block<'_>,
    first: u64,
    totals: &[Row<'_>],
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Vec<usize>, Error> {
    let Sketch { dim, set, .. } = *sketch;
    let (key, plan) = (block.parameter.key, plan(dim));
    let mut rows = vec![Column::default(); block.rows()];
    let mut columns = vec![Column::default(); block.columns()];
    set.columns(key, dim, 1, first, &mut rows);
    set.columns(key, dim, 1, COLUMNS, &mut columns);
    let states = share(totals.len(), threads, asker, Scratch::default, |mine, sample, watch| {
        let Scratch { left, right, values, sum, bad } = mine;
        sum.clear(plan.length());
        for term in 0..block.terms() {
            watch.check()?;
            let left = block.left.term(sample, term, left);
            let right = block.right.term(sample, term, right);
            let Some(shift) = balance(set, left, right) else { continue };
            values.clear(plan.length());
            add_scaled(&rows, left, shift, &mut values.real);
            add_scaled(&columns, right, -shift, &mut values.imaginary);
            plan.add_square(set, values, sum);
        }
        plan.back(set, sum);
        // The square of x + iy has the imaginary part 2xy.
        let scale = 0.5 / plan.length() as f64;
        let mut finite = true;
        let mut total = take(&totals[sample])?;
        for (bucket, total) in total.iter_mut().enumerate() {
            let wrapped = if plan.length() > dim { sum.imaginary[dim + bucket] } else { 0.0 };
            let value = f64::from(sum.imaginary[bucket]) + f64::from(wrapped);
            finite &= value.is_finite();
            *total += value * scale;
        }
        if !finite {
            bad.push(sample);
        }
        Ok(())
    })?;
    Ok(join(states.into_iter().map(|state| state.bad)))
}

/// The power of two by which to multiply `left`, and divide `right`, so that both are of about one
/// size: the rounding of a complex transform is that of its larger part. Nothing if the outer
/// product is zero.
fn balance(set: InstructionSet, left: &[f32], right: &[f32]) -> Option<i32> {
    let (left, right) = (square(set, left), square(set, right));
    if left * right == 0.0 {
        return None;
    }
    let exponent = |value: f64| (value.to_bits() >> 52) as i32;
    Some(((exponent(right) - exponent(left)) / 4).clamp(-126, 126))
}

/// The square of the length.
fn square(set: InstructionSet, values: &[f32]) -> f64 {
    let mut square = [0.0];
    set.dots(values, values, values.len(), &mut square);
    if square[0].is_normal() {
        return f64::from(square[0]);
    }
    values.iter().map(|&value| f64::from(value).powi(2)).sum()
}

/// Adds values, each times a power of two and with its column's sign, to the columns' buckets.
fn add_scaled(columns: &[Column], values: &[f32], exponent: i32, sums: &mut [f32]) {
    let factor = f32::from_bits((127 + exponent).cast_unsigned() << 23);
    for (column, &value) in columns.iter().zip(values) {
        sums[column.bucket()] += column.signed(value * factor);
    }
}
