//! Rows as they lie on disk: unit rows of f16 or f32 beside one f32 scale each.
//!
//! Norms of gradients span decades, so a row is divided by its norm before it is rounded, and the
//! norm is kept: `row = scale * stored`.

mod encode;
mod file;

pub use encode::{Stored, encode};
pub use file::{Cursor, RowFile};
