//! A file of stored rows, read by position into buffers of ours.

use std::fs::File;
use std::path::{Path, PathBuf};

use half::f16;

use crate::error::Error;
use crate::kernels::InstructionSet;

/// What a reader keeps between reads: the file it read last, and a buffer for 16-bit rows.
#[derive(Debug, Default)]
pub struct Cursor {
    open: Option<(PathBuf, File)>,
    halves: Vec<f16>,
}

impl Cursor {
    fn file(&mut self, path: &Path) -> std::io::Result<&File> {
        if self.open.as_ref().is_none_or(|(open, _)| open != path) {
            self.open = Some((path.to_owned(), File::open(path)?));
        }
        match &self.open {
            Some((_, file)) => Ok(file),
            None => Err(std::io::ErrorKind::NotFound.into()),
        }
    }
}

/// Rows of `dim` values that begin at byte `offset` of a file.
///
/// A [`Cursor`] keeps one file open at a time: a store may have more files than a process may hold
/// open.
#[derive(Debug)]
pub struct RowFile {
    path: PathBuf,
    offset: u64,
    rows: u64,
    dim: usize,
    half: bool,
}

impl RowFile {
    /// A file of f16 (`half`) or f32 rows.
    ///
    /// # Errors
    /// [`Error::Io`] if it is not there, [`Error::Damaged`] if it is not exactly as long as
    /// its rows need.
    pub fn new(path: &Path, offset: u64, rows: u64, dim: usize, half: bool) -> Result<Self, Error> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let length = std::fs::metadata(path).map_err(io)?.len();
        let size: u64 = if half { 2 } else { 4 };
        let needed = (dim as u64)
            .checked_mul(size)
            .and_then(|width| width.checked_mul(rows))
            .and_then(|bytes| bytes.checked_add(offset));
        if needed != Some(length) {
            let needed = needed.map_or("more than 2^64".into(), |bytes| bytes.to_string());
            return Err(Error::Damaged {
                path: path.to_owned(),
                what: format!("{rows} rows of {dim} need {needed} bytes, it has {length}"),
            });
        }
        Ok(Self { path: path.to_owned(), offset, rows, dim, half })
    }

    /// The number of rows.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Reads the rows from `first` on into `out`, as many as fit.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not so many rows, [`Error::Io`] if reading fails.
    pub fn read(&self, first: u64, out: &mut [f32], cursor: &mut Cursor) -> Result<(), Error> {
        let count = (out.len() / self.dim) as u64;
        if first.checked_add(count).is_none_or(|end| end > self.rows) {
            return Err(Error::shape(
                "rows",
                format!("within the {} of {}", self.rows, self.path.display()),
                format!("{count} from {first}"),
            ));
        }
        // The values lie as they do in memory: the crate compiles for little-endian targets only.
        let io = |source| Error::Io { path: self.path.clone(), source };
        let size = if self.half { 2 } else { 4 };
        let at = self.offset + first * self.dim as u64 * size;
        if self.half {
            let mut halves = std::mem::take(&mut cursor.halves);
            halves.resize(out.len(), f16::ZERO);
            let file = cursor.file(&self.path).map_err(io)?;
            read_exact_at(file, bytemuck::cast_slice_mut(&mut halves), at).map_err(io)?;
            InstructionSet::best().widen(&halves, out);
            cursor.halves = halves;
        } else {
            let file = cursor.file(&self.path).map_err(io)?;
            read_exact_at(file, bytemuck::cast_slice_mut(out), at).map_err(io)?;
        }
        Ok(())
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut at: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let read = std::os::windows::fs::FileExt::seek_read(file, bytes, at)?;
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        bytes = &mut bytes[read..];
        at += read as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn rows_come_back_and_a_wrong_length_is_damage() {
        let path = std::env::temp_dir().join(format!("whence-rows-{}", std::process::id()));
        let mut file = File::create(&path).unwrap();
        file.write_all(b"head").unwrap();
        for value in 0..6u8 {
            file.write_all(&f16::from_f32(f32::from(value)).to_le_bytes()).unwrap();
        }
        drop(file);
        let rows = RowFile::new(&path, 4, 3, 2, true).unwrap();
        let mut out = [0.0; 4];
        rows.read(1, &mut out, &mut Cursor::default()).unwrap();
        assert_eq!(out, [2.0, 3.0, 4.0, 5.0]);
        assert!(rows.read(2, &mut out, &mut Cursor::default()).is_err());
        for (offset, count) in [(4, 2), (4, 4), (0, 3), (4, u64::MAX)] {
            assert!(matches!(
                RowFile::new(&path, offset, count, 2, true),
                Err(Error::Damaged { .. })
            ));
        }
        std::fs::remove_file(&path).unwrap();
    }
}
