//! The inner loops, with the instruction set chosen at run time.
//!
//! `scalar` defines every result. The vector forms compute the same sums in the same order, lane
//! by lane, so all give the same bits; tests run each form this machine has against the scalar.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

use std::sync::OnceLock;

use half::{bf16, f16};

use crate::random;

/// Coordinates that share one offset in a sketch, and lanes of a dot product.
pub const LANES: usize = 16;
/// Rows of a tile of an outer product.
pub const TILE_ROWS: usize = 8;
/// Columns of a tile of an outer product.
pub const TILE_COLUMNS: usize = 32;
/// Chunks of a row of a tile.
const TILE_CHUNKS: usize = TILE_COLUMNS / LANES;
/// How far ahead, in bytes, values are fetched that are read once, in order: a page, which is as
/// far as the processor itself does not look.
const AHEAD: usize = 4096;
/// Rows whose products with [`DOT_QUERIES`] queries are taken together.
pub const DOT_ROWS: usize = 4;
/// Queries whose products with [`DOT_ROWS`] rows are taken together.
pub const DOT_QUERIES: usize = 3;

/// Where the 16 coordinates of a chunk are added, and with which signs: 64 bits of which the lower
/// half is the bucket of the first coordinate, and the next 16 the signs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Slot(u64);

impl Slot {
    /// A slot with these parts.
    #[must_use]
    pub const fn new(offset: u32, signs: u16) -> Self {
        Self((signs as u64) << 32 | offset as u64)
    }

    /// The slot of chunk `chunk` of the stream `key`, for rows of width `dim`.
    #[inline(always)]
    #[must_use]
    pub const fn of(key: u64, dim: usize, chunk: u64) -> Self {
        let bits = random::value(key, chunk);
        // The product of two 32-bit numbers: its upper half is uniform below dim.
        let offset = ((bits >> 32) * dim as u64) >> 32;
        Self((bits & 0xFFFF) << 32 | offset)
    }

    /// The bucket of the first coordinate; the others follow it.
    #[inline(always)]
    #[must_use]
    pub const fn offset(self) -> u32 {
        self.0 as u32
    }

    /// Bit `i` set: coordinate `i` is subtracted.
    #[inline(always)]
    #[must_use]
    pub const fn signs(self) -> u16 {
        (self.0 >> 32) as u16
    }
}

/// Where one nonzero of a coordinate's column is, and its sign: 64 bits of which the lower half is
/// the bucket, and the top one is set for a minus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Column(u64);

impl Column {
    /// Bucket `bits >> 32` scaled to below `part`, plus `first`; the sign is the lowest bit.
    #[inline(always)]
    #[must_use]
    pub const fn of(bits: u64, part: usize, first: u32) -> Self {
        let bucket = (((bits >> 32) * part as u64) >> 32) + first as u64;
        Self(bits << 63 | bucket)
    }

    /// The bucket.
    #[inline(always)]
    #[must_use]
    pub const fn bucket(self) -> usize {
        self.0 as u32 as usize
    }

    /// The value with the column's sign.
    #[inline(always)]
    #[must_use]
    pub fn signed(self, value: f32) -> f32 {
        f32::from_bits(value.to_bits() ^ (self.0 >> 32) as u32)
    }
}

/// Calls the form of a kernel that a set stands for.
macro_rules! in_set {
    ($set:expr, $kernel:ident($($argument:expr),*)) => {
        match $set.0 {
            Set::Scalar => scalar::$kernel($($argument),*),
            // SAFETY: the set exists, so the processor has it.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Set::Avx2 => unsafe { avx2::$kernel($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Set::Avx512 => unsafe { avx512::$kernel($($argument),*) },
        }
    };
}

