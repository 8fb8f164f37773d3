//! Pairs of rows that share a bucket.

use std::collections::HashSet;

use super::buckets::Buckets;
use super::in_range;
use super::shuffle::below;
use crate::error::Error;
use crate::memory;
use crate::order;
use crate::parallel::share;
use crate::random::{parameter_key, value};
use crate::stop::{Asker, Watch};

/// The most pairs that may be taken from one bucket.
pub const MAX_PAIRS: usize = 1 << 16;

/// The distinct pairs `(low, high)` of rows that share a bucket in one of the tables, in rising
/// order; `keys` gives the keys of all rows in a table.
///
/// Of a bucket that has more than `cap` pairs, `cap` are drawn: uniform without replacement, as a
/// reservoir would keep them, but in O(cap) (Floyd's algorithm; Bentley and Floyd, "Programming
/// pearls: a sample of brilliance", CACM 1987). Step `s` of bucket `b` of table `t` is value `s` of
/// the stream whose key is value `b` of the stream of the seed, `hash.pairs` and `[t]`.
///
/// # Errors
/// [`Error::Argument`] if `cap` is out of range; what `keys` returns; [`Error::Stopped`].
pub fn sharing(
    tables: usize,
    cap: usize,
    seed: u64,
    threads: usize,
    asker: &Asker<'_>,
    keys: impl Fn(usize, &Watch<'_>) -> Result<Vec<u64>, Error> + Sync,
) -> Result<Vec<(u32, u32)>, Error> {
    in_range("cap", cap, 1, MAX_PAIRS)?;
    let states = share(tables, threads, asker, Vec::new, |found, table, watch| {
        let key = parameter_key(seed, "hash.pairs", &[table as u64]);
        for (number, rows) in Buckets::new(&keys(table, watch)?, watch)?.iter().enumerate() {
            watch.check()?;
            add(rows, cap as u64, value(key, number as u64), found);
        }
        order::sort(found, watch, Ord::cmp)?;
        order::dedup(found, watch)?;
        Ok(())
    })?;
    let watch = &Watch::of(asker);
    let states: Vec<&[_]> = states.iter().map(|state| &state[..]).collect();
    let mut all = memory::joined(&states, watch)?;
    order::sort(&mut all, watch, Ord::cmp)?;
    order::dedup(&mut all, watch)?;
    Ok(all)
}

/// Adds the pairs of a bucket, or `cap` of them.
fn add(rows: &[u32], cap: u64, key: u64, found: &mut Vec<(u32, u32)>) {
    let count = rows.len() as u64;
    let all = count * count.saturating_sub(1) / 2;
    if all <= cap {
        for (at, &high) in rows.iter().enumerate() {
            found.extend(rows[..at].iter().map(|&low| (low, high)));
        }
        return;
    }
    let mut drawn = HashSet::new();
    for (step, last) in (all - cap..all).enumerate() {
        let pair = below(value(key, step as u64), last + 1);
        let pair = if drawn.insert(pair) { pair } else { last };
        drawn.insert(pair);
        let (low, high) = unranked(pair);
        found.push((rows[low], rows[high]));
    }
}

/// Pair `number` of `(0, 1), (0, 2), (1, 2), (0, 3), …`.
fn unranked(number: u64) -> (usize, usize) {
    let high = ((8 * u128::from(number) + 1).isqrt() as u64).div_ceil(2);
    ((number - high * (high - 1) / 2) as usize, high as usize)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::stop::never;

    #[test]
    fn pairs_are_numbered_through() {
        let mut number = 0;
        for high in 1..60 {
            for low in 0..high {
                assert_eq!(unranked(number), (low, high));
                number += 1;
            }
        }
        // The last pair of 2^32 - 1 rows.
        let rows = u64::from(u32::MAX);
        assert_eq!(unranked(rows * (rows - 1) / 2 - 1), (rows as usize - 2, rows as usize - 1));
    }

    #[test]
    fn every_pair_of_a_large_bucket_is_equally_likely() {
        let rows: Vec<u32> = (0..6).collect();
        let mut counts = [0u32; 36];
        for key in 0..3000 {
            let mut found = Vec::new();
            add(&rows, 4, crate::random::mix(key), &mut found);
            assert_eq!(found.len(), 4);
            assert_eq!(found.iter().collect::<HashSet<_>>().len(), 4);
            for (low, high) in found {
                assert!(low < high);
                counts[(low * 6 + high) as usize] += 1;
            }
        }
        let counts: Vec<u32> = counts.into_iter().filter(|&count| count > 0).collect();
        assert_eq!(counts.len(), 15);
        // Binomial: 3000 * 4 / 15 = 800 and a standard deviation of 24.2; five of them.
        assert!(counts.iter().all(|count| count.abs_diff(800) < 121), "{counts:?}");
    }

    proptest! {
        #[test]
        fn small_buckets_give_all_their_pairs(
            keys in prop::collection::vec(prop::collection::vec(0u64..5, 17), 0..4),
            threads in 1usize..4,
        ) {
            let found = sharing(keys.len(), 200, 0, threads, &Asker::new(&never), |table, _| {
                Ok(keys[table].clone())
            }).unwrap();
            let mut expected = Vec::new();
            for low in 0..17u32 {
                for high in low + 1..17 {
                    if keys.iter().any(|keys| keys[low as usize] == keys[high as usize]) {
                        expected.push((low, high));
                    }
                }
            }
            prop_assert_eq!(found, expected);
        }
    }
}
