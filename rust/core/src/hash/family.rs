//! Families of hash functions.
//!
//! `Sign`: bit `[a.x >= 0]`. Two rows at the angle `t` agree on a bit with probability `1 - t / pi`
//! (Charikar, "Similarity estimation techniques from rounding algorithms", STOC 2002). Only the
//! direction of `a` counts, so the `a` are rows of random rotations, which estimate angles better
//! than independent ones: three rounds of random signs and a Walsh-Hadamard transform (Andoni et
//! al., "Practical and optimal LSH for angular distance", NIPS 2015), of at least 256 values
//! because shorter ones miss the law for rows with few nonzeros. More bits than values take further
//! rotations.
//!
//! `PStable`: `floor((a.x + b) / w)`, `a` normal, `b` uniform in `[0, w 2^(L-1))` (Datar, Immorlica,
//! Indyk and Mirrokni, "Locality-sensitive hashing scheme based on p-stable distributions", SCG
//! 2004). Level `l` of the code is `code >> l`, with the sign: the code of width `w 2^l`, because
//! `b` spans the widest.
//!
//! Random numbers, from the stream of the seed, the family's name and `[dim, view]`. `hash.sign`: bit
//! `i mod 64` of value `((3 m + r) n + i) / 64` turns the sign of value `i` of `n` before transform
//! `r` of rotation `m`. `hash.p_stable`: coordinate `c` of hash `h` is the normal quantile of the
//! upper half of value `h dim + c`; `b` is that fraction of its range that the upper 53 bits of
//! value `2^63 + h` are of `2^53`.

use std::sync::Mutex;

use super::{count_rows, in_range};
use crate::error::Error;
use crate::kernels::{InstructionSet, LANES};
use crate::normal::quantile;
use crate::parallel::share;
use crate::random::{parameter_key, value};
use crate::sketch::MAX_DIM;
use crate::stop::{Asker, Watch};

/// The most hashes of a code.
pub const MAX_HASHES: usize = 4096;
/// The most levels of a p-stable code.
pub const MAX_LEVELS: usize = 16;
/// The most normals that are kept: 256 MiB.
const MAX_NORMALS: usize = 1 << 26;
/// The least length of a rotation, see above.
const LEAST_ROTATION: usize = 256;
/// Rounds of a rotation.
const ROUNDS: usize = 3;
/// The first value of the p-stable stream that is not of the normals.
const OFFSETS: u64 = 1 << 63;

/// What a hash function is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Family {
    /// The side of a hyperplane: near by angle.
    Sign,
    /// The cell of a line: near by Euclidean distance.
    PStable {
        /// Width of a cell at level 0.
        width: f64,
        /// How many levels there are.
        levels: usize,
    },
}

/// The codes of rows.
#[derive(Clone, Debug, PartialEq)]
pub enum Codes {
    /// `[rows, ceil(hashes / 64)]`: bit `h mod 64` of word `h / 64` is hash `h`.
    Bits(Vec<u64>),
    /// `[rows, hashes]`: the cells at level 0.
    Cells(Vec<i32>),
}

/// Hash functions of one family for rows of one width.
#[derive(Clone, Debug)]
pub struct Hash {
    family: Family,
    dim: usize,
    hashes: usize,
    projection: Projection,
    set: InstructionSet,
}

#[derive(Clone, Debug)]
enum Projection {
    /// `[rotations, ROUNDS, len]` sign bits.
    Rotations { flips: Vec<u32>, len: usize },
    /// `[hashes, dim]` normals, and an offset for each hash.
    Normals { normals: Vec<f32>, offsets: Vec<f64> },
}

