//! Rows in lists by a key: inverted lists as compressed sparse rows.

use crate::error::Error;
use crate::order;
use crate::stop::Watch;

/// The rows of every key, in rising order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buckets {
    /// The distinct keys, in rising order.
    keys: Vec<u64>,
    /// Where the rows of each key begin, and where the last end.
    starts: Vec<usize>,
    rows: Vec<u32>,
}

impl Buckets {
    /// The buckets of rows with these keys: row `i` has key `i`. O(rows log rows).
    ///
    /// Rows are numbered in 32 bits; further ones are left out, which callers rule out.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub fn new(keys: &[u64], watch: &Watch<'_>) -> Result<Self, Error> {
        let mut order: Vec<(u64, u32)> = keys.iter().copied().zip(0..).collect();
        order::sort(&mut order, watch, Ord::cmp)?;
        let mut steps = watch.steps();
        let mut buckets = Self { keys: Vec::new(), starts: Vec::new(), rows: Vec::new() };
        for (at, &(key, row)) in order.iter().enumerate() {
            steps.add(5)?;
            if buckets.keys.last() != Some(&key) {
                buckets.keys.push(key);
                buckets.starts.push(at);
            }
            buckets.rows.push(row);
        }
        buckets.starts.push(buckets.rows.len());
        Ok(buckets)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The rows with this key; none if no row has it. O(log keys).
    #[must_use]
    pub fn of(&self, key: u64) -> &[u32] {
        self.keys.binary_search(&key).map_or(&[], |at| self.at(at))
    }

    /// The rows of the bucket with this number.
    fn at(&self, bucket: usize) -> &[u32] {
        &self.rows[self.starts[bucket]..self.starts[bucket + 1]]
    }

    /// The rows of each bucket, by rising key.
    pub fn iter(&self) -> impl Iterator<Item = &[u32]> {
        (0..self.len()).map(|bucket| self.at(bucket))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn are_those_of_a_map(keys in prop::collection::vec(0u64..9, 0..50)) {
            let mut expected: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
            for (row, &key) in keys.iter().enumerate() {
                expected.entry(key).or_default().push(row as u32);
            }
            let buckets = Buckets::new(&keys, &Watch::none()).unwrap();
            prop_assert_eq!(buckets.len(), expected.len());
            prop_assert!(buckets.iter().eq(expected.values().map(|rows| &rows[..])));
            for key in 0..10 {
                prop_assert_eq!(buckets.of(key), expected.get(&key).map_or(&[][..], |rows| rows));
            }
        }
    }
}
