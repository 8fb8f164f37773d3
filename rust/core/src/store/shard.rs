//! Stored rows: in a file that is read by position into buffers of ours, or mapped; or in memory.

use std::fs::File;
use std::path::{Path, PathBuf};

use half::f16;

use super::blocks::Checks;
use super::file::{damaged, io_error, open, read_at};
use super::map::Map;
use crate::error::Error;
use crate::kernels::InstructionSet;
use crate::memory;
use crate::stop::Watch;

/// What it takes to begin to read rows, in nanoseconds.
pub(crate) const READ: usize = 500;

/// The type of stored values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 32 bits.
    F32,
    /// 16 bits.
    F16,
    /// 8 bits: whole numbers.
    I8,
    /// Codes of 4 bits, two a byte; see [`super::quantise`].
    I4,
    /// Codes of 2 bits, four a byte.
    I2,
    /// Codes of 1 bit, eight a byte.
    I1,
}

impl Kind {
    /// Bits of a value.
    #[must_use]
    pub fn bits(self) -> usize {
        match self {
            Self::F32 => 32,
            Self::F16 => 16,
            Self::I8 => 8,
            Self::I4 => 4,
            Self::I2 => 2,
            Self::I1 => 1,
        }
    }

    /// Bytes of a row of `dim` values, if that is a number: a row begins with a byte.
    #[must_use]
    pub fn row_bytes(self, dim: usize) -> Option<usize> {
        Some(dim.checked_mul(self.bits())?.div_ceil(8))
    }
}

/// What a reader keeps between reads: the file it read last, and buffers for narrower values and
/// for a block that is checked.
#[derive(Debug, Default)]
pub struct Cursor {
    open: Option<(PathBuf, File)>,
    halves: Vec<f16>,
    bytes: Vec<i8>,
    packed: Vec<u8>,
    block: Vec<u8>,
}

/// Rows of `dim` values.
///
/// A [`Cursor`] keeps one file open at a time: a store may have more files than a process may hold
/// open.
#[derive(Debug)]
pub struct Shard {
    place: Place,
    kind: Kind,
    rows: u64,
    dim: usize,
    /// Bytes of a row.
    width: usize,
}

/// Where rows are.
#[derive(Debug)]
enum Place {
    File(InFile),
    /// In memory, by kind.
    F32(Vec<f32>),
    F16(Vec<f16>),
    I8(Vec<i8>),
    /// Of any kind with fewer bits.
    Packed(Vec<u8>),
}

/// Rows from a byte of a file on.
#[derive(Debug)]
struct InFile {
    path: PathBuf,
    offset: u64,
    length: u64,
    /// None for a file that has no checksums.
    checks: Option<Checks>,
    /// None for a file that is read.
    map: Option<Map>,
}

impl InFile {
    /// Reads bytes of rows; `at` is counted from the first row on.
    fn read(
        &self,
        at: u64,
        out: &mut [u8],
        cursor: &mut Cursor,
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        let path = &self.path;
        let file = match &mut cursor.open {
            Some((open, file)) if open == path => file,
            open => &mut open.insert((path.clone(), self.open()?)).1,
        };
        let (file, at) = (&*file, self.offset + at);
        let read = |bytes: &mut [u8], at| read_at(file, path, bytes, at, watch);
        match &self.checks {
            Some(checks) => checks.read(path, at, out, &mut cursor.block, read),
            None => read(out, at),
        }
    }

    /// The mapped bytes, if there is a map; `at` is counted from the first row on.
    fn mapped(&self, at: u64, count: usize, watch: &Watch<'_>) -> Result<Option<&[u8]>, Error> {
        let Some(map) = &self.map else { return Ok(None) };
        let start = (self.offset + at) as usize;
        let range = start..start + count;
        if let Some(checks) = &self.checks {
            checks.verify_within(&self.path, range.clone(), map.bytes(), watch)?;
        }
        Ok(Some(&map.bytes()[range]))
    }

