//! Many lists of tokens, one behind the other.

use std::ops::Range;

use crate::error::Error;

/// Documents or queries: lists of tokens, which are any numbers.
#[derive(Clone, Copy, Debug)]
pub struct Texts<'a> {
    tokens: &'a [u32],
    starts: &'a [u64],
}

impl<'a> Texts<'a> {
    /// Texts of these tokens; number `i` has those from `starts[i]` to `starts[i + 1]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `starts` does not rise from 0 to the number of tokens;
    /// [`Error::Argument`] if there are more than 2^32 - 1 texts, or tokens of one.
    pub fn new(tokens: &'a [u32], starts: &'a [u64]) -> Result<Self, Error> {
        let whole = starts.first() == Some(&0) && starts.last() == Some(&(tokens.len() as u64));
        if !whole || !starts.is_sorted() {
            let must = format!("[texts + 1], rising from 0 to {}", tokens.len());
            return Err(Error::shape("starts", must, format!("{} others", starts.len())));
        }
        let longest = starts.windows(2).map(|ends| ends[1] - ends[0]).max().unwrap_or(0);
        let most = longest.max(starts.len() as u64 - 1);
        if most > u64::from(u32::MAX) {
            let must = format!("at most {} texts of as many tokens", u32::MAX);
            return Err(Error::argument("starts", must, most));
        }
        Ok(Self { tokens, starts })
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tokens of a text.
    #[must_use]
    pub fn at(&self, text: usize) -> &'a [u32] {
        &self.tokens[self.starts[text] as usize..self.starts[text + 1] as usize]
    }

    /// The number of tokens of each text.
    pub(super) fn lengths(&self) -> impl Iterator<Item = u32> {
        self.starts.windows(2).map(|ends| (ends[1] - ends[0]) as u32)
    }

    /// All texts in order, cut into ranges of about so many tokens.
    pub(super) fn cut(&self, tokens: u64) -> Vec<Range<usize>> {
        let mut ranges = Vec::new();
        let mut first = 0;
        for text in 0..self.len() {
            if self.starts[text + 1] - self.starts[first] >= tokens || text + 1 == self.len() {
                ranges.push(first..text + 1);
                first = text + 1;
            }
        }
        ranges
    }
}

/// The tokens of texts, and their starts.
#[cfg(test)]
pub(super) fn flat(texts: &[Vec<u32>]) -> (Vec<u32>, Vec<u64>) {
    let mut starts = vec![0];
    for text in texts {
        starts.push(starts[starts.len() - 1] + text.len() as u64);
    }
    (texts.concat(), starts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_must_rise_from_nothing_to_all() {
        let tokens = [3, 1, 4];
        for starts in [&[][..], &[0], &[1, 3], &[0, 2], &[0, 4], &[0, 2, 1, 3], &[0, u64::MAX, 3]] {
            assert!(Texts::new(&tokens, starts).is_err(), "{starts:?}");
        }
        let texts = Texts::new(&tokens, &[0, 1, 1, 3]).unwrap();
        assert_eq!([texts.at(0), texts.at(1), texts.at(2)], [&[3][..], &[], &[1, 4]]);
        assert_eq!(texts.lengths().collect::<Vec<_>>(), [1, 0, 2]);
        assert!(Texts::new(&[], &[0]).unwrap().is_empty());
    }

    #[test]
    fn ranges_follow_each_other() {
        let tokens = [0; 10];
        let texts = Texts::new(&tokens, &[0, 4, 4, 5, 9, 10, 10]).unwrap();
        assert_eq!(texts.cut(4), [0..1, 1..4, 4..6]);
        assert_eq!(texts.cut(1), [0..1, 1..3, 3..4, 4..5, 5..6]);
        assert_eq!(texts.cut(100), std::slice::from_ref(&(0..6)));
        assert_eq!(Texts::new(&[], &[0]).unwrap().cut(4), []);
    }
}
