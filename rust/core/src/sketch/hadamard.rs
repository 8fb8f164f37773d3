//! Maps that transform blocks of coordinates.
//!
//! `srht`, the block subsampled randomised Hadamard transform: the coordinates of a parameter form
//! blocks of `n`, the least power of two from `max(dim, 16)` on, the last filled up with zeros. A
//! block gets random signs, goes through the Walsh-Hadamard transform of length `n`, of entries
//! `+-1`, and `dim` of the `n` values, drawn without replacement, are added to the buckets in the
//! order of the draws, with random signs again, over `sqrt(dim)`. The second signs keep different
//! blocks apart: without them the first coordinates of all blocks, whose columns of the transform
//! have no minus, would go into one and the same direction.
//!
//! Inner products are unbiased, with variance
//! `(1/dim) sum over i != j of w_ij (x_i^2 y_j^2 + x_i y_i x_j y_j)`, where `w_ij` is 1 for
//! coordinates of different blocks, and `(n - dim) / (n - 1)` for those of one: the product of two
//! columns of the transform is a third, which has as many minuses as pluses, so two of its values
//! drawn without replacement have the mean product `-1 / (n - 1)`. If `dim` is a power of two from
//! 16 on, a parameter of one block is only rotated.
//!
//! (Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform and approximate nearest
//! neighbors", SIAM J. Comput. 2009; Tropp, "Improved analysis of the subsampled randomized
//! Hadamard transform", 2011; Balabanov, Beaupere, Grigori and Lederer, "Block subsampled
//! randomized Hadamard transform for Nystrom approximation on distributed architectures", ICML
//! 2023, section 2, which has the second signs too, but one draw for all blocks.)
//!
//! Random numbers: word `w` of the signs of block `k` is value `k max(n / 64, 1) + w` of the
//! parameter's stream, and step `i` of the draw is value `2^63 + k n + i`. Sums: the values of a
//! piece's blocks are summed in f32, then scaled in f64.

use super::slab::Slab;
use super::{Parameter, Row, Sketch, take};
use crate::error::Error;
use crate::kernels::{Column, LANES};
use crate::stop::Watch;

/// The first value of the stream that is not of the signs.
const DRAWS: u64 = 1 << 63;

/// Coordinates of a block.
fn block_of(dim: usize) -> usize {
    dim.max(16).next_power_of_two()
}

/// Adds a piece of a slab; says which rows are finite.
pub(super) fn add(
    sketch: &Sketch,
    parameter: Parameter,
    piece: Slab<'_>,
    rows: &[Row<'_>],
    watch: &Watch<'_>,
) -> Result<Vec<bool>, Error> {
    match rows.len() {
        0..=1 => add_side_by_side::<1>(sketch, parameter, piece, rows, watch),
        2..=4 => add_side_by_side::<4>(sketch, parameter, piece, rows, watch),
        _ => add_side_by_side::<LANES>(sketch, parameter, piece, rows, watch),
    }
}

/// The same for at most `L` rows.
fn add_side_by_side<const L: usize>(
    sketch: &Sketch,
    parameter: Parameter,
    piece: Slab<'_>,
    rows: &[Row<'_>],
    watch: &Watch<'_>,
) -> Result<Vec<bool>, Error> {
    let Slab { start, values } = piece;
    let views: Vec<&[f32]> = (0..rows.len()).map(|row| values.row(row)).collect();
    let len = block_of(sketch.dim);
    let mut draw = Draw::new(len, sketch.dim);
    let mut flips = Vec::new();
    let mut transformed = Vec::new();
    let mut sums = vec![[0.0; L]; sketch.dim];
    let mut from = 0;
    while from < values.width() {
        watch.check()?;
        let (block, first) =
            ((start + from as u64) / len as u64, (start + from as u64) % len as u64);
        let first = first as usize;
        let count = (len - first).min(values.width() - from);
        // The least part of the block that holds them all and has a transform of its own: in that
        // of the block, its values are repeated with signs.
        let part = ((first ^ (first + count - 1)) + 1).next_power_of_two();
        let offset = first & !(part - 1);
        let lead = first - offset;
        flips.resize(count, 0);
        let signs = block * len.max(64) as u64 + first as u64;
        sketch.set.flips(parameter.key, signs, &mut flips);
        transformed.resize(part, [0.0; L]);
        transformed[..lead].fill([0.0; L]);
        transformed[lead + count..].fill([0.0; L]);
        let inside = &mut transformed[lead..][..count];
        sketch.set.side_by_side(&views, from, &flips, inside);
        sketch.set.hadamard(&mut transformed);
        draw.make(sketch, parameter, block, part, offset);
        sketch.set.add_picked(&draw.picks, &transformed, &mut sums);
        from += count;
    }
    let scale = 1.0 / (sketch.dim as f64).sqrt();
    let mut finite = vec![true; rows.len()];
    for (lane, (row, finite)) in rows.iter().zip(&mut finite).enumerate() {
        for (total, sums) in take(row)?.iter_mut().zip(&sums) {
            *finite &= sums[lane].is_finite();
            *total += f64::from(sums[lane]) * scale;
        }
    }
    Ok(finite)
}

/// Which values of a block's transform are added to the buckets, in order.
struct Draw {
    /// The numbers below `n`, shuffled.
    order: Vec<u32>,
    picks: Vec<Column>,
}

impl Draw {
    fn new(len: usize, dim: usize) -> Self {
        Self { order: vec![0; len], picks: vec![Column::default(); dim] }
    }

    /// Draws the values of a block, as those of the transform of `part` coordinates from `offset`
    /// on.
    fn make(
        &mut self,
        sketch: &Sketch,
        parameter: Parameter,
        block: u64,
        part: usize,
        offset: usize,
    ) {
        let Self { order, picks } = self;
        let first = DRAWS + block * order.len() as u64;
        sketch.set.draws(parameter.key, order.len(), first, picks);
        for (at, number) in order.iter_mut().enumerate() {
            *number = at as u32;
        }
        for (step, pick) in picks.iter_mut().enumerate() {
            order.swap(step, pick.bucket());
            *pick = pick.moved(order[step], false);
        }
        if part < order.len() {
            // Value v of the whole is value v mod part of the part; where v and the offset have an
            // odd number of bits in common, with a minus.
            for pick in picks {
                let value = pick.bucket();
                let flip = (value & offset).count_ones() % 2 == 1;
                *pick = pick.moved((value & (part - 1)) as u32, flip);
            }
        }
    }
}