    fn open(&self) -> Result<File, Error> {
        let (file, length) = open(&self.path, self.checks.is_none())?;
        if length != self.length {
            let must = self.length;
            return Err(damaged(&self.path, format!("it must have {must} bytes, got {length}")));
        }
        Ok(file)
    }
}

impl Shard {
    /// `rows` rows from byte `offset` of a file to its end.
    ///
    /// With checksums of its blocks (see [`super::blocks`]) it must not be a link to another, and
    /// each block is checked when a read first touches it: what is handed out has been checked, or
    /// lies in a block that had been found as it should be.
    ///
    /// # Errors
    /// [`Error::Argument`] if `dim` is 0; [`Error::Gone`] if it is not there and has checksums,
    /// [`Error::Io`] without; [`Error::Damaged`] if it is not a regular file exactly as long as its
    /// rows need, or has not one checksum a block.
    pub fn in_file(
        path: &Path,
        offset: u64,
        rows: u64,
        dim: usize,
        kind: Kind,
        checksums: Option<Vec<u32>>,
    ) -> Result<Self, Error> {
        if dim == 0 {
            return Err(Error::argument("dim", "at least 1", dim));
        }
        let (_, length) = open(path, checksums.is_none())?;
        let width = kind.row_bytes(dim);
        let needed = width
            .and_then(|width| rows.checked_mul(width as u64))
            .and_then(|bytes| bytes.checked_add(offset));
        let Some(width) = width.filter(|_| needed == Some(length)) else {
            let needed = needed.map_or("more than 2^64".into(), |bytes| bytes.to_string());
            let what = format!("{rows} rows of {dim} need {needed} bytes, it has {length}");
            return Err(damaged(path, what));
        };
        let checks = checksums.map(|all| Checks::new(path, length, all)).transpose()?;
        let file = InFile { path: path.to_owned(), offset, length, checks, map: None };
        Ok(Self { place: Place::File(file), kind, rows, dim, width })
    }

    /// The same rows, looked at where the system keeps their file instead of being read from it.
    /// Checksums are looked at all the same.
    ///
    /// For files only that nobody writes meanwhile: the length is checked once, here, and a process
    /// that looks behind the end of a file which has been cut since is ended by the system
    /// (SIGBUS).
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be mapped, [`Error::Damaged`] if its length has changed.
    pub fn mapped(mut self) -> Result<Self, Error> {
        if let Place::File(file) = &mut self.place {
            let map = Map::of(&file.open()?).map_err(|source| io_error(&file.path, source))?;
            if map.bytes().len() as u64 != file.length {
                return Err(damaged(&file.path, format!("it must have {} bytes", file.length)));
            }
            file.map = Some(map);
        }
        Ok(self)
    }

    /// Rows in memory; what is left after whole rows is not looked at.
    #[must_use]
    pub fn in_memory(values: Vec<f32>, dim: usize) -> Self {
        Self::of(values.len(), dim, Kind::F32, Place::F32(values))
    }

    /// As [`Shard::in_memory`], in 16 bits.
    #[must_use]
    pub fn halves_in_memory(values: Vec<f16>, dim: usize) -> Self {
        Self::of(values.len(), dim, Kind::F16, Place::F16(values))
    }

    /// As [`Shard::in_memory`], whole numbers of 8 bits.
    #[must_use]
    pub fn bytes_in_memory(values: Vec<i8>, dim: usize) -> Self {
        Self::of(values.len(), dim, Kind::I8, Place::I8(values))
    }

    fn of(count: usize, dim: usize, kind: Kind, place: Place) -> Self {
        let rows = count.checked_div(dim).unwrap_or(0) as u64;
        // A row that is longer than there are bytes is none of them.
        Self { place, kind, rows, dim, width: kind.row_bytes(dim).unwrap_or(usize::MAX) }
    }