/// An instruction set that the kernels have a form for, and that this machine has.
///
/// The field is private: only [`InstructionSet::available`] makes one, so a vector form never runs
/// on a processor that lacks its instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InstructionSet(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    /// Plain Rust: the definition.
    Scalar,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F and DQ.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl InstructionSet {
    /// Plain Rust, which every machine has.
    pub const SCALAR: Self = Self(Set::Scalar);

    /// The sets this machine has, narrowest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut sets = vec![Self::SCALAR];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                sets.push(Self(Set::Avx2));
                if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq") {
                    sets.push(Self(Set::Avx512));
                }
            }
        }
        sets
    }

    /// The widest set this machine has, or the one that the environment variable
    /// `WHENCE_INSTRUCTION_SET` names (`scalar`, `avx2`, `avx512`), if the machine has it.
    #[must_use]
    pub fn best() -> Self {
        static BEST: OnceLock<InstructionSet> = OnceLock::new();
        *BEST.get_or_init(|| {
            let sets = Self::available();
            let wanted = std::env::var("WHENCE_INSTRUCTION_SET").unwrap_or_default();
            let named = sets.iter().copied().find(|set| set.name() == wanted);
            named.or_else(|| sets.last().copied()).unwrap_or(Self::SCALAR)
        })
    }

    /// Its name in lower case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
        }
    }

    /// The same numbers as f32, exactly; the slices are of one length.
    #[inline]
    pub fn widen(self, halves: &[f16], out: &mut [f32]) {
        debug_assert_eq!(halves.len(), out.len());
        in_set!(self, widen(halves, out));
    }

    /// The slots of the chunks from `first` on of the stream `key`, for rows of width `dim`.
    #[inline]
    pub fn slots(self, key: u64, dim: usize, first: u64, slots: &mut [Slot]) {
        in_set!(self, slots(key, dim, first, slots));
    }

    /// The columns of the nonzeros from `first` on of the stream `key`: `nonzeros` to a coordinate,
    /// a power of two, one in each part of the row of `part` buckets.
    #[inline]
    pub fn columns(
        self,
        key: u64,
        part: usize,
        nonzeros: usize,
        first: u64,
        columns: &mut [Column],
    ) {
        debug_assert!(nonzeros.is_power_of_two());
        in_set!(self, columns(key, part, nonzeros, first, columns));
    }

    /// Adds `values[i][lane]`, with its sign, to lane `lane` of the bucket of each of the
    /// `nonzeros` columns of `i`, in order.
    #[inline]
    pub fn add_columns<const L: usize>(
        self,
        columns: &[Column],
        nonzeros: usize,
        values: &[[f32; L]],
        block: &mut [[f32; L]],
    ) {
        debug_assert_eq!(columns.len(), values.len() * nonzeros);
        in_set!(self, add_columns(columns, nonzeros, values, block));
    }

    /// Adds chunk `i` of `values`, with its signs, at its offset in `block`, for all slots in
    /// order. `values` holds [`LANES`] values a slot; an offset is at most `block.len() - LANES`.
    #[inline]
    pub fn scatter(self, slots: &[Slot], values: &[f32], block: &mut [f32]) {
        debug_assert_eq!(slots.len() * LANES, values.len());
        in_set!(self, scatter(slots, values, block));
    }

    /// [`InstructionSet::scatter`] of values of 16 bits, widened.
    #[inline]
    pub fn scatter_f16(self, slots: &[Slot], values: &[f16], block: &mut [f32]) {
        debug_assert_eq!(slots.len() * LANES, values.len());
        in_set!(self, scatter_f16(slots, values, block));
    }

    /// [`InstructionSet::scatter`] of values of 16 bits, widened.
    #[inline]
    pub fn scatter_bf16(self, slots: &[Slot], values: &[bf16], block: &mut [f32]) {
        debug_assert_eq!(slots.len() * LANES, values.len());
        in_set!(self, scatter_bf16(slots, values, block));
    }

    /// `tile[r][c] += sum over t of left[t][r] * right[t][c]`, fused, `t` in order.
    ///
    /// `left` is `[terms, TILE_ROWS]`, `right` `[terms, TILE_COLUMNS]`, `tile`
    /// `[TILE_ROWS, TILE_COLUMNS]`.
    #[inline]
    pub fn outer_tile(self, left: &[f32], right: &[f32], tile: &mut Tile) {
        debug_assert_eq!(left.len() / TILE_ROWS, right.len() / TILE_COLUMNS);
        in_set!(self, outer_tile(left, right, tile));
    }

    /// [`InstructionSet::outer_tile`] from zero, then [`InstructionSet::scatter`] of its first
    /// `slots.len() / 2` rows: the tile need not leave the registers.
    ///
    /// If there is a `sum`, of which row `r` of the tile begins at `r stride`, the tile is added
    /// to it too.
    #[inline]
    pub fn outer_scatter(
        self,
        left: &[f32],
        right: &[f32],
        slots: &[Slot],
        block: &mut [f32],
        sum: Option<(&mut [f32], usize)>,
    ) {
        debug_assert_eq!(left.len() / TILE_ROWS, right.len() / TILE_COLUMNS);
        debug_assert!(slots.len() <= TILE_ROWS * TILE_CHUNKS);
        in_set!(self, outer_scatter(left, right, slots, block, sum));
    }

    /// The inner products of every row with every query: `out[r * queries + q]`.
    ///
    /// One product is 16 fused sums, lane `l` over the elements `l, l + 16, …`, added up by
    /// halves.
    #[inline]
    pub fn dots(self, rows: &[f32], queries: &[f32], dim: usize, out: &mut [f32]) {
        debug_assert_eq!(out.len(), (rows.len() / dim) * (queries.len() / dim));
        in_set!(self, dots(rows, queries, dim, out));
    }
}

