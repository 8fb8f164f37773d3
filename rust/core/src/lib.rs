//! The core of whence: gradient sketching, row storage and search, without Python.
//!
//! The map, in the order data flows and in which modules may use each other:
//!
//! - [`error`]: the one error type; [`stop`]: how a long call learns that it should end.
//! - [`memory`]: large arrays; [`order`]: sorting them.
//! - [`random`]: the one definition of randomness; [`normal`]: normal numbers from it.
//! - [`kernels`]: the inner loops, one file per instruction set, `scalar` defines each.
//! - [`sketch`]: per-sample gradients to rows of a fixed width.
//! - [`norms`]: the per-sample gradients of norm layers.
//! - [`store`]: rows as they lie on disk, encoded and read back.
//! - [`search`]: the rows with the largest and smallest inner products.
//! - [`hash`]: random-projection codes, their buckets, and what is near by them.
//! - [`text`]: which documents share tokens with a query.

#[cfg(not(all(target_pointer_width = "64", target_endian = "little")))]
compile_error!("whence needs a 64-bit little-endian target: its row files are read as they lie");

pub mod error;
pub mod hash;
pub mod kernels;
pub mod memory;
pub mod normal;
pub mod norms;
pub mod order;
pub mod parallel;
pub mod random;
pub mod search;
pub mod sketch;
pub mod stop;
pub mod store;
pub mod text;