    /// The rows of shards one after the other in the order of their numbers, as they are stored,
    /// in memory. Numbers are those of the shard and of the row in it.
    ///
    /// # Errors
    /// [`Error::Shape`] if a shard has another kind or width; as [`Shard::read`].
    pub fn gathered(
        shards: &[Self],
        rows: &[(usize, u64)],
        cursor: &mut Cursor,
        watch: &Watch<'_>,
    ) -> Result<Self, Error> {
        let (kind, dim, width) =
            shards.first().map_or((Kind::F32, 1, 4), |shard| (shard.kind, shard.dim, shard.width));
        if shards.iter().any(|shard| (shard.kind, shard.dim) != (kind, dim)) {
            return Err(Error::shape("shards", "of one kind and width", "several"));
        }
        let size = rows.len() * dim;
        let mut found = match kind {
            Kind::F32 => Place::F32(memory::filled(size, 0.0, watch)?),
            Kind::F16 => Place::F16(memory::filled(size, f16::ZERO, watch)?),
            Kind::I8 => Place::I8(memory::filled(size, 0, watch)?),
            Kind::I4 | Kind::I2 | Kind::I1 => {
                Place::Packed(memory::filled(rows.len() * width, 0, watch)?)
            }
        };
        let mut steps = watch.steps();
        for (index, &(shard, row)) in rows.iter().enumerate() {
            let here = index * dim..(index + 1) * dim;
            let shard = &shards[shard];
            steps.add(READ + width)?;
            shard.check(row, 1)?;
            match &mut found {
                Place::F32(values) => shard.stored(row, &mut values[here], cursor, watch)?,
                Place::F16(values) => shard.stored(row, &mut values[here], cursor, watch)?,
                Place::I8(values) => shard.stored(row, &mut values[here], cursor, watch)?,
                Place::Packed(bytes) => {
                    let bytes = &mut bytes[index * width..(index + 1) * width];
                    shard.stored(row, bytes, cursor, watch)?;
                }
                Place::File(..) => {}
            }
        }
        Ok(Self { place: found, kind, rows: rows.len() as u64, dim, width })
    }

    /// The number of rows.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// The width of a row.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Whether its rows are in memory.
    #[must_use]
    pub fn is_in_memory(&self) -> bool {
        !matches!(self.place, Place::File(..))
    }

