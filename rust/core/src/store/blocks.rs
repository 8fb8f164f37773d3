//! The checksums of a file: one CRC-32 of each block of 65,536 bytes; the last may be shorter.
//!
//! So few bytes that a row can be checked without reading its whole file, so many that the
//! checksums are a 16,384th of it.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::file::{damaged, open, read_at};
use crate::error::Error;
use crate::parallel::share;
use crate::stop::{Asker, Watch};

/// Bytes of a block.
pub const BLOCK: usize = 1 << 16;

/// Blocks that are read at once, before they are checked.
const PIECE: usize = 4;

/// Pieces of a file from which on it is checked by several threads.
const ALONE: usize = 16;

/// The checksum of each block of `bytes`.
///
/// # Errors
/// [`Error::Stopped`].
pub fn checksums(bytes: &[u8], watch: &Watch<'_>) -> Result<Vec<u32>, Error> {
    let checksum = |block| watch.check().map(|()| crc32fast::hash(block));
    bytes.chunks(BLOCK).map(checksum).collect()
}

/// The numbers of the blocks of a file that do not have these checksums, in order.
///
/// Reads the file once, on up to `threads` threads, each with a buffer of the same size for any
/// file: one thread computes checksums at half the speed at which the system hands over what it
/// has cached.
///
/// # Errors
/// [`Error::Damaged`] if it is not a regular file of exactly `length` bytes, or the number of
/// checksums is not that of its blocks; [`Error::Io`]; as [`share`].
pub fn check_file(
    path: &Path,
    length: u64,
    checksums: &[u32],
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Vec<u64>, Error> {
    let (file, found) = open(path, false)?;
    if found != length {
        return Err(damaged(path, format!("it must have {length} bytes, got {found}")));
    }
    check_count(path, length, checksums)?;
    let pieces = checksums.len().div_ceil(PIECE);
    let size = (PIECE * BLOCK).min(usize::try_from(length).unwrap_or(usize::MAX));
    let found = share(
        pieces,
        if pieces < ALONE { 1 } else { threads },
        asker,
        || (vec![0; size], Vec::new()),
        |(bytes, bad), piece, watch| {
            let first = piece * PIECE;
            let at = first as u64 * BLOCK as u64;
            let bytes = &mut bytes[..(length - at).min(size as u64) as usize];
            read_at(&file, path, bytes, at, watch)?;
            let blocks = (first as u64..).zip(bytes.chunks(BLOCK)).zip(&checksums[first..]);
            bad.extend(
                blocks
                    .filter(|((_, block), must)| crc32fast::hash(block) != **must)
                    .map(|((n, _), _)| n),
            );
            Ok(())
        },
    )?;
    let mut bad: Vec<u64> = found.into_iter().flat_map(|(_, bad)| bad).collect();
    bad.sort_unstable();
    Ok(bad)
}

fn check_count(path: &Path, length: u64, checksums: &[u32]) -> Result<(), Error> {
    let blocks = length.div_ceil(BLOCK as u64);
    if blocks == checksums.len() as u64 {
        return Ok(());
    }
    let got = checksums.len();
    Err(damaged(path, format!("its {length} bytes must have {blocks} checksums, got {got}")))
}

/// The checksums of a file, and which of its blocks have been found to have them.
#[derive(Debug)]
pub(super) struct Checks {
    checksums: Vec<u32>,
    length: u64,
    /// One bit a block. What it says is about the file, not about memory of ours, so that no order
    /// between threads is asked for.
    verified: Vec<AtomicU64>,
}

impl Checks {
    /// The checksums of a file of `length` bytes.
    ///
    /// # Errors
    /// [`Error::Damaged`] if there is not one for each of its blocks.
    pub(super) fn new(path: &Path, length: u64, checksums: Vec<u32>) -> Result<Self, Error> {
        check_count(path, length, &checksums)?;
        let words = checksums.len().div_ceil(64);
        let verified = std::iter::repeat_with(AtomicU64::default).take(words).collect();
        Ok(Self { checksums, length, verified })
    }

    /// Bytes it takes in memory.
    pub(super) fn bytes(&self) -> usize {
        4 * self.checksums.len() + 8 * self.verified.len()
    }

    /// The bytes of a block.
    fn span(&self, block: usize) -> Range<u64> {
        let start = block as u64 * BLOCK as u64;
        start..self.length.min(start + BLOCK as u64)
    }

    fn is_verified(&self, block: usize) -> bool {
        let word = self.verified[block / 64].load(Ordering::Relaxed);
        word >> (block % 64) & 1 == 1
    }

    /// Nothing, if these bytes of a block have its checksum.
    fn verify(&self, path: &Path, block: usize, bytes: &[u8]) -> Result<(), Error> {
        let (must, got) = (self.checksums[block], crc32fast::hash(bytes));
        if must != got {
            let Range { start, end } = self.span(block);
            let what = format!(
                "block {block} (bytes {start} to {}): its checksum must be {must:#010x}, got \
                 {got:#010x}",
                end - 1
            );
            return Err(damaged(path, what));
        }
        self.verified[block / 64].fetch_or(1 << (block % 64), Ordering::Relaxed);
        Ok(())
    }

    /// Nothing, if each block that has some of these bytes has its checksum, by all bytes of the
    /// file. The range lies within them.
    ///
    /// # Errors
    /// [`Error::Damaged`] if one has another; [`Error::Stopped`].
    pub(super) fn verify_within(
        &self,
        path: &Path,
        range: Range<usize>,
        all: &[u8],
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
            if !self.is_verified(block) {
                watch.check()?;
                let Range { start, end } = self.span(block);
                self.verify(path, block, &all[start as usize..end as usize])?;
            }
        }
        Ok(())
    }

    /// Fills `out` from byte `at` of the file on, with bytes that have been checked: `read` is
    /// asked for all bytes of a block that has not been verified, and those are looked at, with
    /// `scratch` for a block of which `out` takes a part only.
    ///
    /// # Errors
    /// [`Error::Damaged`] if a block has another checksum; those of `read`.
    pub(super) fn read(
        &self,
        path: &Path,
        mut at: u64,
        mut out: &mut [u8],
        scratch: &mut Vec<u8>,
        read: impl Fn(&mut [u8], u64) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let end = at.checked_add(out.len() as u64).filter(|end| *end <= self.length);
        let end = end.ok_or_else(|| damaged(path, format!("it has {} bytes", self.length)))?;
        while !out.is_empty() {
            let block = (at / BLOCK as u64) as usize;
            let span = self.span(block);
            let follows = |last: usize| self.span(last).end < end;
            let mut last = block;
            let here;
            if self.is_verified(block) {
                while follows(last) && self.is_verified(last + 1) {
                    last += 1;
                }
                here = (self.span(last).end.min(end) - at) as usize;
                read(&mut out[..here], at)?;
            } else if span.start == at && span.end <= end {
                while follows(last) && self.span(last + 1).end <= end && last + 1 < block + PIECE {
                    last += 1;
                }
                here = (self.span(last).end - at) as usize;
                let bytes = &mut out[..here];
                read(bytes, at)?;
                for (block, bytes) in (block..).zip(bytes.chunks(BLOCK)) {
                    if !self.is_verified(block) {
                        self.verify(path, block, bytes)?;
                    }
                }
            } else {
                scratch.resize((span.end - span.start) as usize, 0);
                read(scratch, span.start)?;
                self.verify(path, block, scratch)?;
                here = (span.end.min(end) - at) as usize;
                out[..here].copy_from_slice(&scratch[(at - span.start) as usize..][..here]);
            }
            at += here as u64;
            out = &mut out[here..];
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::super::{Cursor, Kind, Shard};
    use super::*;
    use crate::stop::never;

    /// A file in the temporary folder that goes with its test.
    struct Written(PathBuf);

    impl Written {
        fn new(name: &str, bytes: &[u8]) -> Self {
            let name = format!("whence-blocks-{name}-{}", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::write(&path, bytes).unwrap();
            Self(path)
        }
    }

    impl Drop for Written {
        fn drop(&mut self) {
            std::fs::remove_file(&self.0).unwrap();
        }
    }

    fn sums(bytes: &[u8]) -> Vec<u32> {
        checksums(bytes, &Watch::none()).unwrap()
    }

    /// `length` bytes that repeat nowhere near a block's length.
    fn content(length: usize) -> Vec<u8> {
        (0..length as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
    }

    fn level(byte: u8) -> f32 {
        f32::from(byte.cast_signed())
    }

    /// A file of a head and rows, and what is done to it.
    fn files() -> impl Strategy<Value = (usize, usize, usize)> {
        (0usize..200, 1usize..90_000, 1usize..6 * BLOCK)
            .prop_map(|(offset, dim, size)| (offset, dim, (size / dim).max(1)))
    }

    proptest! {
        #[test]
        fn rows_that_are_checked_are_those_of_the_file_in_any_order_at_any_threads(
            (offset, dim, rows) in files(),
            reads in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 1..12),
            threads in 1usize..4,
            mapped: bool,
        ) {
            let bytes = content(offset + rows * dim);
            let file = Written::new("reads", &bytes);
            let shard = Shard::in_file(
                &file.0, offset as u64, rows as u64, dim, Kind::I8, Some(sums(&bytes)),
            ).unwrap();
            let shard = if mapped { shard.mapped().unwrap() } else { shard };
            let check = |cursor: &mut Cursor, first: usize, count: usize| {
                let mut out = vec![0.0; count * dim];
                shard.read(first as u64, &mut out, cursor, &Watch::none()).unwrap();
                let expected = &bytes[offset + first * dim..][..count * dim];
                assert!(out.iter().zip(expected).all(|(found, &byte)| *found == level(byte)));
            };
            std::thread::scope(|scope| {
                for thread in 0..threads {
                    let (reads, check) = (&reads, &check);
                    scope.spawn(move || {
                        let mut cursor = Cursor::default();
                        for (first, count) in reads.iter().cycle().skip(thread).take(reads.len()) {
                            let first = first.index(rows);
                            check(&mut cursor, first, 1 + count.index(rows - first));
                        }
                    });
                }
            });
        }

        #[test]
        fn a_changed_byte_fails_every_read_that_touches_its_block_and_no_other(
            (offset, dim, rows) in files(),
            at in any::<prop::sample::Index>(),
            change in 1u8..,
            mapped: bool,
            reads in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 1..12),
        ) {
            let mut bytes = content(offset + rows * dim);
            let sums = sums(&bytes);
            let at = at.index(bytes.len());
            bytes[at] ^= change;
            let file = Written::new("changed", &bytes);
            let shard = Shard::in_file(
                &file.0, offset as u64, rows as u64, dim, Kind::I8, Some(sums.clone()),
            ).unwrap();
            let shard = if mapped { shard.mapped().unwrap() } else { shard };
            let mut cursor = Cursor::default();
            for (first, count) in reads {
                let first = first.index(rows);
                let count = 1 + count.index(rows - first);
                let span = offset + first * dim..offset + (first + count) * dim;
                let touched = (span.start / BLOCK..=(span.end - 1) / BLOCK).contains(&(at / BLOCK));
                let mut out = vec![0.0; count * dim];
                match shard.read(first as u64, &mut out, &mut cursor, &Watch::none()) {
                    Ok(()) => {
                        prop_assert!(!touched);
                        let same = out.iter().zip(&bytes[span]).all(|(a, &b)| *a == level(b));
                        prop_assert!(same);
                    }
                    Err(Error::Damaged { what, .. }) => {
                        prop_assert!(touched);
                        let start = at / BLOCK * BLOCK;
                        let end = bytes.len().min(start + BLOCK) - 1;
                        let named = format!("block {} (bytes {start} to {end}): ", at / BLOCK);
                        prop_assert!(what.starts_with(&named), "{}", what);
                    }
                    Err(other) => prop_assert!(false, "{}", other),
                }
                let gathered = Shard::gathered(
                    std::slice::from_ref(&shard), &[(0, first as u64)], &mut cursor, &Watch::none(),
                );
                let row = offset + first * dim..offset + (first + 1) * dim;
                let touched = (row.start / BLOCK..=(row.end - 1) / BLOCK).contains(&(at / BLOCK));
                prop_assert_eq!(gathered.is_err(), touched);
            }
            let bad = check_file(&file.0, bytes.len() as u64, &sums, 2, &Asker::new(&never)).unwrap();
            prop_assert_eq!(bad, vec![(at / BLOCK) as u64]);
        }
    }

    #[test]
    fn checksums_are_those_of_the_definition_block_by_block() {
        // CRC-32 of zlib and PNG, bit by bit.
        let defined = |bytes: &[u8]| {
            let each = |crc: u32, byte: &u8| {
                (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
                    crc >> 1 ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 }
                })
            };
            !bytes.iter().fold(!0, each)
        };
        assert_eq!(sums(b"123456789"), [0xCBF4_3926]);
        assert!(sums(b"").is_empty());
        for length in [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5] {
            let bytes = content(length);
            let expected: Vec<u32> = (0..length.div_ceil(BLOCK))
                .map(|block| defined(&bytes[block * BLOCK..length.min((block + 1) * BLOCK)]))
                .collect();
            assert_eq!(sums(&bytes), expected);
        }
    }

    #[test]
    fn all_blocks_that_changed_are_found_and_no_other() {
        for blocks in [20, PIECE * ALONE + 5] {
            let whole = content(blocks * BLOCK + 3);
            let mut bytes = whole.clone();
            for at in [0, BLOCK - 1, 8 * BLOCK, 9 * BLOCK + 17, blocks * BLOCK + 2] {
                bytes[at] ^= 64;
            }
            let sums = sums(&whole);
            for threads in [1, 2, 3] {
                let check = |bytes: &[u8]| {
                    let file = Written::new("check", bytes);
                    let asker = Asker::new(&never);
                    check_file(&file.0, bytes.len() as u64, &sums, threads, &asker)
                };
                assert!(check(&whole).unwrap().is_empty());
                assert_eq!(check(&bytes).unwrap(), [0, 8, 9, blocks as u64]);
                assert!(matches!(check(&bytes[..blocks * BLOCK]), Err(Error::Damaged { .. })));
            }
        }
    }

    #[test]
    fn a_file_of_another_length_or_number_of_checksums_is_damaged() {
        let bytes = content(2 * BLOCK);
        let file = Written::new("length", &bytes);
        let sums = sums(&bytes);
        let damaged = |length, sums: &[u32]| {
            let found = check_file(&file.0, length, sums, 1, &Asker::new(&never));
            assert!(matches!(found, Err(Error::Damaged { .. })));
        };
        damaged(bytes.len() as u64 - 1, &sums);
        damaged(bytes.len() as u64 + 1, &sums);
        damaged(bytes.len() as u64, &sums[1..]);
        let shard = |rows, sums: &[u32]| {
            Shard::in_file(&file.0, 0, rows, BLOCK, Kind::I8, Some(sums.to_vec()))
        };
        assert!(shard(2, &sums).is_ok());
        for (rows, sums) in [(2, &sums[1..]), (2, &[]), (2, &[sums[0]; 3]), (1, &sums), (3, &sums)]
        {
            assert!(matches!(shard(rows, sums), Err(Error::Damaged { .. })));
        }
    }

    #[test]
    fn a_file_that_is_cut_while_it_is_read_is_damaged() {
        let bytes = content(4 * BLOCK);
        let file = Written::new("cut", &bytes);
        for checks in [Some(sums(&bytes)), None] {
            std::fs::write(&file.0, &bytes).unwrap();
            let shard = Shard::in_file(&file.0, 0, 4, BLOCK, Kind::I8, checks).unwrap();
            let (mut open, mut out) = (Cursor::default(), vec![0.0; 2 * BLOCK]);
            shard.read(0, &mut out, &mut open, &Watch::none()).unwrap();
            std::fs::write(&file.0, &bytes[..BLOCK + 7]).unwrap();
            for (first, cursor) in [(2, &mut open), (2, &mut Cursor::default())] {
                let found = shard.read(first, &mut out, cursor, &Watch::none());
                assert!(matches!(found, Err(Error::Damaged { .. })));
            }
        }
    }

    #[test]
    fn checking_a_file_ends_when_it_is_asked_to() {
        let bytes = content(BLOCK);
        let file = Written::new("stopped", &bytes);
        let yes = || true;
        let asker = Asker::new(&yes);
        std::thread::sleep(std::time::Duration::from_millis(60));
        let found = check_file(&file.0, bytes.len() as u64, &sums(&bytes), 1, &asker);
        assert!(matches!(found, Err(Error::Stopped)));
    }
}
