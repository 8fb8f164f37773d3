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

use half::f16;

/// Coordinates that share one offset in a sketch, and lanes of a dot product.
pub const LANES: usize = 16;
/// Rows of a tile of an outer product.
pub const TILE_ROWS: usize = 8;
/// Columns of a tile of an outer product.
pub const TILE_COLUMNS: usize = 32;
/// Rows whose products with [`DOT_QUERIES`] queries are taken together.
pub const DOT_ROWS: usize = 4;
/// Queries whose products with [`DOT_ROWS`] rows are taken together.
pub const DOT_QUERIES: usize = 3;

/// Where the 16 coordinates of a chunk are added, and with which signs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// The bucket of the first coordinate; the others follow it.
    pub offset: u32,
    /// Bit `i` set: coordinate `i` is subtracted.
    pub signs: u16,
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
    /// AVX-512 F.
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
                if is_x86_feature_detected!("avx512f") {
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
        match self.0 {
            Set::Scalar => scalar::widen(halves, out),
            // SAFETY: the set exists, so the processor has it.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Set::Avx2 => unsafe { avx2::widen(halves, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Set::Avx512 => unsafe { avx512::widen(halves, out) },
        }
    }

    /// Adds chunk `i` of `values`, with its signs, at its offset in `block`, for all slots in
    /// order. `values` holds [`LANES`] values a slot; an offset is at most `block.len() - LANES`.
    #[inline]
    pub fn scatter(self, slots: &[Slot], values: &[f32], block: &mut [f32]) {
        debug_assert_eq!(slots.len() * LANES, values.len());
        match self.0 {
            Set::Scalar => scalar::scatter(slots, values, block),
            // SAFETY: the set exists, so the processor has it.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Set::Avx2 => unsafe { avx2::scatter(slots, values, block) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Set::Avx512 => unsafe { avx512::scatter(slots, values, block) },
        }
    }

    /// `tile[r][c] += sum over t of left[t][r] * right[t][c]`, fused, `t` in order.
    ///
    /// `left` is `[terms, TILE_ROWS]`, `right` `[terms, TILE_COLUMNS]`, `tile`
    /// `[TILE_ROWS, TILE_COLUMNS]`.
    #[inline]
    pub fn outer_tile(self, left: &[f32], right: &[f32], tile: &mut Tile) {
        debug_assert_eq!(left.len() / TILE_ROWS, right.len() / TILE_COLUMNS);
        match self.0 {
            Set::Scalar => scalar::outer_tile(left, right, tile),
            // SAFETY: the set exists, so the processor has it.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Set::Avx2 => unsafe { avx2::outer_tile(left, right, tile) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Set::Avx512 => unsafe { avx512::outer_tile(left, right, tile) },
        }
    }

    /// The inner products of every row with every query: `out[r * queries + q]`.
    ///
    /// One product is 16 fused sums, lane `l` over the elements `l, l + 16, …`, added up by
    /// halves.
    #[inline]
    pub fn dots(self, rows: &[f32], queries: &[f32], dim: usize, out: &mut [f32]) {
        debug_assert_eq!(out.len(), (rows.len() / dim) * (queries.len() / dim));
        match self.0 {
            Set::Scalar => scalar::dots(rows, queries, dim, out),
            // SAFETY: the set exists, so the processor has it.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Set::Avx2 => unsafe { avx2::dots(rows, queries, dim, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Set::Avx512 => unsafe { avx512::dots(rows, queries, dim, out) },
        }
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
                chunks.iter().map(|&(offset, signs, _)| Slot { offset, signs }).collect();
            let values: Vec<f32> = chunks.iter().flat_map(|chunk| chunk.2).collect();
            let mut expected = vec![0.5; 66];
            InstructionSet::SCALAR.scatter(&slots, &values, &mut expected);
            for set in wide() {
                let mut found = vec![0.5; 66];
                set.scatter(&slots, &values, &mut found);
                prop_assert_eq!(&found, &expected);
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
