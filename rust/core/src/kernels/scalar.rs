//! The definition of every kernel, in plain Rust.

use half::{bf16, f16};

use crate::{normal, random};

use super::{
    Column, LANES, LeafTurns, Slot, TILE_CHUNKS, TILE_COLUMNS, TILE_ROWS, Tile, Turn, fourier,
    sum_lanes,
};

pub(super) fn widen(halves: &[f16], out: &mut [f32]) {
    for (half, out) in halves.iter().zip(out) {
        *out = half.to_f32();
    }
}

/// As `slots`.
#[inline(always)]
pub(super) fn widen_bytes(bytes: &[i8], out: &mut [f32]) {
    for (&byte, out) in bytes.iter().zip(out) {
        *out = f32::from(byte);
    }
}

pub(super) fn unpack<const B: usize>(bytes: &[u8], out: &mut [f32]) {
    let top = (1 << B) - 1;
    // Eight codes lie in as many bytes as a code has bits.
    for (bytes, out) in bytes.chunks(B).zip(out.chunks_mut(8)) {
        let mut word = [0; 4];
        word[..bytes.len()].copy_from_slice(bytes);
        let word = i32::from_le_bytes(word);
        for (index, out) in out.iter_mut().enumerate() {
            *out = (2 * (word >> (index * B) & top) - top) as f32;
        }
    }
}

/// As `add_columns`.
#[inline(always)]
pub(super) fn largest(row: &[f32]) -> f32 {
    // Sizes are in the order of their bits.
    let bits = |value: f32| value.to_bits() & 0x7FFF_FFFF;
    f32::from_bits(row.iter().fold(0, |largest, &value| largest.max(bits(value))))
}

/// As `add_columns`.
#[inline(always)]
pub(super) fn fit_levels<const B: usize>(sizes: &[f32], scale: f32) -> [f64; 3] {
    const WHOLE: f32 = 1.5 / f32::EPSILON; // leaves no room for less than a whole
    const STEP: usize = 512;
    const WIDE: usize = 2 * LANES;
    let (first, gap) = if B == 8 { (0.0, 1.0) } else { (1.0, 2.0) };
    let last = ((1u32 << (B - 1)) - 1) as f32;
    let inverse = (gap * scale).recip();
    let mut sums = [0.0; 3];
    let mut levels = [0f32; STEP];
    for sizes in sizes.chunks(STEP) {
        for (level, &size) in levels.iter_mut().zip(sizes) {
            let index = size * inverse - first / 2.0;
            let index = if index < last { index } else { last };
            *level = (index + WHOLE - WHOLE) * gap + first;
        }
        let (chunks, rest) = sizes.as_chunks::<WIDE>();
        let (level_chunks, level_rest) = levels[..sizes.len()].as_chunks::<WIDE>();
        let [mut losses, mut along, mut squares] = [[0f32; WIDE]; 3];
        for (sizes, levels) in chunks.iter().zip(level_chunks) {
            for lane in 0..WIDE {
                let lost = sizes[lane] - levels[lane] * scale;
                losses[lane] += lost * lost;
                along[lane] += lost * levels[lane];
                squares[lane] += levels[lane] * levels[lane];
            }
        }
        let mut rests = [0f32; 3];
        for (&size, &level) in rest.iter().zip(level_rest) {
            let lost = size - level * scale;
            rests[0] += lost * lost;
            rests[1] += lost * level;
            rests[2] += level * level;
        }
        for ((sum, lanes), rest) in sums.iter_mut().zip([losses, along, squares]).zip(rests) {
            let (low, high) = lanes.split_at(LANES);
            let lanes = std::array::from_fn(|lane| low[lane] + high[lane]);
            *sum += f64::from(sum_lanes(lanes) + rest);
        }
    }
    sums
}

