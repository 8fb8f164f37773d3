//! The inner loops, with the instruction set chosen at run time.
//!
//! `scalar` defines every result. The vector forms compute the same sums in the same order, lane
//! by lane, so all give the same bits; tests run each form this machine has against the scalar.
#![allow(clippy::inline_always)] // what a vector form is made of has to become a part of it

/// The forms that are the definition itself, compiled for other instructions: those kernels whose
/// lanes the compiler puts side by side on its own, and in which nothing may be fused.
#[cfg(target_arch = "x86_64")]
macro_rules! compiled_forms {
    ($features:literal) => {
        compiled_forms! { $features,
            fn widen_bytes(bytes: &[i8], out: &mut [f32]);
            fn largest(row: &[f32]) -> f32;
            fn fit_levels[B](sizes: &[f32], scale: f32) -> [f64; 3];
            fn level_codes[B](row: &[f32], scale: f64, codes: &mut [u8]) -> f64;
            fn slots(key: u64, dim: usize, first: u64, slots: &mut [Slot]);
            fn columns(key: u64, part: usize, nonzeros: usize, first: u64, columns: &mut [Column]);
            fn add_columns[L](
                columns: &[Column], nonzeros: usize, values: &[[f32; L]], block: &mut [[f32; L]]
            );
            fn draws(key: u64, things: usize, first: u64, draws: &mut [Column]);
            fn flips(key: u64, first: u64, flips: &mut [u32]);
            fn normal_rows(
                key: u64, dim: usize, first: u64, bucket: usize, rows: &mut [[f32; TILE_COLUMNS]]
            );
            fn hadamard[L](values: &mut [[f32; L]]);
            fn add_picked[L](picks: &[Column], values: &[[f32; L]], sums: &mut [[f32; L]]);
            fn shift_columns(by: Column, dim: usize, columns: &[Column], shifted: &mut [Column]);
            fn spread[W](values: &[f32], stride: usize, out: &mut [f32]);
            fn flush(sums: &mut [f32], totals: &mut [f64]) -> bool;
            fn squares(row: &[f32]) -> f64;
            fn multiply(row: &[f32], factor: f64, out: &mut [f32]);
            fn add_estimates(
                products: &[i32], offset: i32, scales: &[f32], factor: f32, out: &mut [f32]
            );
            fn add_multiple(values: &[f32], factor: f32, out: &mut [f32]);
            fn sift(
                estimates: &[f32], bounds: &[f32], above: f32, below: f32,
                survivors: &mut Vec<u32>
            );
            fn sift_each(
                scores: &[f32], above: &[f32], below: &[f32], survivors: &mut Vec<u32>
            );
            fn reflect(direction: &[f64], factor: f64, values: &mut [f64]);
            fn butterflies(values: &mut [f64]);
            fn add_norm_terms(
                values: &[f32], delta: &[f32], epsilon: f32, centred: bool,
                weight: &mut [f32], bias: &mut [f32]
            );
        }
    };
    ($features:literal, $(
        fn $kernel:ident $([$size:ident])? ($($argument:ident: $type:ty),*) $(-> $out:ty)?;
    )*) => {$(
        #[target_feature(enable = $features)]
        pub(super) fn $kernel $(<const $size: usize>)? ($($argument: $type),*) $(-> $out)? {
            scalar::$kernel $(::<$size>)? ($($argument),*)
        }
    )*};
}

