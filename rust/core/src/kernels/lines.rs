//! Bytes that begin where a cache line does.
#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut};

use crate::error::Error;
use crate::memory;
use crate::stop::Watch;

/// Bytes that are copied between two looks at the watch.
const STEP: usize = 1 << 20;
/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

// SAFETY: an array of bytes, as long as its alignment, so without padding; any bits are one.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Line {}

/// Bytes in memory, the first of which begins a cache line: rows of a multiple of 64 bytes take as
/// few lines as there can be.
#[derive(Debug, Default, PartialEq)]
pub struct Lines {
    lines: Vec<Line>,
    len: usize,
}

impl Lines {
    /// So many zeros.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub fn zeros(len: usize, watch: &Watch<'_>) -> Result<Self, Error> {
        Ok(Self { lines: memory::filled(len.div_ceil(LINE), Line([0; LINE]), watch)?, len })
    }

    /// Bytes that lie in several places.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub fn joined(parts: &[&[u8]], watch: &Watch<'_>) -> Result<Self, Error> {
        let mut all = Self::zeros(parts.iter().map(|part| part.len()).sum(), watch)?;
        let mut rest = &mut all[..];
        for part in parts.iter().flat_map(|part| part.chunks(STEP)) {
            watch.check()?;
            let (here, after) = rest.split_at_mut(part.len());
            here.copy_from_slice(part);
            rest = after;
        }
        Ok(all)
    }
}

impl Clone for Lines {
    fn clone(&self) -> Self {
        let mut lines = memory::with_room(self.lines.len());
        lines.extend_from_slice(&self.lines);
        Self { lines, len: self.len }
    }
}

impl Deref for Lines {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl DerefMut for Lines {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_in_order_and_begin_a_line() {
        let bytes: Vec<u8> = (0..200).collect();
        for split in [0, 1, 63, 64, 65, 128, 200] {
            let lines = Lines::joined(&[&bytes[..split], &bytes[split..]], &Watch::none()).unwrap();
            assert_eq!(&lines[..], bytes);
            assert_eq!(lines.clone(), lines);
            assert_eq!(lines.as_ptr() as usize % LINE, 0);
        }
        assert_eq!(&Lines::zeros(3, &Watch::none()).unwrap()[..], [0; 3]);
    }
}