/// As `add_columns`.
#[inline(always)]
pub(super) fn level_codes<const B: usize>(row: &[f32], scale: f64, codes: &mut [u8]) -> f64 {
    const WHOLE: f64 = 1.5 / f64::EPSILON;
    const STEP: usize = 256;
    let top = f64::from((1u32 << B) - 1);
    let inverse = if B == 8 { scale.recip() } else { (2.0 * scale).recip() };
    let mut lanes = [0.0; 8];
    // The code in the lowest bits, as what is added leaves no room for less than a whole.
    let mut raised = [0f64; STEP];
    for (row, codes) in row.chunks(STEP).zip(codes.chunks_mut(STEP)) {
        for (raised, &value) in raised.iter_mut().zip(row) {
            let value = f64::from(value) * inverse;
            *raised = if B == 8 {
                value.clamp(-127.0, 127.0) + WHOLE
            } else {
                (value + top / 2.0).clamp(0.0, top) + WHOLE
            };
        }
        for (code, raised) in codes.iter_mut().zip(&raised) {
            *code = raised.to_bits() as u8;
        }
        let mut add = |lane: usize, value: f32, raised: f64| {
            let code = raised - WHOLE;
            let level = if B == 8 { code } else { 2.0 * code - top };
            let lost = f64::from(value) - level * scale;
            lanes[lane] += lost * lost;
        };
        let (chunks, rest) = row.as_chunks::<8>();
        let (raised_chunks, raised_rest) = raised[..row.len()].as_chunks::<8>();
        for (values, raised) in chunks.iter().zip(raised_chunks) {
            for lane in 0..8 {
                add(lane, values[lane], raised[lane]);
            }
        }
        for (lane, (&value, &raised)) in rest.iter().zip(raised_rest).enumerate() {
            add(lane, value, raised);
        }
    }
    lanes.iter().sum()
}