/// `scatter_loaded` of a set whose chunks are `$chunk`: adds chunk after chunk of all rows, each as
/// `load` reads it. What the slots of rows that share them say is worked out once.
#[cfg(target_arch = "x86_64")]
macro_rules! scatter_loaded {
    ($features:literal, $chunk:ty) => {
        #[inline]
        #[target_feature(enable = $features)]
        fn scatter_loaded<const N: usize, T>(
            slots: [&[Slot]; N],
            values: [&[T]; N],
            mut blocks: [&mut [f32]; N],
            load: impl Fn(&[T; LANES]) -> $chunk,
        ) {
            let count = slots.iter().map(|slots| slots.len()).min().unwrap_or(0);
            let slots = slots.map(|slots| &slots[..count]);
            let rows = values.map(|values| &values.as_chunks::<LANES>().0[..count]);
            if slots.iter().all(|each| std::ptr::eq(*each, slots[0])) {
                for index in 0..count {
                    let target = Target::of(slots[0][index]);
                    for (row, block) in rows.iter().zip(&mut blocks) {
                        prefetch(row[index].as_ptr().cast::<i8>().wrapping_add(AHEAD));
                        target.add(load(&row[index]), block);
                    }
                }
                return;
            }
            for index in 0..count {
                for ((slots, row), block) in slots.iter().zip(&rows).zip(&mut blocks) {
                    prefetch(row[index].as_ptr().cast::<i8>().wrapping_add(AHEAD));
                    Target::of(slots[index]).add(load(&row[index]), block);
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod fourier;
mod lines;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod vnni;

use std::sync::OnceLock;

use half::{bf16, f16};

use crate::random;

pub use lines::Lines;

/// Coordinates that share one offset in a sketch, and lanes of a dot product.
pub const LANES: usize = 16;
/// Rows of a tile of an outer product.
pub const TILE_ROWS: usize = 8;
/// Columns of a tile of an outer product.
pub const TILE_COLUMNS: usize = 32;
/// Chunks of a row of a tile.
const TILE_CHUNKS: usize = TILE_COLUMNS / LANES;
/// How far ahead, in bytes, values are fetched that are read once, in order: half a page, for at
/// the end of a page the processor itself does not look further.
const AHEAD: usize = 2048;
/// The same for codes, of which several rows are read side by side: a page.
const FAR: usize = 4096;
/// Rows whose products with several queries are taken together.
pub const DOT_ROWS: usize = 4;

/// Asks for the line of an address, which need not be one of ours.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[allow(unsafe_code)]
fn prefetch(address: *const i8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a hint, which every x86-64 has, and which touches no memory.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address) }
}

/// The lane that each of `W` lanes is taken from, for every turn.
#[cfg(target_arch = "x86_64")]
const fn turns<const W: usize>() -> [[u32; W]; W] {
    let mut turns = [[0; W]; W];
    let mut at = 0;
    while at < W * W {
        turns[at / W][at % W] = ((at / W) ^ (at % W)) as u32;
        at += 1;
    }
    turns
}

/// Where the 16 coordinates of a chunk are added, and with which signs: 64 bits of which the lower
/// half is the place of the 16 sums, the next 16 are the signs, and 4 more how the lanes are
/// exchanged: lane `i` is added to sum `i ^ turn`.
///
/// Places are multiples of 16, so that the sums are one line of the cache, wherever `dim` allows:
/// those of a `dim` that is no multiple begin anywhere in its last 16 to 31 buckets, the ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Slot(u64);

impl Slot {
    /// The slot of these random bits, for rows of width `dim` whose ring begins at `ring`.
    #[inline(always)]
    #[must_use]
    pub const fn of(bits: u64, dim: usize, ring: usize) -> Self {
        let offset = random::below(bits, dim as u32);
        // The upper four bits of what is less than zero are ones: those of an offset before the ring.
        let turn = offset & (offset.wrapping_sub(ring as u64) >> 60);
        Self(turn << 48 | (bits & 0xFFFF) << 32 | (offset - turn))
    }

    /// The first bucket of the ring of rows of width `dim`.
    #[inline]
    #[must_use]
    pub const fn ring(dim: usize) -> usize {
        if dim.is_multiple_of(LANES) { dim } else { (dim - dim % LANES).saturating_sub(LANES) }
    }

    /// The bucket of the first coordinate.
    #[inline(always)]
    #[must_use]
    pub const fn offset(self) -> u32 {
        self.place() as u32 + self.turn() as u32
    }

    /// The bucket of coordinate `lane`, for rows of width `dim`.
    #[inline]
    #[must_use]
    pub const fn bucket(self, lane: usize, dim: usize) -> usize {
        let (bucket, ring) = (self.place() + (lane ^ self.turn()), Self::ring(dim));
        if bucket < ring { bucket } else { ring + (bucket - ring) % (dim - ring) }
    }

    /// Where the sums begin.
    #[inline(always)]
    #[must_use]
    pub(super) const fn place(self) -> usize {
        self.0 as u32 as usize
    }

    /// What the number of a lane is combined with, by exclusive or, to be that of its sum.
    #[inline(always)]
    #[must_use]
    pub(super) const fn turn(self) -> usize {
        (self.0 >> 48) as usize % LANES
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
    /// A bucket below `part`, by [`random::below`], plus `first`; the sign is the lowest bit.
    #[inline(always)]
    #[must_use]
    pub const fn of(bits: u64, part: usize, first: u32) -> Self {
        Self(bits << 63 | (random::below(bits, part as u32) + first as u64))
    }

    /// The same sign, turned if `flip`, in this bucket.
    #[inline(always)]
    #[must_use]
    pub const fn moved(self, bucket: u32, flip: bool) -> Self {
        Self((self.0 >> 63 ^ flip as u64) << 63 | bucket as u64)
    }

    /// The sum of the buckets modulo `dim`, which both are below, and the product of the signs.
    #[inline(always)]
    #[must_use]
    pub const fn shifted(self, by: Self, dim: usize) -> Self {
        // The signs, at the top, add up modulo 2; the buckets do not reach them.
        let sum = self.0.wrapping_add(by.0);
        let over = sum as u32 as u64 >= dim as u64;
        Self(sum - if over { dim as u64 } else { 0 })
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
    ($set:expr, $kernel:ident $(::<$size:ident>)? ($($argument:expr),*)) => {
        match $set.0 {
            Set::Scalar => scalar::$kernel $(::<$size>)? ($($argument),*),
            // SAFETY: the set exists, so the processor has it.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Set::Avx2 => unsafe { avx2::$kernel $(::<$size>)? ($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Set::Avx512 | Set::Vnni => unsafe { avx512::$kernel $(::<$size>)? ($($argument),*) },
        }
    };
}

/// The same for products of codes, of which AVX-512 has no form of its own without VNNI.
macro_rules! in_code_set {
    ($set:expr, $kernel:ident ($($argument:expr),*)) => {
        match $set.0 {
            Set::Scalar => scalar::$kernel($($argument),*),
            // SAFETY: the set exists, so the processor has it; each wider set has AVX2.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Set::Avx2 | Set::Avx512 => unsafe { avx2::$kernel($($argument),*) },
            // SAFETY: the set exists, so the processor has it.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Set::Vnni => unsafe { vnni::$kernel($($argument),*) },
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
    /// The same with BW and VNNI, for products of codes.
    #[cfg(target_arch = "x86_64")]
    Vnni,
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
                    if is_x86_feature_detected!("avx512bw")
                        && is_x86_feature_detected!("avx512vnni")
                    {
                        sets.push(Self(Set::Vnni));
                    }
                }
            }
        }
        sets
    }

    /// The widest set this machine has, or the one that the environment variable
    /// `WHENCE_INSTRUCTION_SET` names (`scalar`, `avx2`, `avx512`, `avx512vnni`), if the machine has it.
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
            #[cfg(target_arch = "x86_64")]
            Set::Vnni => "avx512vnni",
        }
    }

    /// The same numbers as f32, exactly; the slices are of one length.
    #[inline]
    pub fn widen(self, halves: &[f16], out: &mut [f32]) {
        debug_assert_eq!(halves.len(), out.len());
        in_set!(self, widen(halves, out));
    }

    /// The same numbers as f32, exactly; the slices are of one length.
    #[inline]
    pub fn widen_bytes(self, bytes: &[i8], out: &mut [f32]) {
        debug_assert_eq!(bytes.len(), out.len());
        in_set!(self, widen_bytes(bytes, out));
    }

    /// The levels of codes of `B` bits, 1, 2 or 4, the lowest of a byte first: `2 c - (2^B - 1)` of
    /// code `c`. As many as fit into `out`, which `bytes` has codes for.
    #[inline]
    pub fn unpack<const B: usize>(self, bytes: &[u8], out: &mut [f32]) {
        debug_assert_eq!((out.len() * B).div_ceil(8), bytes.len());
        in_set!(self, unpack::<B>(bytes, out));
    }

    /// The largest size of a value that is a number; 0 of none.
    #[inline]
    #[must_use]
    pub fn largest(self, row: &[f32]) -> f32 {
        in_set!(self, largest(row))
    }

    /// Of the levels of `B` bits that are nearest to sizes at a scale: the squares of what they
    /// lose, what is lost times the levels, and their squares; in lanes of f32 that are added up
    /// now and then.
    #[inline]
    #[must_use]
    pub fn fit_levels<const B: usize>(self, sizes: &[f32], scale: f32) -> [f64; 3] {
        in_set!(self, fit_levels::<B>(sizes, scale))
    }

    /// The codes of the levels of `B` bits that are nearest to a row at a scale, of two the even
    /// code; and the square of what is lost, in eight lanes that are added up in order. Of 8 bits
    /// a code is its level, from -127 to 127; the slices are of one length.
    #[inline]
    pub fn level_codes<const B: usize>(self, row: &[f32], scale: f64, codes: &mut [u8]) -> f64 {
        debug_assert_eq!(row.len(), codes.len());
        in_set!(self, level_codes::<B>(row, scale, codes))
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

    /// The first steps of a shuffle of `things` things, from the values from `first` on of the
    /// stream `key`: at step `i` thing `i` changes places with that in the draw's bucket, which is
    /// uniform from `i` to below `things`. The signs are independent of the buckets.
    #[inline]
    pub fn draws(self, key: u64, things: usize, first: u64, draws: &mut [Column]) {
        debug_assert!(draws.len() <= things);
        in_set!(self, draws(key, things, first, draws));
    }

    /// The sign bits of coordinates: bit `i mod 64` of value `i / 64` of the stream `key`, for the
    /// `i` from `first` on.
    #[inline]
    pub fn flips(self, key: u64, first: u64, flips: &mut [u32]) {
        in_set!(self, flips(key, first, flips));
    }

    /// Puts the values of at most `L` rows, from place `from` on, into the lanes of `values`, with
    /// the signs turned that `flips` has; the lanes past the rows stay as they are.
    #[inline]
    pub fn side_by_side<const L: usize>(
        self,
        rows: &[&[f32]],
        from: usize,
        flips: &[u32],
        values: &mut [[f32; L]],
    ) {
        debug_assert!(rows.len() <= L);
        debug_assert_eq!(flips.len(), values.len());
        in_set!(self, side_by_side(rows, from, flips, values));
    }

    /// The signs, `1` or `-1`, of the coordinates from `first` on in the buckets from `bucket` on,
    /// a multiple of 32: for coordinate `c` and bucket `b` bit `b mod 64` of value
    /// `c ceil(dim / 64) + b / 64` of the stream `key`, set for a minus.
    #[inline]
    pub fn sign_rows(
        self,
        key: u64,
        dim: usize,
        first: u64,
        bucket: usize,
        rows: &mut [[f32; TILE_COLUMNS]],
    ) {
        debug_assert!(bucket.is_multiple_of(TILE_COLUMNS));
        in_set!(self, sign_rows(key, dim, first, bucket, rows));
    }

    /// The normal numbers of the coordinates from `first` on in the buckets from `bucket` on, a
    /// multiple of 32: for coordinate `c` and bucket `b` the [`crate::normal::quantile`], rounded,
    /// of a half of value `c ceil(dim / 2) + b / 2` of the stream `key`, the lower half for even
    /// `b`.
    #[inline]
    pub fn normal_rows(
        self,
        key: u64,
        dim: usize,
        first: u64,
        bucket: usize,
        rows: &mut [[f32; TILE_COLUMNS]],
    ) {
        debug_assert!(bucket.is_multiple_of(TILE_COLUMNS));
        in_set!(self, normal_rows(key, dim, first, bucket, rows));
    }

    /// The Walsh-Hadamard transform of each lane: value `i` becomes the sum over `j` of value `j`,
    /// with a minus where `i & j` has an odd number of bits. Their number is a power of two.
    ///
    /// Sums and differences of pairs 1 apart, then of pairs 2 apart, 4 apart, and so on.
    #[inline]
    pub fn hadamard<const L: usize>(self, values: &mut [[f32; L]]) {
        debug_assert!(values.len().is_power_of_two());
        in_set!(self, hadamard(values));
    }

    /// Adds to lane `lane` of `sums[i]` that of the value in the bucket of `picks[i]`, with its
    /// sign.
    #[inline]
    pub fn add_picked<const L: usize>(
        self,
        picks: &[Column],
        values: &[[f32; L]],
        sums: &mut [[f32; L]],
    ) {
        debug_assert_eq!(picks.len(), sums.len());
        in_set!(self, add_picked(picks, values, sums));
    }

    /// [`Column::shifted`] of each column.
    #[inline]
    pub fn shift_columns(self, by: Column, dim: usize, columns: &[Column], shifted: &mut [Column]) {
        debug_assert_eq!(columns.len(), shifted.len());
        in_set!(self, shift_columns(by, dim, columns, shifted));
    }

    /// The products of [`InstructionSet::dots`] for some pairs of a row and a query only.
    #[inline]
    pub fn dots_of_pairs(
        self,
        rows: &[f32],
        queries: &[f32],
        dim: usize,
        pairs: &[(u32, u32)],
        out: &mut [f32],
    ) {
        debug_assert_eq!(pairs.len(), out.len());
        in_set!(self, dots_of_pairs(rows, queries, dim, pairs, out));
    }

    /// Adds to `sums`, real and imaginary parts, the square of each value of the Fourier transform
    /// of `values`, which is overwritten; `4^e` or `2 4^e` of them, at least 256. The order of the
    /// values, and the sign of the exponent, are those that [`InstructionSet::transform_back`] of
    /// the same set takes back.
    ///
    /// Turn `k` is that of `exp(2 pi i r / 4)` and its powers, for the number `r` below 1 whose
    /// binary digits are those of `k` in reverse; row `6 (1 + b) + j` of leaf `l` holds, for lane
    /// `k`, part `j` of turn `4 (16 l + k) + b`, and row `j` part `j` of turn `16 l + k`.
    #[inline]
    pub fn add_squared_transform(
        self,
        turns: &[Turn],
        leaves: &[LeafTurns],
        values: [&mut [f32]; 2],
        sums: [&mut [f32]; 2],
    ) {
        debug_assert!(values[0].len().is_power_of_two() && values[0].len() >= LANES * LANES);
        debug_assert_eq!(values[0].len(), leaves.len() * LANES * LANES);
        in_set!(self, add_squared_transform(turns, leaves, values, sums));
    }

    /// Replaces a Fourier transform by the values it is that of, times their number.
    #[inline]
    pub fn transform_back(self, turns: &[Turn], leaves: &[LeafTurns], values: [&mut [f32]; 2]) {
        debug_assert_eq!(values[0].len(), leaves.len() * LANES * LANES);
        in_set!(self, transform_back(turns, leaves, values));
    }

    /// Adds chunk `i` of each row of `values`, with its signs, at its offset in the row's block,
    /// for all slots of the row in order; all rows have as many.
    ///
    /// A row holds [`LANES`] values a slot; an offset is at most the block's length less [`LANES`].
    /// Several rows at a time are several streams from memory, which one after the other would not
    /// use.
    #[inline]
    pub fn scatter<const N: usize>(
        self,
        slots: [&[Slot]; N],
        values: [&[f32]; N],
        blocks: [&mut [f32]; N],
    ) {
        debug_assert!(values.iter().zip(slots).all(|(v, s)| v.len() == s.len() * LANES));
        in_set!(self, scatter(slots, values, blocks));
    }

    /// [`InstructionSet::scatter`] of values of 16 bits, widened.
    #[inline]
    pub fn scatter_f16<const N: usize>(
        self,
        slots: [&[Slot]; N],
        values: [&[f16]; N],
        blocks: [&mut [f32]; N],
    ) {
        debug_assert!(values.iter().zip(slots).all(|(v, s)| v.len() == s.len() * LANES));
        in_set!(self, scatter_f16(slots, values, blocks));
    }

    /// [`InstructionSet::scatter`] of values of 16 bits, widened.
    #[inline]
    pub fn scatter_bf16<const N: usize>(
        self,
        slots: [&[Slot]; N],
        values: [&[bf16]; N],
        blocks: [&mut [f32]; N],
    ) {
        debug_assert!(values.iter().zip(slots).all(|(v, s)| v.len() == s.len() * LANES));
        in_set!(self, scatter_bf16(slots, values, blocks));
    }

    /// Asks for values that will be read soon.
    #[inline]
    pub fn fetch<T>(values: &[T]) {
        #[cfg(target_arch = "x86_64")]
        for line in values.chunks((lines::LINE / size_of::<T>().max(1)).max(1)) {
            prefetch(line.as_ptr().cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = values;
    }

    /// Puts `W` values after `W` values, as many times as `values` holds them, `stride` apart.
    #[inline]
    pub fn spread<const W: usize>(self, values: &[f32], stride: usize, out: &mut [f32]) {
        in_set!(self, spread::<W>(values, stride, out));
    }

    /// Adds f32 sums to f64 totals and clears them; `false` if one was NaN or infinite.
    #[inline]
    pub fn flush(self, sums: &mut [f32], totals: &mut [f64]) -> bool {
        in_set!(self, flush(sums, totals))
    }

    /// The sum of squares, in eight lanes that are added up in order.
    #[inline]
    #[must_use]
    pub fn squares(self, row: &[f32]) -> f64 {
        in_set!(self, squares(row))
    }

    /// The values of a row times `factor`, multiplied as f64.
    #[inline]
    pub fn multiply(self, row: &[f32], factor: f64, out: &mut [f32]) {
        in_set!(self, multiply(row, factor, out));
    }

    /// The gradients of a norm's elementwise weight and bias: for each row of `values` and `delta`
    /// adds `delta * normalised` to `weight` and `delta` to `bias`.
    ///
    /// `normalised` is the row minus its mean, if `centred`, divided by the root of its mean square
    /// plus `epsilon`.
    #[inline]
    pub fn add_norm_terms(
        self,
        values: &[f32],
        delta: &[f32],
        epsilon: f32,
        centred: bool,
        weight: &mut [f32],
        bias: &mut [f32],
    ) {
        debug_assert_eq!(values.len(), delta.len());
        debug_assert_eq!(weight.len(), bias.len());
        in_set!(self, add_norm_terms(values, delta, epsilon, centred, weight, bias));
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
    /// rows, as many as `slots` has: the tile need not leave the registers.
    ///
    /// The two slots of row `r` of the tile begin at `r` times the stride that stands beside
    /// `slots`. If there is a `sum`, the tile is added to it too, row `r` likewise.
    #[inline]
    pub fn outer_scatter(
        self,
        left: &[f32],
        right: &[f32],
        slots: (&[Slot], usize),
        block: &mut [f32],
        sum: Option<(&mut [f32], usize)>,
    ) {
        debug_assert_eq!(left.len() / TILE_ROWS, right.len() / TILE_COLUMNS);
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

    /// `out[q * rows + r]`: the product of every row of 4-bit numbers with every query. A row is
    /// `width` bytes, a multiple of 32; a query first has the factors of their lower halves, then
    /// those of their upper halves, none of them -128.
    #[inline]
    pub fn nibble_dots(self, rows: &[u8], width: usize, queries: &[&[i8]], out: &mut [i32]) {
        debug_assert!(width > 0 && width.is_multiple_of(32) && rows.len().is_multiple_of(width));
        debug_assert!(queries.iter().all(|query| query.len() == 2 * width));
        debug_assert_eq!(out.len() * width, rows.len() * queries.len());
        if rows.is_empty() {
            return;
        }
        in_code_set!(self, nibble_dots(rows, width, queries, out));
    }

    /// [`InstructionSet::nibble_dots`] of some rows with one query: `out[i]` is that of row `picks[i]`.
    #[inline]
    pub fn picked_nibble_dots(
        self,
        rows: &[u8],
        width: usize,
        picks: &[u32],
        query: &[i8],
        out: &mut [i32],
    ) {
        debug_assert!(width > 0 && width.is_multiple_of(32) && query.len() == 2 * width);
        debug_assert_eq!(picks.len(), out.len());
        in_code_set!(self, picked_nibble_dots(rows, width, picks, query, out));
    }

    /// As [`InstructionSet::nibble_dots`], of 8-bit numbers whose upper and lower four bits are in
    /// two planes.
    #[inline]
    pub fn code_dots(
        self,
        upper: &[u8],
        lower: &[u8],
        width: usize,
        queries: &[&[i8]],
        out: &mut [i32],
    ) {
        debug_assert!(width > 0 && width.is_multiple_of(32) && upper.len().is_multiple_of(width));
        debug_assert!(queries.iter().all(|query| query.len() == 2 * width));
        debug_assert_eq!(upper.len(), lower.len());
        debug_assert_eq!(out.len() * width, upper.len() * queries.len());
        if upper.is_empty() {
            return;
        }
        in_code_set!(self, code_dots(upper, lower, width, queries, out));
    }

    /// Adds `scale * factor * (2 product - offset)`, row by row.
    #[inline]
    pub fn add_estimates(
        self,
        products: &[i32],
        offset: i32,
        scales: &[f32],
        factor: f32,
        out: &mut [f32],
    ) {
        debug_assert!(products.len() == out.len() && scales.len() == out.len());
        in_set!(self, add_estimates(products, offset, scales, factor, out));
    }

    /// Adds `value * factor`, row by row.
    #[inline]
    pub fn add_multiple(self, values: &[f32], factor: f32, out: &mut [f32]) {
        debug_assert_eq!(values.len(), out.len());
        in_set!(self, add_multiple(values, factor, out));
    }

    /// Appends the places at which `estimate + bound` may reach `above`, or `estimate - bound`
    /// fall to `below`; in rising order.
    #[inline]
    pub fn sift(
        self,
        estimates: &[f32],
        bounds: &[f32],
        above: f32,
        below: f32,
        survivors: &mut Vec<u32>,
    ) {
        debug_assert_eq!(estimates.len(), bounds.len());
        in_set!(self, sift(estimates, bounds, above, below, survivors));
    }

    /// Appends the places at which the score reaches `above`, or falls to `below`, or is no number;
    /// in rising order.
    #[inline]
    pub fn sift_each(self, scores: &[f32], above: &[f32], below: &[f32], survivors: &mut Vec<u32>) {
        debug_assert!(above.len() == scores.len() && below.len() == scores.len());
        in_set!(self, sift_each(scores, above, below, survivors));
    }

    /// Takes `factor` times the product with `direction`, along it, off `values`.
    #[inline]
    pub fn reflect(self, direction: &[f64], factor: f64, values: &mut [f64]) {
        debug_assert_eq!(direction.len(), values.len());
        in_set!(self, reflect(direction, factor, values));
    }

    /// The Walsh-Hadamard transform of a power of two of values, not scaled.
    #[inline]
    pub fn butterflies(self, values: &mut [f64]) {
        debug_assert!(values.len().is_power_of_two());
        in_set!(self, butterflies(values));
    }
}

/// A complex number of length 1, its square and its cube: the real and imaginary part of each.
pub type Turn = [f32; 6];
/// The turns of the last two passes of a Fourier transform over 16 blocks of 16 values.
pub type LeafTurns = [[f32; LANES]; 30];

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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn slot(bits: u64, dim: usize) -> Slot {
        Slot::of(bits, dim, Slot::ring(dim))
    }

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

    #[test]
    fn every_code_is_unpacked_to_its_level_in_every_set() {
        fn check<const B: usize>(set: InstructionSet, bytes: &[u8], count: usize) {
            let mut out = vec![9.0; count];
            set.unpack::<B>(&bytes[..(count * B).div_ceil(8)], &mut out);
            for (index, found) in out.iter().enumerate() {
                let (at, top) = (index * B, (1i16 << B) - 1);
                let code = i16::from(bytes[at / 8] >> (at % 8)) & top;
                assert_eq!(*found, f32::from(2 * code - top));
            }
        }
        let bytes: Vec<u8> = (0..=u8::MAX).chain(0..9).rev().collect();
        for set in InstructionSet::available() {
            for count in (0..70).chain([8 * 256]) {
                check::<1>(set, &bytes, count);
                check::<2>(set, &bytes, count.min(4 * 256));
                check::<4>(set, &bytes, count.min(2 * 256));
            }
        }
    }

    proptest! {
        #[test]
        fn levels_are_the_nearest_in_every_set(
            row in prop::collection::vec(-1f32..1.0, 1..700), scale in 0.004f64..0.9,
        ) {
            fn check<const B: usize>(row: &[f32], scale: f64) -> Result<(), TestCaseError> {
                let all: Vec<f64> = if B == 8 {
                    (-127..128).map(f64::from).collect()
                } else {
                    (0..1 << B).map(|code| f64::from(2 * code + 1 - (1 << B))).collect()
                };
                let sizes: Vec<f32> = row.iter().map(|value| value.abs()).collect();
                let (mut codes, mut first) = (vec![9; row.len()], vec![9; row.len()]);
                let scalar = InstructionSet::SCALAR;
                let lost = scalar.level_codes::<B>(row, scale, &mut first);
                let fit = scalar.fit_levels::<B>(&sizes, scale as f32);
                let mut square = 0.0;
                for (&value, &code) in row.iter().zip(&first) {
                    let level = if B == 8 { f64::from(code.cast_signed()) } else { all[code as usize] };
                    let off = |level: f64| (f64::from(value) - level * scale).abs();
                    prop_assert!(all.iter().all(|&other| off(level) <= off(other) + 1e-12));
                    square += off(level).powi(2);
                }
                prop_assert!((lost - square).abs() <= 1e-12 * square);
                prop_assert!((fit[0] - lost).abs() <= 1e-4 * lost + 1e-9);
                for set in InstructionSet::available() {
                    prop_assert_eq!(set.level_codes::<B>(row, scale, &mut codes), lost);
                    prop_assert_eq!(&codes, &first);
                    prop_assert_eq!(set.fit_levels::<B>(&sizes, scale as f32), fit);
                    prop_assert_eq!(set.largest(row), sizes.iter().fold(0f32, |a, &b| a.max(b)));
                }
                Ok(())
            }
            check::<1>(&row, scale)?;
            check::<2>(&row, scale)?;
            check::<4>(&row, scale)?;
            check::<8>(&row, scale)?;
        }

        #[test]
        fn scatter_is_the_same_in_every_set(
            chunks in prop::collection::vec((any::<u64>(), prop::array::uniform16(-1e3f32..1e3)), 0..40),
            dim in 17usize..51,
        ) {
            let slots: Vec<Slot> = chunks.iter().map(|chunk| slot(chunk.0, dim)).collect();
            let values: Vec<f32> = chunks.iter().flat_map(|chunk| chunk.1).collect();
            let halves: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
            let brains: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
            let scattered = |set: InstructionSet| {
                let mut blocks = [vec![0.5; 66], vec![0.5; 66], vec![0.5; 66]];
                let mut others = vec![vec![0.5; 66]; 3];
                let [first, second, third] = &mut blocks;
                set.scatter([&slots], [&values], [first]);
                set.scatter_f16([&slots], [&halves], [second]);
                set.scatter_bf16([&slots], [&brains], [third]);
                // Two rows at a time, in either order, are two rows one by one.
                let [one, two, three] = &mut others[..] else { unreachable!() };
                let turned: Vec<Slot> = chunks.iter().map(|chunk| slot(!chunk.0, dim)).collect();
                let negative: Vec<f32> = values.iter().map(|value| -value).collect();
                set.scatter([&turned, &slots], [&negative, &values], [one, two]);
                set.scatter([&turned], [&negative], [three]);
                assert!(others[0] == others[2] && others[1] == blocks[0]);
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
                InstructionSet::SCALAR.scatter([&slots], [&values], [&mut found]);
                prop_assert_eq!(&found, expected);
            }
        }

        #[test]
        fn a_chunk_goes_to_buckets_of_its_own_each_as_often_as_any_other(dim in 1usize..100) {
            // For every lane, each of `dim` offsets leads to another bucket.
            for lane in 0..LANES {
                let mut met = vec![false; dim];
                for offset in 0..dim as u64 {
                    let bits = (offset << 32).div_ceil(dim as u64) << 32;
                    let slot = slot(bits, dim);
                    prop_assert_eq!(u64::from(slot.offset()), offset);
                    met[slot.bucket(lane, dim)] = true;
                    let others = (0..lane).map(|other| slot.bucket(other, dim));
                    prop_assert!(dim < LANES || !others.into_iter().any(|b| b == slot.bucket(lane, dim)));
                }
                prop_assert!(met.into_iter().all(|met| met));
            }
        }

        #[test]
        fn flush_is_the_same_in_every_set(
            sums in prop::collection::vec(-1e3f32..1e3, 0..70), broken in any::<bool>(),
        ) {
            let mut sums = sums;
            if broken && !sums.is_empty() {
                let middle = sums.len() / 2;
                sums[middle] = f32::NAN;
            }
            let expected: Vec<u64> =
                sums.iter().map(|&sum| (0.1 + f64::from(sum)).to_bits()).collect();
            for set in InstructionSet::available() {
                let (mut cleared, mut totals) = (sums.clone(), vec![0.1; sums.len()]);
                let finite = set.flush(&mut cleared, &mut totals);
                prop_assert_eq!(finite, sums.iter().all(|sum| sum.is_finite()));
                prop_assert!(cleared.iter().all(|sum| *sum == 0.0));
                for ((found, expected), sum) in totals.iter().zip(&expected).zip(&sums) {
                    prop_assert!(sum.is_nan() || found.to_bits() == *expected);
                }
            }
        }

        #[test]
        fn squares_and_multiples_are_the_same_in_every_set(
            row in prop::collection::vec(-1e3f32..1e3, 0..70), factor in -2f64..2.0,
        ) {
            let expected = InstructionSet::SCALAR.squares(&row);
            let exact: f64 = row.iter().map(|&value| f64::from(value).powi(2)).sum();
            prop_assert!((expected - exact).abs() <= 1e-14 * exact);
            for set in InstructionSet::available() {
                prop_assert_eq!(set.squares(&row), expected);
                let mut out = vec![9.0; row.len()];
                set.multiply(&row, factor, &mut out);
                for (found, value) in out.iter().zip(&row) {
                    prop_assert_eq!(*found, (f64::from(*value) * factor) as f32);
                }
            }
        }

        #[test]
        fn spread_puts_panels_apart_in_every_set(
            values in prop::collection::vec(-1f32..1.0, 0..200), gap in 0usize..40,
        ) {
            for set in InstructionSet::available() {
                let mut out = vec![9.0; 8 * (8 + gap) * 25];
                set.spread::<8>(&values, 8 + gap, &mut out);
                for (index, panel) in values.as_chunks::<8>().0.iter().enumerate() {
                    prop_assert_eq!(&out[index * (8 + gap)..][..8], panel);
                }
                let written = values.len() / 8 * 8;
                prop_assert_eq!(out.iter().filter(|value| **value != 9.0).count(), written);
            }
        }

        #[test]
        fn norm_terms_are_the_same_in_every_set_and_those_of_the_formula(
            width in 1usize..70, rows in 0usize..6, centred in any::<bool>(), seed in any::<u64>(),
        ) {
            let random = |stream: u64| -> Vec<f32> {
                (0..rows * width)
                    .map(|i| (random::value(seed ^ stream, i as u64) >> 40) as f32 / 8_388_608.0 - 1.0)
                    .collect()
            };
            let (values, delta) = (random(1), random(2));
            let sums = |set: InstructionSet| {
                let (mut weight, mut bias) = (vec![0.5; width], vec![0.25; width]);
                set.add_norm_terms(&values, &delta, 1e-3, centred, &mut weight, &mut bias);
                (weight, bias)
            };
            let (weight, bias) = sums(InstructionSet::SCALAR);
            for set in wide() {
                prop_assert_eq!(sums(set), (weight.clone(), bias.clone()));
            }
            let (mut exact, mut exact_bias) = (vec![0.5; width], vec![0.25; width]);
            for (values, delta) in values.chunks(width).zip(delta.chunks(width)) {
                let values: Vec<f64> = values.iter().map(|&value| f64::from(value)).collect();
                let mean = if centred { values.iter().sum::<f64>() / width as f64 } else { 0.0 };
                let square: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
                let root = (square / width as f64 + 1e-3).sqrt();
                for (i, &delta) in delta.iter().enumerate() {
                    exact[i] += f64::from(delta) * (values[i] - mean) / root;
                    exact_bias[i] += f64::from(delta);
                }
            }
            for (found, exact) in weight.iter().zip(exact).chain(bias.iter().zip(exact_bias)) {
                prop_assert!((f64::from(*found) - exact).abs() < 1e-4);
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
                    // By exclusive or, but in the last buckets of a width that is no multiple.
                    let end = if dim % 16 == 0 { dim } else { (dim / 16).saturating_sub(1) * 16 };
                    for lane in 0..16 {
                        let offset = offset as usize;
                        let ring = || end + (offset - end + lane) % (dim - end);
                        let expected = if offset < end { offset ^ lane } else { ring() };
                        prop_assert_eq!(slot.bucket(lane, dim), expected);
                    }
                }
            }
        }

        #[test]
        fn draws_and_sign_bits_are_those_of_the_stream_in_every_set(
            key in any::<u64>(), first in 0u64..1 << 60, things in 1usize..=1 << 20, count in 0usize..200,
        ) {
            let count = count.min(things);
            for set in InstructionSet::available() {
                let mut draws = vec![Column::default(); count];
                set.draws(key, things, first, &mut draws);
                for (step, draw) in draws.into_iter().enumerate() {
                    let bits = random::value(key, first + step as u64);
                    let left = u128::from(bits >> 32) * (things - step) as u128;
                    prop_assert_eq!(draw.bucket(), step + (left >> 32) as usize);
                    prop_assert_eq!(draw.signed(1.0) < 0.0, bits & 1 == 1);
                    prop_assert_eq!(draw.moved(7, false).signed(1.0), draw.signed(1.0));
                    prop_assert_eq!(draw.moved(7, true).signed(1.0), draw.signed(-1.0));
                    prop_assert_eq!(draw.moved(7, true).bucket(), 7);
                }
                let mut flips = vec![1; count];
                set.flips(key, first, &mut flips);
                for (at, flip) in (first..).zip(flips) {
                    let bit = random::value(key, at / 64) >> (at % 64) & 1;
                    prop_assert_eq!(flip, (bit as u32) << 31);
                }
            }
        }

        #[test]
        fn entries_are_those_of_the_stream_in_every_set(
            key in any::<u64>(), dim in 1usize..=1 << 20, first in 0u64..1 << 40, count in 0usize..80,
            panel in any::<prop::sample::Index>(),
        ) {
            let bucket = panel.index(dim.div_ceil(TILE_COLUMNS)) * TILE_COLUMNS;
            for set in InstructionSet::available() {
                let (mut signs, mut normals) = (vec![[0.0; TILE_COLUMNS]; count], vec![[0.0; TILE_COLUMNS]; count]);
                set.sign_rows(key, dim, first, bucket, &mut signs);
                set.normal_rows(key, dim, first, bucket, &mut normals);
                for (c, (signs, normals)) in (first..).zip(signs.into_iter().zip(normals)) {
                    for (b, (sign, normal)) in (bucket as u64..).zip(signs.into_iter().zip(normals)) {
                        let word = random::value(key, c * dim.div_ceil(64) as u64 + b / 64);
                        prop_assert_eq!(sign, if word >> (b % 64) & 1 == 1 { -1.0 } else { 1.0 });
                        let word = random::value(key, c * dim.div_ceil(2) as u64 + b / 2);
                        let half = if b % 2 == 0 { word as u32 } else { (word >> 32) as u32 };
                        prop_assert_eq!(normal, crate::normal::quantile(half) as f32);
                    }
                }
            }
        }

        #[test]
        fn the_hadamard_transform_is_that_of_the_matrix(
            log in 0u32..9, values in prop::collection::vec(prop::array::uniform4(-1000i16..1000), 256),
        ) {
            let values: Vec<[f32; 4]> = values[..1 << log].iter().map(|lanes| lanes.map(f32::from)).collect();
            for set in InstructionSet::available() {
                let mut found = values.clone();
                set.hadamard(&mut found);
                for (i, found) in found.into_iter().enumerate() {
                    let mut expected = [0.0; 4];
                    for (j, values) in values.iter().enumerate() {
                        let sign = if (i & j).count_ones() % 2 == 1 { -1.0 } else { 1.0 };
                        for (sum, value) in expected.iter_mut().zip(values) {
                            *sum += sign * value;
                        }
                    }
                    prop_assert_eq!(found, expected); // whole numbers: exact
                }
            }
        }

        #[test]
        fn samples_side_by_side_are_transformed_the_same_in_every_set(
            log in 0u32..11, lead in 0usize..9, rows in 0usize..=LANES, seed in any::<u64>(),
            places in prop::collection::vec((any::<u32>(), any::<bool>()), 0..40),
        ) {
            let len = 1 << log;
            let random = |stream: u64| (random::value(seed, stream) >> 40) as f32 / 8_388_608.0 - 1.0;
            let values: Vec<Vec<f32>> = (0..rows as u64)
                .map(|row| (0..(lead + len) as u64).map(|at| random(row << 32 | at)).collect())
                .collect();
            let views: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
            let mut flips = vec![0; len];
            InstructionSet::SCALAR.flips(seed, 3, &mut flips);
            let picks: Vec<Column> = places
                .iter()
                .map(|&(place, flip)| Column::default().moved(place % len as u32, flip))
                .collect();
            let mut first = None;
            for set in InstructionSet::available() {
                let mut wide = vec![[0.5; LANES]; len];
                set.side_by_side(&views, lead, &flips, &mut wide);
                for (at, lanes) in wide.iter().enumerate() {
                    for (lane, value) in lanes.iter().enumerate() {
                        let signed = |row: &[f32]| if flips[at] > 0 { -row[lead + at] } else { row[lead + at] };
                        prop_assert_eq!(*value, views.get(lane).map_or(0.5, |row| signed(row)));
                    }
                }
                let mut narrow: Vec<Vec<[f32; 1]>> =
                    (0..rows).map(|lane| wide.iter().map(|lanes| [lanes[lane]]).collect()).collect();
                let mut sums = vec![[0.25; LANES]; picks.len()];
                set.hadamard(&mut wide);
                set.add_picked(&picks, &wide, &mut sums);
                for (lane, values) in narrow.iter_mut().enumerate() {
                    let mut single = vec![[0.25; 1]; picks.len()];
                    set.hadamard(values);
                    set.add_picked(&picks, values, &mut single);
                    for (sums, single) in sums.iter().zip(single) {
                        prop_assert_eq!(sums[lane], single[0]);
                    }
                }
                for (sums, pick) in sums.iter().zip(&picks) {
                    for (sum, value) in sums.iter().zip(&wide[pick.bucket()]) {
                        prop_assert_eq!(*sum, 0.25 + pick.signed(*value));
                    }
                }
                prop_assert_eq!(first.get_or_insert_with(|| sums.clone()), &sums);
            }
        }

        #[test]
        fn outer_scatter_is_outer_tile_then_scatter_in_every_set(
            terms in prop::collection::vec(
                (prop::array::uniform8(-4f32..4.0), prop::array::uniform32(-4f32..4.0)), 0..20),
            places in prop::collection::vec(any::<u64>(), 0..=8), dim in 17usize..51, summed in any::<bool>(),
        ) {
            let left: Vec<f32> = terms.iter().flat_map(|term| term.0).collect();
            let right: Vec<f32> = terms.iter().flat_map(|term| term.1).collect();
            let slots: Vec<Slot> =
                places.iter().flat_map(|&bits| [slot(bits, dim), slot(!bits, dim)]).collect();
            let mut tile: Tile = [[0.0; TILE_COLUMNS]; TILE_ROWS];
            InstructionSet::SCALAR.outer_tile(&left, &right, &mut tile);
            let mut expected = vec![0.5; 66];
            let values = &tile.as_flattened()[..slots.len() * LANES];
            InstructionSet::SCALAR.scatter([&slots], [values], [&mut expected]);
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
                // Rows of slots three apart, as in a wider panel.
                let wide: Vec<Slot> =
                    slots.chunks(2).flat_map(|pair| [pair[0], pair[1], slot(9, dim)]).collect();
                let wide = &wide[..wide.len().saturating_sub(1)];
                set.outer_scatter(&left, &right, (wide, 3), &mut found, into);
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
        fn shifted_columns_are_sums_of_buckets_and_products_of_signs_in_every_set(
            key in any::<u64>(), dim in 1usize..=1 << 20, count in 0usize..40,
        ) {
            let mut columns = vec![Column::default(); count + 1];
            InstructionSet::SCALAR.columns(key, dim, 1, 7, &mut columns);
            let by = columns[count];
            for set in InstructionSet::available() {
                let mut found = vec![Column::default(); count];
                set.shift_columns(by, dim, &columns[..count], &mut found);
                for (column, found) in columns.iter().zip(found) {
                    prop_assert_eq!(found.bucket(), (column.bucket() + by.bucket()) % dim);
                    prop_assert_eq!(found.signed(1.0), column.signed(1.0) * by.signed(1.0));
                }
            }
        }

        #[test]
        fn dots_of_pairs_are_some_of_the_dots_in_every_set(
            dim in 1usize..70, pairs in prop::collection::vec((0u32..6, 0u32..5), 0..20), seed in any::<u64>(),
        ) {
            let random = |stream: u64, n: usize| -> Vec<f32> {
                (0..n)
                    .map(|i| (crate::random::value(seed ^ stream, i as u64) >> 40) as f32 / 8_388_608.0 - 1.0)
                    .collect()
            };
            let (left, right) = (random(1, 6 * dim), random(2, 5 * dim));
            let mut all = vec![0.0; 30];
            InstructionSet::SCALAR.dots(&left, &right, dim, &mut all);
            for set in InstructionSet::available() {
                let mut found = vec![0.0; pairs.len()];
                set.dots_of_pairs(&left, &right, dim, &pairs, &mut found);
                for (&(row, query), found) in pairs.iter().zip(found) {
                    prop_assert_eq!(found, all[row as usize * 5 + query as usize]);
                }
            }
        }

        #[test]
        fn transforms_there_and_back_are_the_same_in_every_set(
            exponent in 8u32..12, turns in prop::array::uniform6(-1f32..1.0), seed in any::<u64>(),
        ) {
            // Whatever the turns are: those of a transform have a test of their own.
            let length = 1usize << exponent;
            let random = |stream: u64| -> Vec<f32> {
                (0..length)
                    .map(|i| (crate::random::value(seed ^ stream, i as u64) >> 40) as f32 / 8_388_608.0 - 1.0)
                    .collect()
            };
            let leaf: LeafTurns = std::array::from_fn(|row| [turns[row % 6]; LANES]);
            let (turns, leaves) = (vec![turns; length / 64], vec![leaf; length / 256]);
            let transformed = |set: InstructionSet| {
                let mut values = [random(1), random(2)];
                let mut sums = [vec![0.0; length], vec![0.0; length]];
                for _ in 0..2 {
                    let [real, imaginary] = &mut values;
                    let [sum_real, sum_imaginary] = &mut sums;
                    let sums: [&mut [f32]; 2] = [sum_real, sum_imaginary];
                    set.add_squared_transform(&turns, &leaves, [real, imaginary], sums);
                }
                let [real, imaginary] = &mut sums;
                set.transform_back(&turns, &leaves, [real, imaginary]);
                sums
            };
            let expected = transformed(InstructionSet::SCALAR);
            for set in wide() {
                prop_assert_eq!(&transformed(set), &expected);
            }
        }

        #[test]
        fn products_of_codes_are_those_of_their_halves_in_every_set(
            halves in 1usize..10, rows in 0usize..39, queries in 0usize..9, seed in any::<u64>(),
            extreme in any::<bool>(),
        ) {
            let width = 32 * halves;
            let random = |stream: u64, i: usize| crate::random::value(seed ^ stream, i as u64) >> 40;
            // The largest sums there are, or any.
            let codes: Vec<u8> =
                (0..rows * width).map(|i| if extreme { 255 } else { random(1, i) as u8 }).collect();
            let factors: Vec<i8> = (0..queries * 2 * width)
                .map(|i| if extreme { 127 } else { (random(2, i) as u8).cast_signed().max(-127) })
                .collect();
            let views: Vec<&[i8]> = factors.chunks(2 * width).collect();
            for set in InstructionSet::available() {
                let mut found = vec![0; rows * queries];
                set.nibble_dots(&codes, width, &views, &mut found);
                let picks: Vec<u32> = (0..rows).map(|i| random(3, i) as u32 % rows as u32).collect();
                for (q, query) in views.iter().enumerate() {
                    let mut picked = vec![0; rows];
                    set.picked_nibble_dots(&codes, width, &picks, query, &mut picked);
                    for (&pick, picked) in picks.iter().zip(picked) {
                        prop_assert_eq!(picked, found[q * rows + pick as usize]);
                    }
                }
                for (q, query) in views.iter().enumerate() {
                    for (r, row) in codes.chunks(width).enumerate() {
                        let numbers = row.iter().map(|byte| byte % 16).chain(row.iter().map(|byte| byte / 16));
                        let product: i32 =
                            numbers.zip(*query).map(|(x, y)| i32::from(x) * i32::from(*y)).sum();
                        prop_assert_eq!(found[q * rows + r], product);
                    }
                }
                // The same numbers as the upper four bits, and others as the lower.
                let lower: Vec<u8> = codes.iter().map(|code| code.wrapping_mul(37) | 1).collect();
                let (mut both, mut low) = (vec![0; rows * queries], vec![0; rows * queries]);
                set.code_dots(&codes, &lower, width, &views, &mut both);
                set.nibble_dots(&lower, width, &views, &mut low);
                for ((both, high), low) in both.iter().zip(&found).zip(low) {
                    prop_assert_eq!(*both, 16 * high + low);
                }
            }
        }

        #[test]
        fn estimates_and_what_passes_are_the_same_in_every_set(
            values in prop::collection::vec((-1000i32..1000, 0f32..2.0, prop::num::f32::ANY, 0f32..1.0), 0..50),
            above in -2f32..2.0, below in -2f32..2.0,
        ) {
            let products: Vec<i32> = values.iter().map(|value| value.0).collect();
            let scales: Vec<f32> = values.iter().map(|value| value.1).collect();
            let estimates: Vec<f32> = values.iter().map(|value| value.2).collect();
            let bounds: Vec<f32> = values.iter().map(|value| value.3).collect();
            for set in InstructionSet::available() {
                let (mut found, mut sums) = (vec![0.25; values.len()], bounds.clone());
                set.add_estimates(&products, 7, &scales, 0.375, &mut found);
                set.add_multiple(&scales, 3.0, &mut sums);
                let mut survivors = vec![99];
                set.sift(&estimates, &bounds, above, below, &mut survivors);
                let mut expected = vec![99];
                for (at, &(product, scale, estimate, bound)) in values.iter().enumerate() {
                    prop_assert_eq!(found[at], 0.25 + scale * 0.375 * (2 * product - 7) as f32);
                    prop_assert_eq!(sums[at], bound + scale * 3.0);
                    if estimate.is_nan() || estimate + bound >= above || estimate - bound <= below {
                        expected.push(at as u32);
                    }
                }
                prop_assert_eq!(survivors, expected);
                let (mut survivors, mut expected) = (vec![], vec![]);
                set.sift_each(&estimates, &scales, &bounds, &mut survivors);
                for (at, &(_, above, score, below)) in values.iter().enumerate() {
                    if score.is_nan() || score >= above || score <= below {
                        expected.push(at as u32);
                    }
                }
                prop_assert_eq!(survivors, expected);
            }
        }

        #[test]
        fn reflections_and_butterflies_are_the_same_in_every_set(
            values in prop::collection::vec((-1f64..1.0, -1f64..1.0), 1..70), log in 0u32..6,
        ) {
            let (values, direction): (Vec<f64>, Vec<f64>) = values.into_iter().unzip();
            let size = 1 << log;
            let wide: Vec<f64> = values.iter().copied().cycle().take(size).collect();
            let mut first = None;
            for set in InstructionSet::available() {
                let (mut reflected, mut transformed) = (values.clone(), wide.clone());
                let square: f64 = direction.iter().map(|x| x * x).sum();
                set.reflect(&direction, 2.0 / square, &mut reflected);
                set.butterflies(&mut transformed);
                let along: f64 = values.iter().zip(&direction).map(|(x, y)| x * y).sum();
                for ((found, value), direction) in reflected.iter().zip(&values).zip(&direction) {
                    prop_assert!((found - (value - 2.0 * along / square * direction)).abs() < 1e-9);
                }
                for (i, found) in transformed.iter().enumerate() {
                    let sign = |j: usize| if (i & j).count_ones() % 2 == 1 { -1.0 } else { 1.0 };
                    let expected: f64 = wide.iter().enumerate().map(|(j, x)| sign(j) * x).sum();
                    prop_assert!((found - expected).abs() < 1e-9);
                }
                let both = (reflected, transformed);
                prop_assert_eq!(first.get_or_insert_with(|| both.clone()), &both);
            }
        }

        #[test]
        fn dots_are_the_same_in_every_set(
            dim in prop_oneof![1usize..70, Just(16), Just(48)], rows in 0usize..11, queries in 0usize..10,
            seed in any::<u64>(),
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