impl Hash {
    /// `hashes` functions of `family` for rows of width `dim`.
    ///
    /// A function does not depend on how many others there are; those of other views are
    /// independent.
    ///
    /// # Errors
    /// [`Error::Argument`] if a number is out of range; [`Error::Stopped`].
    pub fn new(
        family: Family,
        dim: usize,
        hashes: usize,
        seed: u64,
        view: u64,
        watch: &Watch<'_>,
    ) -> Result<Self, Error> {
        in_range("dim", dim, 1, MAX_DIM)?;
        in_range("hashes", hashes, 1, MAX_HASHES)?;
        let set = InstructionSet::best();
        let projection = match family {
            Family::Sign => {
                let len = dim.next_power_of_two().max(LEAST_ROTATION);
                let key = parameter_key(seed, "hash.sign", &[dim as u64, view]);
                let mut flips = vec![0; hashes.div_ceil(len) * ROUNDS * len];
                set.flips(key, 0, &mut flips);
                Projection::Rotations { flips, len }
            }
            Family::PStable { width, levels } => {
                in_range("levels", levels, 1, MAX_LEVELS)?;
                in_range("hashes", hashes, 1, MAX_NORMALS / dim)?;
                if !(width.is_finite() && width > 0.0) {
                    return Err(Error::argument("width", "a positive finite number", width));
                }
                let key = parameter_key(seed, "hash.p_stable", &[dim as u64, view]);
                let span = width * f64::from(1u32 << (levels - 1));
                let fraction = |bits: u64| (bits >> 11) as f64 / (1u64 << 53) as f64;
                let mut steps = watch.steps();
                let normal = |at: usize| {
                    steps.add(20)?;
                    Ok(quantile((value(key, at as u64) >> 32) as u32) as f32)
                };
                Projection::Normals {
                    normals: (0..hashes * dim).map(normal).collect::<Result<_, Error>>()?,
                    offsets: (0..hashes as u64)
                        .map(|hash| span * fraction(value(key, OFFSETS + hash)))
                        .collect(),
                }
            }
        };
        Ok(Self { family, dim, hashes, projection, set })
    }

    /// The family.
    #[must_use]
    pub fn family(&self) -> Family {
        self.family
    }

    /// Width of the rows.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// How many hashes a code has.
    #[must_use]
    pub fn hashes(&self) -> usize {
        self.hashes
    }

    /// Words or cells of the code of a row.
    #[must_use]
    pub fn code_len(&self) -> usize {
        match self.family {
            Family::Sign => self.hashes.div_ceil(64),
            Family::PStable { .. } => self.hashes,
        }
    }