/// A tile of an outer product.
pub type Tile = [[f32; TILE_COLUMNS]; TILE_ROWS];

/// The sum of 16 lanes by halves: lane `i` and lane `i + 8`, then 4, 2, 1.
#[inline]
fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Calls `block` for tiles of at most [`DOT_ROWS`] rows by [`DOT_QUERIES`] queries that cover
/// all; each call gets the first row, the first query, and the sizes of the tile.
#[inline]
fn for_each_dot_tile(
    rows: usize,
    queries: usize,
    mut block: impl FnMut(usize, usize, usize, usize),
) {
    for row in (0..rows).step_by(DOT_ROWS) {
        for query in (0..queries).step_by(DOT_QUERIES) {
            block(row, query, DOT_ROWS.min(rows - row), DOT_QUERIES.min(queries - query));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn wide() -> Vec<InstructionSet> {
        InstructionSet::available().split_off(1)
    }

    #[test]
    fn every_half_is_widened_exactly_in_every_set() {
        let halves: Vec<f16> = (0..=u16::MAX).chain(0..7).map(f16::from_bits).collect();
        for set in InstructionSet::available() {
            let mut found = vec![0.0; halves.len()];
            set.widen(&halves, &mut found);
            for (half, found) in halves.iter().zip(found) {
                assert!(found == half.to_f32() || (found.is_nan() && half.is_nan()));
            }
        }
    }

    proptest! {
        #[test]
        fn scatter_is_the_same_in_every_set(
            chunks in prop::collection::vec((0u32..50, any::<u16>(), prop::array::uniform16(-1e3f32..1e3)), 0..40),
        ) {
            let slots: Vec<Slot> =
                chunks.iter().map(|&(offset, signs, _)| Slot::new(offset, signs)).collect();
            let values: Vec<f32> = chunks.iter().flat_map(|chunk| chunk.2).collect();
            let halves: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
            let brains: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
            let scattered = |set: InstructionSet| {
                let mut blocks = [vec![0.5; 66], vec![0.5; 66], vec![0.5; 66]];
                set.scatter(&slots, &values, &mut blocks[0]);
                set.scatter_f16(&slots, &halves, &mut blocks[1]);
                set.scatter_bf16(&slots, &brains, &mut blocks[2]);
                blocks
            };
            let expected = scattered(InstructionSet::SCALAR);
            for set in wide() {
                prop_assert_eq!(&scattered(set), &expected);
            }
            // Values of 16 bits are those of 32 bits that they widen to.
            let wide_halves: Vec<f32> = halves.iter().map(|value| value.to_f32()).collect();
            let wide_brains: Vec<f32> = brains.iter().map(|value| value.to_f32()).collect();
            for (values, expected) in [(wide_halves, &expected[1]), (wide_brains, &expected[2])] {
                let mut found = vec![0.5; 66];
                InstructionSet::SCALAR.scatter(&slots, &values, &mut found);
                prop_assert_eq!(&found, expected);
            }
        }

        #[test]
        fn slots_are_the_same_in_every_set(
            key in any::<u64>(), dim in 1usize..=1 << 20, first in 0u64..1 << 44, count in 0usize..40,
        ) {
            for set in InstructionSet::available() {
                let mut found = vec![Slot::default(); count];
                set.slots(key, dim, first, &mut found);
                for (chunk, slot) in (first..).zip(found) {
                    let bits = random::value(key, chunk);
                    prop_assert_eq!(slot.signs(), bits as u16);
                    let offset = (u128::from(bits >> 32) * dim as u128) >> 32;
                    prop_assert_eq!(u128::from(slot.offset()), offset);
                }
            }
        }

        #[test]
        fn outer_scatter_is_outer_tile_then_scatter_in_every_set(
            terms in prop::collection::vec(
                (prop::array::uniform8(-4f32..4.0), prop::array::uniform32(-4f32..4.0)), 0..20),
            places in prop::collection::vec((0u32..50, any::<u16>()), 0..=8), summed in any::<bool>(),
        ) {
            let left: Vec<f32> = terms.iter().flat_map(|term| term.0).collect();
            let right: Vec<f32> = terms.iter().flat_map(|term| term.1).collect();
            let slots: Vec<Slot> = places
                .iter()
                .flat_map(|&(offset, signs)| [Slot::new(offset, signs), Slot::new(offset / 2, !signs)])
                .collect();
            let mut tile: Tile = [[0.0; TILE_COLUMNS]; TILE_ROWS];
            InstructionSet::SCALAR.outer_tile(&left, &right, &mut tile);
            let mut expected = vec![0.5; 66];
            let values = &tile.as_flattened()[..slots.len() * LANES];
            InstructionSet::SCALAR.scatter(&slots, values, &mut expected);
            let (stride, rows) = (40, slots.len() / 2);
            let mut expected_sum = vec![0.25; TILE_ROWS * stride];
            for (sums, values) in expected_sum.chunks_mut(stride).zip(&tile[..rows]) {
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum += value;
                }
            }
            for set in InstructionSet::available() {
                let (mut found, mut sum) = (vec![0.5; 66], vec![0.25; TILE_ROWS * stride]);
                let into = summed.then_some((&mut sum[..], stride));
                set.outer_scatter(&left, &right, &slots, &mut found, into);
                prop_assert_eq!(&found, &expected);
                if summed {
                    prop_assert_eq!(&sum, &expected_sum);
                }
            }
        }

        #[test]
        fn outer_tile_is_the_same_in_every_set(
            terms in prop::collection::vec(
                (prop::array::uniform8(-4f32..4.0), prop::array::uniform32(-4f32..4.0)), 0..20),
        ) {
            let left: Vec<f32> = terms.iter().flat_map(|term| term.0).collect();
            let right: Vec<f32> = terms.iter().flat_map(|term| term.1).collect();
            let mut expected: Tile = [[0.25; TILE_COLUMNS]; TILE_ROWS];
            InstructionSet::SCALAR.outer_tile(&left, &right, &mut expected);
            for set in wide() {
                let mut found: Tile = [[0.25; TILE_COLUMNS]; TILE_ROWS];
                set.outer_tile(&left, &right, &mut found);
                prop_assert_eq!(found, expected);
            }
        }

        #[test]
        fn dots_are_the_same_in_every_set(
            dim in 1usize..70, rows in 0usize..11, queries in 0usize..8, seed in any::<u64>(),
        ) {
            let random = |stream: u64, n: usize| -> Vec<f32> {
                (0..n)
                    .map(|i| (crate::random::value(seed ^ stream, i as u64) >> 40) as f32 / 8_388_608.0 - 1.0)
                    .collect()
            };
            let (left, right) = (random(1, rows * dim), random(2, queries * dim));
            let mut expected = vec![0.0; rows * queries];
            InstructionSet::SCALAR.dots(&left, &right, dim, &mut expected);
            for set in wide() {
                let mut found = vec![0.0; rows * queries];
                set.dots(&left, &right, dim, &mut found);
                prop_assert_eq!(&found, &expected);
            }
            for (index, &found) in expected.iter().enumerate() {
                let (row, query) = (index / queries * dim, index % queries * dim);
                let pairs = left[row..row + dim].iter().zip(&right[query..query + dim]);
                let exact: f64 = pairs.clone().map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
                let size: f64 = pairs.map(|(x, y)| f64::from((x * y).abs())).sum();
                prop_assert!((f64::from(found) - exact).abs() <= size * 6e-8 * (dim as f64 + 1.0));
            }
        }
    }
}
