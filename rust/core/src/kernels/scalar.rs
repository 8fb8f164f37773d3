//! The definition of every kernel, in plain Rust.

use half::{bf16, f16};

use crate::random;

use super::{Column, LANES, Slot, TILE_CHUNKS, TILE_COLUMNS, TILE_ROWS, Tile, sum_lanes};

pub(super) fn widen(halves: &[f16], out: &mut [f32]) {
    for (half, out) in halves.iter().zip(out) {
        *out = half.to_f32();
    }
}

/// Inlined into the vector forms too, whose compiler makes vectors of it: whole numbers only.
#[inline(always)]
pub(super) fn slots(key: u64, dim: usize, first: u64, slots: &mut [Slot]) {
    for (index, slot) in slots.iter_mut().enumerate() {
        *slot = Slot::of(key, dim, first.wrapping_add(index as u64));
    }
}

/// As `slots`.
#[inline(always)]
pub(super) fn columns(key: u64, part: usize, nonzeros: usize, first: u64, columns: &mut [Column]) {
    for (index, column) in columns.iter_mut().enumerate() {
        let index = first.wrapping_add(index as u64);
        let place = (index as usize & (nonzeros - 1)) * part;
        *column = Column::of(random::value(key, index), part, place as u32);
    }
}

/// As `slots`, but for sums that are never fused: lane by lane the same in every set.
#[inline(always)]
pub(super) fn add_columns<const L: usize>(
    columns: &[Column],
    nonzeros: usize,
    values: &[[f32; L]],
    block: &mut [[f32; L]],
) {
    for (values, columns) in values.iter().zip(columns.chunks_exact(nonzeros)) {
        for column in columns {
            let sums = &mut block[column.bucket()];
            for (sum, &value) in sums.iter_mut().zip(values) {
                *sum += column.signed(value);
            }
        }
    }
}

pub(super) fn scatter(slots: &[Slot], values: &[f32], block: &mut [f32]) {
    scatter_widened(slots, values, block, |value| value);
}

pub(super) fn scatter_f16(slots: &[Slot], values: &[f16], block: &mut [f32]) {
    scatter_widened(slots, values, block, f16::to_f32);
}

pub(super) fn scatter_bf16(slots: &[Slot], values: &[bf16], block: &mut [f32]) {
    scatter_widened(slots, values, block, bf16::to_f32);
}

fn scatter_widened<T: Copy>(
    slots: &[Slot],
    values: &[T],
    block: &mut [f32],
    widen: impl Fn(T) -> f32,
) {
    for (slot, chunk) in slots.iter().zip(values.chunks_exact(LANES)) {
        let target = &mut block[slot.offset() as usize..][..LANES];
        for (lane, (sum, &value)) in target.iter_mut().zip(chunk).enumerate() {
            let sign = u32::from(slot.signs() >> lane & 1) << 31;
            *sum += f32::from_bits(widen(value).to_bits() ^ sign);
        }
    }
}

pub(super) fn outer_tile(left: &[f32], right: &[f32], tile: &mut Tile) {
    for (left, right) in left.chunks_exact(TILE_ROWS).zip(right.chunks_exact(TILE_COLUMNS)) {
        for (row, &factor) in tile.iter_mut().zip(left) {
            for (sum, &value) in row.iter_mut().zip(right) {
                *sum = factor.mul_add(value, *sum);
            }
        }
    }
}

pub(super) fn outer_scatter(
    left: &[f32],
    right: &[f32],
    slots: &[Slot],
    block: &mut [f32],
    sum: Option<(&mut [f32], usize)>,
) {
    let mut tile: Tile = [[0.0; TILE_COLUMNS]; TILE_ROWS];
    outer_tile(left, right, &mut tile);
    scatter(slots, &tile.as_flattened()[..slots.len() * LANES], block);
    if let Some((sum, stride)) = sum {
        let rows = tile.iter().take(slots.len() / TILE_CHUNKS).enumerate();
        for (row, values) in rows {
            for (sum, value) in sum[row * stride..][..TILE_COLUMNS].iter_mut().zip(values) {
                *sum += value;
            }
        }
    }
}

pub(super) fn dots(rows: &[f32], queries: &[f32], dim: usize, out: &mut [f32]) {
    let mut scores = out.iter_mut();
    for row in rows.chunks_exact(dim) {
        for (query, score) in queries.chunks_exact(dim).zip(&mut scores) {
            *score = dot(row, query);
        }
    }
}

fn dot(row: &[f32], query: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (row, row_tail) = row.as_chunks::<LANES>();
    let (query, query_tail) = query.as_chunks::<LANES>();
    for (row, query) in row.iter().zip(query) {
        add_step(&mut lanes, row, query);
    }
    add_step(&mut lanes, row_tail, query_tail);
    sum_lanes(lanes)
}

/// One step of a dot product: lane `l` gets the product of elements `l`; of a partial step the
/// lanes past its end stay as they are.
#[inline]
pub(super) fn add_step(lanes: &mut [f32; LANES], row: &[f32], query: &[f32]) {
    for (sum, (x, y)) in lanes.iter_mut().zip(row.iter().zip(query)) {
        *sum = x.mul_add(*y, *sum);
    }
}