    /// `[rows, hashes]`: for signs `a.x` with `|a|^2` equal to the rotation's length, for p-stable
    /// hashes `(a.x + b) / w`.
    ///
    /// O(rows · rotations · len · log len), or O(rows · hashes · dim).
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::NotFinite`] if a value or a projection is not;
    /// [`Error::Stopped`].
    pub fn project(
        &self,
        rows: &[f32],
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Vec<f32>, Error> {
        let count = count_rows("rows", rows, self.dim, &Watch::of(asker))?;
        let mut projections = vec![0.0; count * self.hashes];
        self.in_blocks(rows, threads, asker, &mut projections, self.hashes, |found, out| {
            out.copy_from_slice(found);
            Ok(())
        })?;
        Ok(projections)
    }

    /// The codes of rows; costs what [`Hash::project`] does.
    ///
    /// # Errors
    /// As [`Hash::project`]; [`Error::Argument`] if a cell does not fit 32 bits.
    pub fn codes(&self, rows: &[f32], threads: usize, asker: &Asker<'_>) -> Result<Codes, Error> {
        let size = count_rows("rows", rows, self.dim, &Watch::of(asker))? * self.code_len();
        match self.family {
            Family::Sign => {
                let mut bits = vec![0u64; size];
                self.in_blocks(rows, threads, asker, &mut bits, self.code_len(), |found, out| {
                    let words = out.chunks_exact_mut(self.code_len());
                    for (words, found) in words.zip(found.chunks_exact(self.hashes)) {
                        pack(found, words);
                    }
                    Ok(())
                })?;
                Ok(Codes::Bits(bits))
            }
            Family::PStable { .. } => {
                let mut cells = vec![0; size];
                self.in_blocks(rows, threads, asker, &mut cells, self.code_len(), |found, out| {
                    for (cell, &position) in out.iter_mut().zip(found) {
                        *cell = cell_of(position)?;
                    }
                    Ok(())
                })?;
                Ok(Codes::Cells(cells))
            }
        }
    }

    /// Projects rows block by block and hands each block's projections, and its place in `out`, of
    /// `width` a row, to `take`.
    fn in_blocks<T: Send>(
        &self,
        rows: &[f32],
        threads: usize,
        asker: &Asker<'_>,
        out: &mut [T],
        width: usize,
        take: impl Fn(&[f32], &mut [T]) -> Result<(), Error> + Sync,
    ) -> Result<(), Error> {
        let blocks = rows.chunks(LANES * self.dim).zip(out.chunks_mut(LANES * width));
        let blocks: Vec<_> = blocks.map(Mutex::new).collect();
        share(
            blocks.len(),
            threads,
            asker,
            Vec::new,
            |projections: &mut Vec<f32>, block, watch| {
                let mut place = blocks[block].lock().map_err(Error::panicked)?;
                let (rows, out) = &mut *place;
                projections.resize(rows.len() / self.dim * self.hashes, 0.0);
                if rows.len() == self.dim {
                    self.project_block::<1>(rows, projections, watch)?;
                } else {
                    self.project_block::<LANES>(rows, projections, watch)?;
                }
                if let Some(at) = projections.iter().position(|value| !value.is_finite()) {
                    let row = block * LANES + at / self.hashes;
                    return Err(Error::NotFinite {
                        argument: "projections of rows",
                        place: format!("row {row}, hash {}", at % self.hashes),
                        value: f64::from(projections[at]),
                    });
                }
                take(projections, out)
            },
        )?;
        Ok(())
    }

    /// The projections of at most `L` rows.
    fn project_block<const L: usize>(
        &self,
        rows: &[f32],
        out: &mut [f32],
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        match &self.projection {
            Projection::Normals { normals, offsets } => {
                self.set.dots(rows, normals, self.dim, out);
                let Family::PStable { width, .. } = self.family else { return Ok(()) };
                for row in out.chunks_exact_mut(self.hashes) {
                    for (position, offset) in row.iter_mut().zip(offsets) {
                        *position = ((f64::from(*position) + offset) / width) as f32;
                    }
                }
            }
            Projection::Rotations { flips, len } => {
                let views: Vec<&[f32]> = rows.chunks_exact(self.dim).collect();
                // Each transform makes rows sqrt(len) times longer.
                let scale = 1.0 / *len as f32;
                let mut values = vec![[0.0; L]; *len];
                for (rotation, flips) in flips.chunks_exact(ROUNDS * len).enumerate() {
                    values.fill([0.0; L]);
                    let (first, others) = flips.split_at(*len);
                    let inside = &mut values[..self.dim];
                    self.set.side_by_side(&views, 0, &first[..self.dim], inside);
                    self.set.hadamard(&mut values);
                    for flips in others.chunks_exact(*len) {
                        watch.check()?;
                        for (value, flip) in values
                            .as_flattened_mut()
                            .iter_mut()
                            .zip(flips.iter().flat_map(|flip| [flip; L]))
                        {
                            *value = f32::from_bits(value.to_bits() ^ flip);
                        }
                        self.set.hadamard(&mut values);
                    }
                    let hashes = rotation * len..self.hashes.min((rotation + 1) * len);
                    for (lane, out) in out.chunks_exact_mut(self.hashes).enumerate() {
                        for (out, value) in out[hashes.clone()].iter_mut().zip(&values) {
                            *out = value[lane] * scale;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// Puts the signs of projections into words.
fn pack(projections: &[f32], words: &mut [u64]) {
    for (word, projections) in words.iter_mut().zip(projections.chunks(64)) {
        *word = projections
            .iter()
            .enumerate()
            .fold(0, |word, (bit, &projection)| word | u64::from(projection >= 0.0) << bit);
    }
}

/// The cell of a position.
fn cell_of(position: f32) -> Result<i32, Error> {
    /// 2^31: what a cell is below, and its negative not below.
    const LIMIT: f32 = 2_147_483_648.0;
    let cell = position.floor();
    if (-LIMIT..LIMIT).contains(&cell) {
        return Ok(cell as i32);
    }
    Err(Error::argument("width", "so wide that codes fit 32 bits", format!("the code {cell}")))
}

/// The share of hashes on which each pair of rows agrees.
///
/// # Errors
/// [`Error::Argument`] if a pair names a row that is not there; [`Error::Shape`];
/// [`Error::Stopped`].
pub fn similarities(
    codes: &Codes,
    hashes: usize,
    level: usize,
    pairs: &[[u64; 2]],
    watch: &Watch<'_>,
) -> Result<Vec<f32>, Error> {
    in_range("hashes", hashes, 1, MAX_HASHES)?;
    in_range("level", level, 0, MAX_LEVELS - 1)?;
    let (len, width) = match codes {
        Codes::Bits(bits) => (bits.len(), hashes.div_ceil(64)),
        Codes::Cells(cells) => (cells.len(), hashes),
    };
    if !len.is_multiple_of(width) {
        return Err(Error::shape("codes", format!("rows of {width}"), len));
    }
    let rows = len / width;
    let mut steps = watch.steps();
    let similarity = |&[left, right]: &[u64; 2]| {
        steps.add(width)?;
        if left.max(right) >= rows as u64 {
            return Err(Error::argument("pairs", format!("below {rows}"), left.max(right)));
        }
        let (left, right) = (left as usize * width, right as usize * width);
        let matches = match codes {
            Codes::Bits(bits) => {
                let unlike: u32 = bits[left..][..width]
                    .iter()
                    .zip(&bits[right..][..width])
                    .map(|(left, right)| (left ^ right).count_ones())
                    .sum();
                hashes - (unlike as usize).min(hashes)
            }
            Codes::Cells(cells) => {
                matches(&cells[left..][..width], &cells[right..][..width], level)
            }
        };
        Ok((matches as f64 / hashes as f64) as f32)
    };
    pairs.iter().map(similarity).collect()
}

/// How many cells are the same at a level.
pub(super) fn matches(left: &[i32], right: &[i32], level: usize) -> usize {
    left.iter().zip(right).filter(|&(left, right)| left >> level == right >> level).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::stop::never;

    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        (0..count as u64).map(|at| quantile((value(seed, at) >> 32) as u32) as f32).collect()
    }

    /// The rotation by its definition: sums over all pairs, in f64.
    fn rotated(row: &[f32], seed: u64, rotation: u64, len: usize) -> Vec<f64> {
        let key = parameter_key(seed, "hash.sign", &[row.len() as u64, 2]);
        let mut values = vec![0.0; len];
        for (value, &x) in values.iter_mut().zip(row) {
            *value = f64::from(x);
        }
        for round in 0..3 {
            for (at, x) in values.iter_mut().enumerate() {
                let counter = (3 * rotation + round) * len as u64 + at as u64;
                if value(key, counter / 64) >> (counter % 64) & 1 == 1 {
                    *x = -*x;
                }
            }
            values = (0..len)
                .map(|i| {
                    (0..len)
                        .map(|j| if (i & j).count_ones() % 2 == 1 { -values[j] } else { values[j] })
                        .sum()
                })
                .collect();
        }
        values.iter().map(|value| value / len as f64).collect()
    }

    #[test]
    fn sign_projections_are_those_of_the_definition() {
        for (dim, hashes) in [(5, 7), (300, 20), (256, 300)] {
            let rows = numbers(3 * dim, 1);
            let hash = Hash::new(Family::Sign, dim, hashes, 9, 2, &Watch::none()).unwrap();
            let found = hash.project(&rows, 2, &Asker::new(&never)).unwrap();
            let len = dim.next_power_of_two().max(256);
            for (row, found) in rows.chunks(dim).zip(found.chunks(hashes)) {
                for (rotation, found) in found.chunks(len).enumerate() {
                    let expected = rotated(row, 9, rotation as u64, len);
                    for (found, expected) in found.iter().zip(expected) {
                        assert!((f64::from(*found) - expected).abs() < 1e-4 * len as f64);
                        assert!((f64::from(*found) - expected).abs() < 1e-3, "{found} {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn p_stable_projections_are_those_of_the_definition() {
        let (dim, hashes, width, levels) = (7, 5, 0.5, 3);
        let rows = numbers(4 * dim, 2);
        let hash = Hash::new(Family::PStable { width, levels }, dim, hashes, 3, 2, &Watch::none())
            .unwrap();
        let key = parameter_key(3, "hash.p_stable", &[dim as u64, 2]);
        let found = hash.project(&rows, 1, &Asker::new(&never)).unwrap();
        for (row, found) in rows.chunks(dim).zip(found.chunks(hashes)) {
            for (number, &found) in found.iter().enumerate() {
                let product: f64 = (0..dim)
                    .map(|c| {
                        let bits = value(key, (number * dim + c) as u64) >> 32;
                        quantile(bits as u32) * f64::from(row[c])
                    })
                    .sum();
                let bits = value(key, (1 << 63) + number as u64) >> 11;
                let offset = bits as f64 / 2f64.powi(53) * width * 4.0;
                assert!((f64::from(found) - (product + offset) / width).abs() < 1e-4);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn codes_are_the_same_for_any_split_threads_and_set(
            count in 1usize..40, dim in 1usize..70, hashes in 1usize..140, seed in any::<u64>(),
        ) {
            let rows = numbers(count * dim, seed);
            let asker = Asker::new(&never);
            for family in [Family::Sign, Family::PStable { width: 0.7, levels: 4 }] {
                let mut hash = Hash::new(family, dim, hashes, seed, 0, &Watch::none()).unwrap();
                let all = hash.project(&rows, 3, &asker).unwrap();
                let codes = hash.codes(&rows, 3, &asker).unwrap();
                for set in InstructionSet::available() {
                    hash.set = set;
                    prop_assert_eq!(&hash.project(&rows, 1, &asker).unwrap(), &all);
                    for (row, all) in rows.chunks(dim).zip(all.chunks(hashes)) {
                        prop_assert_eq!(&hash.project(row, 1, &asker).unwrap()[..], all);
                    }
                }
                for (at, &projection) in all.iter().enumerate() {
                    let (row, number) = (at / hashes, at % hashes);
                    match &codes {
                        Codes::Bits(bits) => {
                            let word = bits[row * hash.code_len() + number / 64];
                            prop_assert_eq!(word >> (number % 64) & 1 == 1, projection >= 0.0);
                        }
                        Codes::Cells(cells) => {
                            prop_assert_eq!(f64::from(cells[at]), f64::from(projection).floor());
                        }
                    }
                }
                let fewer = Hash::new(family, dim, hashes.div_ceil(2), seed, 0, &Watch::none()).unwrap();
                for (some, all) in
                    fewer.project(&rows, 1, &asker).unwrap().chunks(fewer.hashes).zip(all.chunks(hashes))
                {
                    prop_assert_eq!(some, &all[..fewer.hashes]);
                }
            }
        }
    }

    #[test]
    fn wrong_numbers_are_errors() {
        let p_stable = |width, levels| Family::PStable { width, levels };
        for (family, dim, hashes) in [
            (Family::Sign, 0, 1),
            (Family::Sign, usize::MAX, 1),
            (Family::Sign, 1, 0),
            (Family::Sign, 1, usize::MAX),
            (p_stable(0.0, 1), 1, 1),
            (p_stable(f64::NAN, 1), 1, 1),
            (p_stable(1.0, 0), 1, 1),
            (p_stable(1.0, 99), 1, 1),
            (p_stable(1.0, 1), MAX_DIM, MAX_HASHES),
        ] {
            assert!(matches!(
                Hash::new(family, dim, hashes, 0, 0, &Watch::none()),
                Err(Error::Argument { .. })
            ));
        }
        let asker = Asker::new(&never);
        let hash = Hash::new(p_stable(1e-30, 1), 2, 3, 0, 0, &Watch::none()).unwrap();
        assert!(matches!(hash.codes(&[1.0, 2.0], 1, &asker), Err(Error::Argument { .. })));
        assert!(matches!(hash.codes(&[1.0], 1, &asker), Err(Error::Shape { .. })));
        assert!(matches!(hash.codes(&[1.0, f32::NAN], 1, &asker), Err(Error::NotFinite { .. })));
        let hash = Hash::new(Family::Sign, 2, 3, 0, 0, &Watch::none()).unwrap();
        let huge = [f32::MAX; 2];
        assert!(matches!(hash.codes(&huge, 1, &asker), Err(Error::NotFinite { .. })));
        assert_eq!(hash.codes(&[], 1, &asker).unwrap(), Codes::Bits(vec![]));
    }
}
