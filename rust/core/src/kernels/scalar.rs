//! The definition of every kernel, in plain Rust.

use half::f16;

use super::{LANES, Slot, TILE_COLUMNS, TILE_ROWS, Tile, sum_lanes};

pub(super) fn widen(halves: &[f16], out: &mut [f32]) {
    for (half, out) in halves.iter().zip(out) {
        *out = half.to_f32();
    }
}

pub(super) fn scatter(slots: &[Slot], values: &[f32], block: &mut [f32]) {
    for (slot, chunk) in slots.iter().zip(values.chunks_exact(LANES)) {
        let target = &mut block[slot.offset as usize..][..LANES];
        for (lane, (sum, &value)) in target.iter_mut().zip(chunk).enumerate() {
            let sign = u32::from(slot.signs >> lane & 1) << 31;
            *sum += f32::from_bits(value.to_bits() ^ sign);
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
