//! A file as memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use memmap2::Mmap;

/// The bytes of a file, which the system reads when they are looked at, and may forget again.
///
/// Of no use where files may be written meanwhile: what is read then is unspecified, and a process
/// that looks at a page behind the end of a file which has been cut is ended by the system
/// (SIGBUS). A page that a disk cannot read ends it too.
#[derive(Debug)]
pub(super) struct Map(Mmap);

impl Map {
    pub(super) fn of(file: &File) -> io::Result<Self> {
        // SAFETY: the map is read-only, and this process writes no file that it has mapped: those
        // of a store are written once and named after that. That no other process does is the
        // caller's word, who asks for a map. Nobody relies on bytes being those seen before:
        // values of any bits are numbers, and no length or place is taken from them.
        Ok(Self(unsafe { Mmap::map(file) }?))
    }

    /// All bytes of the file.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}
