//! Text: which documents share tokens with a query, and how much that says, without any model.
//!
//! - [`texts`]: many lists of tokens, one behind the other.
//! - [`postings`]: for each term the documents that hold it.
//! - [`index`]: scores by TF-IDF and BM25, and the documents with the largest.

pub mod index;
pub mod postings;
pub mod texts;

pub use index::{Index, Weighting};
pub use texts::Texts;