/// Inlined into the vector forms too, whose compiler makes vectors of it: whole numbers only.
#[inline(always)]
pub(super) fn slots(key: u64, dim: usize, first: u64, slots: &mut [Slot]) {
    let ring = Slot::ring(dim);
    for (index, slot) in slots.iter_mut().enumerate() {
        *slot = Slot::of(random::value(key, first.wrapping_add(index as u64)), dim, ring);
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

/// As `slots`.
#[inline(always)]
pub(super) fn draws(key: u64, things: usize, first: u64, draws: &mut [Column]) {
    for (step, draw) in draws.iter_mut().enumerate() {
        let bits = random::value(key, first.wrapping_add(step as u64));
        *draw = Column::of(bits, things - step, step as u32);
    }
}

/// As `slots`.
#[inline(always)]
pub(super) fn flips(key: u64, first: u64, flips: &mut [u32]) {
    let (mut first, mut rest) = (first, flips);
    while !rest.is_empty() {
        let bit = first % 64;
        let here = rest.len().min(64 - bit as usize);
        let (flips, after) = rest.split_at_mut(here);
        let bits = random::value(key, first / 64) >> bit;
        for (lane, flip) in flips.iter_mut().enumerate() {
            *flip = ((bits >> lane) as u32) << 31;
        }
        (first, rest) = (first + here as u64, after);
    }
}

pub(super) fn side_by_side<const L: usize>(
    rows: &[&[f32]],
    from: usize,
    flips: &[u32],
    values: &mut [[f32; L]],
) {
    for (lane, row) in rows.iter().enumerate() {
        for ((values, &value), flip) in values.iter_mut().zip(&row[from..]).zip(flips) {
            values[lane] = f32::from_bits(value.to_bits() ^ flip);
        }
    }
}

/// The sign bits of 32 buckets, from the lowest bit up.
#[inline(always)]
pub(super) fn sign_bits(key: u64, dim: usize, coordinate: u64, bucket: usize) -> u32 {
    let counter = coordinate.wrapping_mul(dim.div_ceil(64) as u64);
    let word = random::value(key, counter.wrapping_add(bucket as u64 / 64));
    (word >> (bucket % 64)) as u32
}

pub(super) fn sign_rows(
    key: u64,
    dim: usize,
    first: u64,
    bucket: usize,
    rows: &mut [[f32; TILE_COLUMNS]],
) {
    for (index, row) in rows.iter_mut().enumerate() {
        let bits = sign_bits(key, dim, first.wrapping_add(index as u64), bucket);
        for (lane, entry) in row.iter_mut().enumerate() {
            *entry = f32::from_bits(1f32.to_bits() | (bits >> lane) << 31);
        }
    }
}

/// As `slots`, in operations of which IEEE 754 leaves nothing open, and that are never fused.
#[inline(always)]
pub(super) fn normal_rows(
    key: u64,
    dim: usize,
    first: u64,
    bucket: usize,
    rows: &mut [[f32; TILE_COLUMNS]],
) {
    /// Rows whose tails are put together.
    const ROWS: usize = 32;
    /// Entries of tails that are taken at once: several quotients and roots are under way then.
    const TAILS: usize = 32;
    /// Entries of a tail that are looked for in each row; few rows have more of them.
    const MOST: u32 = 8;
    let words = dim.div_ceil(2) as u64;
    let mut bits = [[0; TILE_COLUMNS]; ROWS];
    let mut places = [0u16; ROWS * TILE_COLUMNS + 1];
    for (block, rows) in rows.chunks_mut(ROWS).enumerate() {
        let mut count = 0;
        for (index, (row, bits)) in rows.iter_mut().zip(&mut bits).enumerate() {
            let coordinate = first.wrapping_add((block * ROWS + index) as u64);
            let counter = coordinate.wrapping_mul(words).wrapping_add(bucket as u64 / 2);
            for (half, pair) in bits.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let value = random::value(key, counter.wrapping_add(half as u64));
                *pair = [value as u32, (value >> 32) as u32];
            }
            let mut tails = 0u32;
            for (lane, (entry, &bits)) in row.iter_mut().zip(&*bits).enumerate() {
                *entry = normal::centre(bits) as f32;
                tails |= u32::from(normal::is_tail(bits)) << lane;
            }
            let mut looked = 0;
            while looked < MOST || tails != 0 {
                places[count] = (index * TILE_COLUMNS) as u16 + tails.trailing_zeros() as u16;
                count += usize::from(tails != 0);
                tails &= tails.wrapping_sub(1);
                looked += 1;
            }
        }
        let (bits, entries) = (bits.as_flattened(), rows.as_flattened_mut());
        for places in places[..count].chunks(TAILS) {
            let mut some = [0; TAILS];
            for (some, &place) in some.iter_mut().zip(places) {
                *some = bits[usize::from(place)];
            }
            let mut tails = [0.0; TAILS];
            for (tail, bits) in tails.iter_mut().zip(some) {
                *tail = normal::tail(bits) as f32;
            }
            for (&place, tail) in places.iter().zip(tails) {
                entries[usize::from(place)] = tail;
            }
        }
    }
}

/// As `add_columns`. The lanes are laid out flat, so that the loops are long.
#[inline(always)]
pub(super) fn hadamard<const L: usize>(values: &mut [[f32; L]]) {
    /// Numbers that go through all their stages one after the other, so that they stay in the first
    /// cache: 16 KiB.
    const NEAR: usize = 4096;
    let values = values.as_flattened_mut();
    let near = NEAR.min(values.len());
    for values in values.chunks_exact_mut(near) {
        stages(values, L);
    }
    stages(values, near);
}

/// The stages of a transform from that with partners `half` apart on: two at a time, which halves
/// the loads and stores, and one at the end if their number is odd.
#[inline(always)]
fn stages(values: &mut [f32], mut half: usize) {
    while 4 * half <= values.len() {
        for block in values.chunks_exact_mut(4 * half) {
            let (low, high) = block.split_at_mut(2 * half);
            let ((a, b), (c, d)) = (low.split_at_mut(half), high.split_at_mut(half));
            for ((a, b), (c, d)) in a.iter_mut().zip(b).zip(c.iter_mut().zip(d)) {
                let (low, low_difference) = (*a + *b, *a - *b);
                let (high, high_difference) = (*c + *d, *c - *d);
                (*a, *c) = (low + high, low - high);
                (*b, *d) = (low_difference + high_difference, low_difference - high_difference);
            }
        }
        half *= 4;
    }
    if 2 * half <= values.len() {
        for block in values.chunks_exact_mut(2 * half) {
            let (a, b) = block.split_at_mut(half);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
    }
}

/// As `add_columns`.
#[inline(always)]
pub(super) fn add_picked<const L: usize>(
    picks: &[Column],
    values: &[[f32; L]],
    sums: &mut [[f32; L]],
) {
    for (sums, pick) in sums.iter_mut().zip(picks) {
        let values = &values[pick.bucket()];
        for (sum, &value) in sums.iter_mut().zip(values) {
            *sum += pick.signed(value);
        }
    }
}

/// As `slots`.
#[inline(always)]
pub(super) fn shift_columns(by: Column, dim: usize, columns: &[Column], shifted: &mut [Column]) {
    for (column, shifted) in columns.iter().zip(shifted) {
        *shifted = column.shifted(by, dim);
    }
}

pub(super) fn dots_of_pairs(
    rows: &[f32],
    queries: &[f32],
    dim: usize,
    pairs: &[(u32, u32)],
    out: &mut [f32],
) {
    for (&(row, query), out) in pairs.iter().zip(out) {
        *out = dot(&rows[row as usize * dim..][..dim], &queries[query as usize * dim..][..dim]);
    }
}

pub(super) fn add_squared_transform(
    turns: &[Turn],
    leaves: &[LeafTurns],
    values: [&mut [f32]; 2],
    sums: [&mut [f32]; 2],
) {
    fourier::add_squared_transform::<4, [f32; 4]>(turns, leaves, values, sums);
}

pub(super) fn transform_back(turns: &[Turn], leaves: &[LeafTurns], values: [&mut [f32]; 2]) {
    fourier::transform_back::<4, [f32; 4]>(turns, leaves, values);
}

#[inline(always)]
pub(super) fn spread<const W: usize>(values: &[f32], stride: usize, out: &mut [f32]) {
    for (values, out) in values.as_chunks::<W>().0.iter().zip(out.chunks_mut(stride)) {
        out[..W].copy_from_slice(values);
    }
}

#[inline(always)]
pub(super) fn flush(sums: &mut [f32], totals: &mut [f64]) -> bool {
    let mut finite = true;
    for (total, sum) in totals.iter_mut().zip(sums) {
        finite &= sum.is_finite();
        *total += f64::from(*sum);
        *sum = 0.0;
    }
    finite
}

/// As `add_columns`.
#[inline(always)]
pub(super) fn squares(row: &[f32]) -> f64 {
    let mut lanes = [0.0; 8];
    let (whole, rest) = row.as_chunks::<8>();
    for chunk in whole {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(value) * f64::from(value);
        }
    }
    let rest: f64 = rest.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
    lanes.iter().sum::<f64>() + rest
}

/// As `add_columns`.
#[inline(always)]
pub(super) fn multiply(row: &[f32], factor: f64, out: &mut [f32]) {
    for (out, &value) in out.iter_mut().zip(row) {
        *out = (f64::from(value) * factor) as f32;
    }
}

/// As `add_columns`.
#[inline(always)]
pub(super) fn add_norm_terms(
    values: &[f32],
    delta: &[f32],
    epsilon: f32,
    centred: bool,
    weight: &mut [f32],
    bias: &mut [f32],
) {
    let width = weight.len();
    let count = width as f32;
    for (values, delta) in values.chunks_exact(width).zip(delta.chunks_exact(width)) {
        let mean = if centred { sum_by_lanes(values, |value| value) / count } else { 0.0 };
        let square = |value: f32| (value - mean) * (value - mean);
        let variance = sum_by_lanes(values, square) / count;
        let scale = 1.0 / (variance + epsilon).sqrt();
        let sums = weight.iter_mut().zip(bias.iter_mut());
        for ((weight, bias), (value, delta)) in sums.zip(values.iter().zip(delta)) {
            *weight += delta * ((value - mean) * scale);
            *bias += delta;
        }
    }
}

/// The sum over values of `of`, in 16 lanes that are added up by halves.
#[inline(always)]
fn sum_by_lanes(values: &[f32], of: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += of(value);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane += of(value);
    }
    sum_lanes(lanes)
}

