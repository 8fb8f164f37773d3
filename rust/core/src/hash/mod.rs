//! Random-projection hashing: codes that agree the more often, the nearer two rows are.
//!
//! - [`family`]: sign and p-stable hash functions, and their codes.
//! - [`buckets`]: rows in lists by a key; the key may be a part of a code, or the leaf of a tree.
//! - [`probe`]: the buckets next to a query's own, cheapest perturbation first.
//! - [`index`]: candidates by code, rescored exactly.
//! - [`pairs`]: pairs of rows that share a bucket.
//! - [`graph`]: the nearest neighbours by code, and exactly within batches.
//! - [`duplicates`]: groups of rows that are nearly the same.
//! - [`shuffle`]: seeded orders.

pub mod buckets;
pub mod duplicates;
pub mod family;
pub mod graph;
pub mod index;
pub mod pairs;
pub mod probe;
pub mod shuffle;

use crate::error::Error;
use crate::search::exact::not_finite;
use crate::sketch::MAX_DIM;
use crate::stop::Watch;

/// The number of rows of `values`, if they are finite rows of width `dim` that 32 bits can number.
fn count_rows(
    argument: &'static str,
    values: &[f32],
    dim: usize,
    watch: &Watch<'_>,
) -> Result<usize, Error> {
    if dim == 0 || dim > MAX_DIM {
        return Err(Error::argument("dim", format!("from 1 to {MAX_DIM}"), dim));
    }
    let rows = values.len() / dim;
    if rows * dim != values.len() || rows > u32::MAX as usize {
        let must = format!("[rows, {dim}], fewer than 2^32 rows");
        return Err(Error::shape(argument, must, format!("{} values", values.len())));
    }
    match not_finite(values, watch)? {
        None => Ok(rows),
        Some(at) => Err(Error::NotFinite {
            argument,
            place: format!("row {}, column {}", at / dim, at % dim),
            value: f64::from(values[at]),
        }),
    }
}

/// `value`, if it is from `low` to `high`.
fn in_range(argument: &'static str, value: usize, low: usize, high: usize) -> Result<usize, Error> {
    if (low..=high).contains(&value) {
        return Ok(value);
    }
    Err(Error::argument(argument, format!("from {low} to {high}"), value))
}
