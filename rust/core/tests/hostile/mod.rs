//! Hostile input: what may stand in files in the place of what a store or a saved index wrote.
//!
//! [`try_input`] makes an input of some bytes, whatever they are: first something that could be
//! right, and then it is spoilt here and there, with checksums that fit or do not. Everything that
//! takes it must refuse it by a named error, or answer within bounds.
#![allow(clippy::unwrap_used, clippy::panic)] // a test, though none of its functions is called one

mod choices;
mod files;
mod indexes;
mod texts;

use whence_core::error::Error;

use self::choices::Choices;

/// Tries one input; panics if something is not as it must be.
pub(crate) fn try_input(bytes: &[u8]) {
    let choices = &mut Choices::new(bytes);
    match choices.below(8) {
        0 | 1 => files::read_rows(choices),
        2 => files::search_rows(choices),
        3 => files::check_files(choices),
        4 => indexes::search_codes(choices),
        5 | 6 => indexes::search_graph(choices),
        _ => texts::search_texts(choices),
    }
}

/// What was found, if anything; an error must be about the input.
fn fine<T>(found: Result<T, Error>) -> Option<T> {
    match found {
        Ok(found) => Some(found),
        Err(error @ (Error::Internal(_) | Error::Stopped)) => panic!("{error}"),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            None
        }
    }
}