pub(super) fn scatter<const N: usize>(
    slots: [&[Slot]; N],
    values: [&[f32]; N],
    blocks: [&mut [f32]; N],
) {
    scatter_widened(slots, values, blocks, |value| value);
}

pub(super) fn scatter_f16<const N: usize>(
    slots: [&[Slot]; N],
    values: [&[f16]; N],
    blocks: [&mut [f32]; N],
) {
    scatter_widened(slots, values, blocks, f16::to_f32);
}

pub(super) fn scatter_bf16<const N: usize>(
    slots: [&[Slot]; N],
    values: [&[bf16]; N],
    blocks: [&mut [f32]; N],
) {
    scatter_widened(slots, values, blocks, bf16::to_f32);
}

fn scatter_widened<const N: usize, T: Copy>(
    slots: [&[Slot]; N],
    values: [&[T]; N],
    blocks: [&mut [f32]; N],
    widen: impl Fn(T) -> f32,
) {
    for ((slots, values), block) in slots.into_iter().zip(values).zip(blocks) {
        for (slot, chunk) in slots.iter().zip(values.chunks_exact(LANES)) {
            let target = &mut block[slot.place()..][..LANES];
            for (lane, &value) in chunk.iter().enumerate() {
                let sign = u32::from(slot.signs() >> lane & 1) << 31;
                target[lane ^ slot.turn()] += f32::from_bits(widen(value).to_bits() ^ sign);
            }
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
    slots: (&[Slot], usize),
    block: &mut [f32],
    sum: Option<(&mut [f32], usize)>,
) {
    let mut tile: Tile = [[0.0; TILE_COLUMNS]; TILE_ROWS];
    outer_tile(left, right, &mut tile);
    let rows = slots.0.chunks(slots.1);
    for (slots, values) in rows.clone().zip(&tile) {
        scatter([&slots[..TILE_CHUNKS]], [values], [block]);
    }
    if let Some((sum, stride)) = sum {
        for (row, values) in tile.iter().take(rows.len()).enumerate() {
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

/// As `slots`.
#[inline(always)]
pub(super) fn nibble_dots(rows: &[u8], width: usize, queries: &[&[i8]], out: &mut [i32]) {
    let count = rows.len() / width;
    for (query, out) in queries.iter().zip(out.chunks_exact_mut(count)) {
        let (low, high) = query.split_at(width);
        for (row, out) in rows.chunks_exact(width).zip(out) {
            *out = nibble_dot(row, low, high);
        }
    }
}

pub(super) fn code_dots(
    upper: &[u8],
    lower: &[u8],
    width: usize,
    queries: &[&[i8]],
    out: &mut [i32],
) {
    let mut low = vec![0; out.len()];
    nibble_dots(upper, width, queries, out);
    nibble_dots(lower, width, queries, &mut low);
    for (out, low) in out.iter_mut().zip(low) {
        *out = 16 * *out + low;
    }
}

pub(super) fn picked_nibble_dots(
    rows: &[u8],
    width: usize,
    picks: &[u32],
    query: &[i8],
    out: &mut [i32],
) {
    let (low, high) = query.split_at(width);
    for (&pick, out) in picks.iter().zip(out) {
        *out = nibble_dot(&rows[pick as usize * width..][..width], low, high);
    }
}

/// As `slots`.
#[inline(always)]
fn nibble_dot(row: &[u8], low: &[i8], high: &[i8]) -> i32 {
    let mut sum = 0;
    for ((&pair, &low), &high) in row.iter().zip(low).zip(high) {
        sum += i32::from(pair & 15) * i32::from(low) + i32::from(pair >> 4) * i32::from(high);
    }
    sum
}

/// As `add_columns`.
#[inline(always)]
pub(super) fn add_estimates(
    products: &[i32],
    offset: i32,
    scales: &[f32],
    factor: f32,
    out: &mut [f32],
) {
    for ((out, &product), &scale) in out.iter_mut().zip(products).zip(scales) {
        *out += (scale * factor) * ((2 * product - offset) as f32);
    }
}

/// As `add_columns`.
#[inline(always)]
pub(super) fn add_multiple(values: &[f32], factor: f32, out: &mut [f32]) {
    for (out, &value) in out.iter_mut().zip(values) {
        *out += value * factor;
    }
}

/// As `add_columns`.
#[inline(always)]
pub(super) fn sift(
    estimates: &[f32],
    bounds: &[f32],
    above: f32,
    below: f32,
    survivors: &mut Vec<u32>,
) {
    // What is no number passes: it is for the exact score to say what it is.
    let passes =
        |estimate: f32, bound: f32| !(estimate + bound < above && estimate - bound > below);
    let (whole, rest) = estimates.as_chunks::<LANES>();
    let (whole_bounds, rest_bounds) = bounds.as_chunks::<LANES>();
    for (index, (estimates, bounds)) in whole.iter().zip(whole_bounds).enumerate() {
        let mut any = false;
        for (&estimate, &bound) in estimates.iter().zip(bounds) {
            any |= passes(estimate, bound);
        }
        if any {
            for (lane, (&estimate, &bound)) in estimates.iter().zip(bounds).enumerate() {
                if passes(estimate, bound) {
                    survivors.push((index * LANES + lane) as u32);
                }
            }
        }
    }
    for (lane, (&estimate, &bound)) in rest.iter().zip(rest_bounds).enumerate() {
        if passes(estimate, bound) {
            survivors.push((whole.len() * LANES + lane) as u32);
        }
    }
}

/// As `add_columns`.
#[inline(always)]
pub(super) fn sift_each(scores: &[f32], above: &[f32], below: &[f32], survivors: &mut Vec<u32>) {
    let passes = |score: f32, above: f32, below: f32| !(score < above && score > below);
    let (whole, rest) = scores.as_chunks::<LANES>();
    let ((aboves, rest_above), (belows, rest_below)) =
        (above.as_chunks::<LANES>(), below.as_chunks::<LANES>());
    for (index, (scores, (above, below))) in whole.iter().zip(aboves.iter().zip(belows)).enumerate()
    {
        let mut any = false;
        for ((&score, &above), &below) in scores.iter().zip(above).zip(below) {
            any |= passes(score, above, below);
        }
        if any {
            for (lane, ((&score, &above), &below)) in
                scores.iter().zip(above).zip(below).enumerate()
            {
                if passes(score, above, below) {
                    survivors.push((index * LANES + lane) as u32);
                }
            }
        }
    }
    for (lane, ((&score, &above), &below)) in
        rest.iter().zip(rest_above).zip(rest_below).enumerate()
    {
        if passes(score, above, below) {
            survivors.push((whole.len() * LANES + lane) as u32);
        }
    }
}

/// As `add_columns`.
#[inline(always)]
pub(super) fn reflect(direction: &[f64], factor: f64, values: &mut [f64]) {
    let mut lanes = [0.0; 8];
    let (whole, rest) = values.as_chunks::<8>();
    let (directions, rest_direction) = direction.as_chunks::<8>();
    for (values, direction) in whole.iter().zip(directions) {
        for (lane, (value, direction)) in lanes.iter_mut().zip(values.iter().zip(direction)) {
            *lane += value * direction;
        }
    }
    let rest: f64 = rest.iter().zip(rest_direction).map(|(value, along)| value * along).sum();
    let along = (lanes.iter().sum::<f64>() + rest) * factor;
    for (value, direction) in values.iter_mut().zip(direction) {
        *value -= along * direction;
    }
}

/// As `add_columns`.
#[inline(always)]
pub(super) fn butterflies(values: &mut [f64]) {
    let mut half = 1;
    while half < values.len() {
        for pair in values.chunks_exact_mut(2 * half) {
            let (left, right) = pair.split_at_mut(half);
            for (left, right) in left.iter_mut().zip(right) {
                (*left, *right) = (*left + *right, *left - *right);
            }
        }
        half *= 2;
    }
}
