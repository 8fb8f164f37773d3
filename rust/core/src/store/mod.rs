//! Rows as they are stored: unit rows of f16 or f32, or levels of 8 bits and fewer, beside one f32
//! scale each: `row = scale * stored`.
//!
//! Norms of gradients span decades, so a row is divided by its norm before it is rounded, and the
//! norm is kept; the scale of levels is the one that loses least.

pub mod blocks;
mod encode;
mod file;
mod map;
mod quantise;
mod shard;

pub use encode::{Part, Stored, encode, encode_factors, encode_into};
pub use quantise::{Quantised, quantise};
pub(crate) use shard::READ;
pub use shard::{Cursor, Kind, Shard};

use crate::error::Error;
use crate::stop::Watch;

/// The CRC-32 of bytes that follow others whose CRC-32 is `before`; 0 for the first.
///
/// # Errors
/// [`Error::Stopped`].
pub fn crc32(before: u32, bytes: &[u8], watch: &Watch<'_>) -> Result<u32, Error> {
    let mut hasher = crc32fast::Hasher::new_with_initial(before);
    for bytes in bytes.chunks(blocks::BLOCK) {
        watch.check()?;
        hasher.update(bytes);
    }
    Ok(hasher.finalize())
}
