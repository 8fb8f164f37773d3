//! Search: the examples with the largest and the smallest scores.
//!
//! The score of an example for a query is the sum over checkpoints of
//! `scale * (stored row . query row)`, in f32, in one order: every way of searching returns the same
//! score for the same example, and only [`exact`] defines which come back.
//!
//! - [`rows`]: where rows come from; [`top`]: the best so far.
//! - [`exact`]: every example scored, but those whose norm says that they cannot matter.
//! - [`rotation`], [`codes`]: rows as few bits, with what is lost bounded; [`certified`]: the same
//!   answer from codes, proven by their bounds.
//! - [`graph`]: an approximate answer, found by walking from near examples to nearer ones.

pub mod certified;
pub mod codes;
pub mod exact;
pub mod graph;
pub mod rotation;
pub mod rows;
pub(crate) mod top;

pub use exact::{Request, ends};
pub use rows::{Digest, Rows};

/// An example and its score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// Index of the example.
    pub example: u64,
    /// Its score.
    pub score: f32,
}

/// The best and the worst examples of one query, best first and worst first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ends {
    /// The largest scores, largest first.
    pub largest: Vec<Hit>,
    /// The smallest scores, smallest first.
    pub smallest: Vec<Hit>,
}

/// Which ends of the ranking are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sides {
    /// The largest scores.
    pub largest: bool,
    /// The smallest scores.
    pub smallest: bool,
}

impl Sides {
    /// Both ends.
    pub const BOTH: Self = Self { largest: true, smallest: true };
}