    /// Bytes it takes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.place {
            Place::File(file) => {
                file.path.as_os_str().len() + file.checks.as_ref().map_or(0, Checks::bytes)
            }
            Place::F32(values) => 4 * values.len(),
            Place::F16(values) => 2 * values.len(),
            Place::I8(values) => values.len(),
            Place::Packed(bytes) => bytes.len(),
        }
    }

    /// The rows from `first` on, where they lie in memory as f32, or in a map; none if there are not
    /// so many.
    ///
    /// # Errors
    /// [`Error::Damaged`] if a block of a map has another checksum.
    pub fn lent(
        &self,
        first: u64,
        count: usize,
        watch: &Watch<'_>,
    ) -> Result<Option<&[f32]>, Error> {
        if self.kind != Kind::F32 || self.check(first, count as u64).is_err() {
            return Ok(None);
        }
        self.lying(first, count * self.dim, watch)
    }

    /// `count` stored values of the rows from `first` on, where they lie in memory or in a map;
    /// `first` and their number have been checked.
    fn lying<T: bytemuck::Pod>(
        &self,
        first: u64,
        count: usize,
        watch: &Watch<'_>,
    ) -> Result<Option<&[T]>, Error> {
        let (at, count) = (first * self.width as u64, count * size_of::<T>());
        let bytes: &[u8] = match &self.place {
            Place::File(file) => match file.mapped(at, count, watch)? {
                Some(bytes) => return Ok(bytemuck::try_cast_slice(bytes).ok()),
                None => return Ok(None),
            },
            Place::F32(values) => bytemuck::cast_slice(values),
            Place::F16(values) => bytemuck::cast_slice(values),
            Place::I8(values) => bytemuck::cast_slice(values),
            Place::Packed(bytes) => bytes,
        };
        Ok(bytemuck::try_cast_slice(&bytes[at as usize..][..count]).ok())
    }

    /// Reads the rows from `first` on into `out`, as many as fit.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not so many rows, [`Error::Io`] if reading fails,
    /// [`Error::Damaged`] if the file has been cut, or a block has another checksum.
    pub fn read(
        &self,
        first: u64,
        out: &mut [f32],
        cursor: &mut Cursor,
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        let count = out.len().checked_div(self.dim).unwrap_or(usize::MAX);
        self.check(first, count as u64)?;
        let out = &mut out[..count * self.dim];
        match self.kind {
            Kind::F32 => self.stored(first, out, cursor, watch)?,
            Kind::F16 => {
                let mut halves = std::mem::take(&mut cursor.halves);
                let found = self.found(first, out.len(), &mut halves, cursor, watch);
                let done = found.map(|halves| InstructionSet::best().widen(halves, out));
                cursor.halves = halves;
                done?;
            }
            Kind::I8 => {
                let mut bytes = std::mem::take(&mut cursor.bytes);
                let found = self.found(first, out.len(), &mut bytes, cursor, watch);
                let done = found.map(|bytes| InstructionSet::best().widen_bytes(bytes, out));
                cursor.bytes = bytes;
                done?;
            }
            Kind::I4 => self.unpack::<4>(first, out, cursor, watch)?,
            Kind::I2 => self.unpack::<2>(first, out, cursor, watch)?,
            Kind::I1 => self.unpack::<1>(first, out, cursor, watch)?,
        }
        Ok(())
    }

    /// Reads codes of `B` bits as levels.
    fn unpack<const B: usize>(
        &self,
        first: u64,
        out: &mut [f32],
        cursor: &mut Cursor,
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        let mut packed = std::mem::take(&mut cursor.packed);
        let count = out.len() / self.dim * self.width;
        let done = self.found(first, count, &mut packed, cursor, watch).map(|packed| {
            let set = InstructionSet::best();
            if (self.dim * B).is_multiple_of(8) {
                set.unpack::<B>(packed, out);
            } else {
                for (row, out) in
                    packed.chunks_exact(self.width).zip(out.chunks_exact_mut(self.dim))
                {
                    set.unpack::<B>(row, out);
                }
            }
        });
        cursor.packed = packed;
        done
    }

    /// `count` stored values of the rows from `first` on, where they lie or else read into `values`.
    fn found<'a, T: bytemuck::Pod>(
        &'a self,
        first: u64,
        count: usize,
        values: &'a mut Vec<T>,
        cursor: &mut Cursor,
        watch: &Watch<'_>,
    ) -> Result<&'a [T], Error> {
        if let Some(lying) = self.lying(first, count, watch)? {
            return Ok(lying);
        }
        values.resize(count, T::zeroed());
        self.stored(first, values, cursor, watch)?;
        Ok(values)
    }

    fn check(&self, first: u64, count: u64) -> Result<(), Error> {
        if first.checked_add(count).is_none_or(|end| end > self.rows) {
            let place = match &self.place {
                Place::File(file) => file.path.display().to_string(),
                _ => "a matrix in memory".into(),
            };
            let must = format!("within the {} of {place}", self.rows);
            return Err(Error::shape("rows", must, format!("{count} from {first}")));
        }
        Ok(())
    }

    /// Reads stored values of the shard's own kind; `first` and their number have been checked.
    fn stored<T: bytemuck::Pod>(
        &self,
        first: u64,
        out: &mut [T],
        cursor: &mut Cursor,
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        // The values lie as they do in memory: the crate compiles for little-endian targets only.
        let out: &mut [u8] = bytemuck::cast_slice_mut(out);
        if let Some(bytes) = self.lying(first, out.len(), watch)? {
            out.copy_from_slice(bytes);
        } else if let Place::File(file) = &self.place {
            file.read(first * self.width as u64, out, cursor, watch)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::blocks::{BLOCK, checksums};
    use super::*;

    #[test]
    fn packed_rows_come_back_as_levels_from_files_and_from_memory() {
        let path = std::env::temp_dir().join(format!("whence-packed-{}", std::process::id()));
        // Three rows of five codes; what is left of a row's last byte says nothing.
        let codes = [[15u8, 0, 7, 8, 3], [1, 2, 4, 9, 14], [5, 6, 10, 11, 12]];
        for (kind, bits, width) in [(Kind::I4, 4, 3), (Kind::I2, 2, 2), (Kind::I1, 1, 1)] {
            let mask = (1 << bits) - 1;
            let mut bytes = vec![0u8; 3 * width];
            for (row, codes) in codes.iter().enumerate() {
                for (at, code) in codes.iter().enumerate() {
                    bytes[row * width + at * bits / 8] |= (code & mask) << (at * bits % 8);
                }
                bytes[(row + 1) * width - 1] |= 1 << 7;
            }
            std::fs::write(&path, &bytes).unwrap();
            let levels = |row: usize| {
                codes[row].map(|code| f32::from(2 * i16::from(code & mask) - i16::from(mask)))
            };
            let cursor = &mut Cursor::default();
            let mut out = [0.0; 10];
            let rows = Shard::in_file(&path, 0, 3, 5, kind, None).unwrap();
            rows.read(1, &mut out, cursor, &Watch::none()).unwrap();
            assert_eq!(out[..5], levels(1));
            assert_eq!(out[5..], levels(2));
            let gathered =
                Shard::gathered(&[rows], &[(0, 2), (0, 0)], cursor, &Watch::none()).unwrap();
            assert_eq!(gathered.bytes(), 2 * width);
            gathered.read(0, &mut out, cursor, &Watch::none()).unwrap();
            assert_eq!(out[..5], levels(2));
            assert_eq!(out[5..], levels(0));
            for (count, dim) in [(3, 5 + 8 / bits), (2, 5), (4, 5), (3, usize::MAX)] {
                let found = Shard::in_file(&path, 0, count, dim, kind, None);
                assert!(matches!(found, Err(Error::Damaged { .. })));
            }
            let found = Shard::in_file(&path, 3 * width as u64, 0, 0, kind, None);
            assert!(matches!(found, Err(Error::Argument { argument: "dim", .. })));
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn rows_of_every_kind_are_the_same_through_a_map_and_f32_are_lent_from_it() {
        let path = std::env::temp_dir().join(format!("whence-mapped-{}", std::process::id()));
        let (rows, dim) = (700, 129);
        for kind in [Kind::F32, Kind::F16, Kind::I8, Kind::I4, Kind::I2, Kind::I1] {
            for offset in [0, 128, 3] {
                let size = offset + rows * kind.row_bytes(dim).unwrap();
                // No f32 and no f16 of these is a NaN, which would not equal itself.
                let bytes: Vec<u8> = (0..size).map(|at| ((at * 7919) >> 3) as u8 & 0x77).collect();
                std::fs::write(&path, &bytes).unwrap();
                let sums = checksums(&bytes, &Watch::none()).unwrap();
                for sums in [None, Some(sums)] {
                    let place = |sums| {
                        Shard::in_file(&path, offset as u64, rows as u64, dim, kind, sums).unwrap()
                    };
                    let read = place(None);
                    let mapped = place(sums).mapped().unwrap();
                    let mut cursor = Cursor::default();
                    for (first, count) in [(0, 1), (3, 600), (699, 1), (0, 700), (5, 0)] {
                        let mut expected = vec![1.0; count * dim];
                        read.read(first, &mut expected, &mut cursor, &Watch::none()).unwrap();
                        let mut out = vec![2.0; count * dim];
                        mapped.read(first, &mut out, &mut cursor, &Watch::none()).unwrap();
                        assert_eq!(out, expected);
                        let lent = mapped.lent(first, count, &Watch::none()).unwrap();
                        assert_eq!(lent.is_some(), kind == Kind::F32 && offset % 4 == 0);
                        assert!(lent.is_none_or(|lent| lent == expected));
                        assert_eq!(read.lent(first, count, &Watch::none()).unwrap(), None);
                    }
                    assert!(
                        mapped
                            .read(600, &mut vec![0.0; 101 * dim], &mut cursor, &Watch::none())
                            .is_err()
                    );
                    assert_eq!(mapped.lent(600, 101, &Watch::none()).unwrap(), None);
                    assert!(!mapped.is_in_memory());
                }
            }
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn rows_are_not_lent_from_a_block_that_changed() {
        let path = std::env::temp_dir().join(format!("whence-lent-{}", std::process::id()));
        let mut bytes = vec![0; 3 * BLOCK];
        let sums = checksums(&bytes, &Watch::none()).unwrap();
        bytes[BLOCK] = 1;
        std::fs::write(&path, &bytes).unwrap();
        let shard = Shard::in_file(&path, 0, 6, BLOCK / 8, Kind::F32, Some(sums)).unwrap();
        let shard = shard.mapped().unwrap();
        for (first, count, whole) in [(0, 2, true), (1, 2, false), (4, 2, true), (0, 6, false)] {
            let found = shard.lent(first, count, &Watch::none());
            assert_eq!(matches!(found, Ok(Some(_))), whole);
            assert_eq!(matches!(found, Err(Error::Damaged { .. })), !whole);
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_file_that_was_cut_is_not_mapped() {
        let path = std::env::temp_dir().join(format!("whence-map-cut-{}", std::process::id()));
        std::fs::write(&path, [0; 40]).unwrap();
        let shard = Shard::in_file(&path, 0, 5, 2, Kind::F32, None).unwrap();
        std::fs::write(&path, [0; 39]).unwrap();
        assert!(matches!(shard.mapped(), Err(Error::Damaged { .. })));
        std::fs::write(&path, []).unwrap();
        let none = Shard::in_file(&path, 0, 0, 2, Kind::F32, None).unwrap().mapped().unwrap();
        none.read(0, &mut [], &mut Cursor::default(), &Watch::none()).unwrap();
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn rows_come_back_and_a_wrong_length_is_damage() {
        let path = std::env::temp_dir().join(format!("whence-rows-{}", std::process::id()));
        let mut file = File::create(&path).unwrap();
        file.write_all(b"head").unwrap();
        for value in 0..6u8 {
            file.write_all(&f16::from_f32(f32::from(value)).to_le_bytes()).unwrap();
        }
        drop(file);
        let cursor = &mut Cursor::default();
        let rows = Shard::in_file(&path, 4, 3, 2, Kind::F16, None).unwrap();
        let mut out = [0.0; 4];
        rows.read(1, &mut out, cursor, &Watch::none()).unwrap();
        assert_eq!(out, [2.0, 3.0, 4.0, 5.0]);
        assert!(rows.read(2, &mut out, cursor, &Watch::none()).is_err());
        for (offset, count) in [(4, 2), (4, 4), (0, 3), (4, u64::MAX)] {
            let found = Shard::in_file(&path, offset, count, 2, Kind::F16, None);
            assert!(matches!(found, Err(Error::Damaged { .. })));
        }
        let gathered = Shard::gathered(&[rows], &[(0, 2), (0, 0)], cursor, &Watch::none()).unwrap();
        gathered.read(0, &mut out, cursor, &Watch::none()).unwrap();
        assert_eq!(out, [4.0, 5.0, 0.0, 1.0]);
        assert_eq!(gathered.bytes(), 8);
        assert!(Shard::gathered(&[gathered], &[(0, 2)], cursor, &Watch::none()).is_err());
        // As bytes, the same file has twice as many values.
        let bytes = Shard::in_file(&path, 4, 6, 2, Kind::I8, None).unwrap();
        bytes.read(1, &mut out[..2], cursor, &Watch::none()).unwrap();
        assert_eq!(out[..2], [0.0, 60.0]);
        std::fs::remove_file(&path).unwrap();
        let memory = Shard::in_memory(vec![1.0, 2.0, 3.0], 1);
        assert_eq!(memory.lent(1, 2, &Watch::none()).unwrap(), Some(&[2.0, 3.0][..]));
        assert_eq!(memory.lent(2, 2, &Watch::none()).unwrap(), None);
        memory.read(2, &mut out[..1], cursor, &Watch::none()).unwrap();
        assert_eq!(out[0], 3.0);
        assert!(memory.read(3, &mut out[..1], cursor, &Watch::none()).is_err());
    }
}
