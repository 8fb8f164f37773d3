//! The buckets next to a query's own, cheapest perturbation first.
//!
//! A perturbation changes some hashes of a table's key; its cost is the sum of the squared distances
//! from the query's projections to the borders that are crossed (Lv et al., "Multi-probe LSH:
//! efficient indexing for high-dimensional similarity search", VLDB 2007). Sets of changes come in
//! rising order of cost over all tables from one heap: from each set two follow, which cost no less,
//! and every set follows from exactly one.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// The most changes a table can have: sets of them are words of 64 bits.
pub const MAX_CHANGES: usize = 64;

/// A change of one hash of a key.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// The hash, counted within its table.
    pub hash: usize,
    /// What is added to its cell; a bit is flipped by either.
    pub step: i32,
    /// The squared distance to the border.
    pub cost: f32,
}

/// Sets of changes by rising cost, the empty sets of all tables first.
pub struct Probes {
    /// For each table its changes, cheapest first.
    tables: Vec<Vec<Change>>,
    heap: BinaryHeap<Next>,
}

/// A set of changes of a table: bit `i` is the `i`-th cheapest.
#[derive(PartialEq)]
struct Next {
    cost: f32,
    table: usize,
    set: u64,
}

impl Eq for Next {}

impl Ord for Next {
    /// The greatest is the cheapest; of equal ones that of the lower table, then the lower set.
    fn cmp(&self, other: &Self) -> Ordering {
        let by_cost = other.cost.total_cmp(&self.cost);
        by_cost.then(other.table.cmp(&self.table)).then(other.set.cmp(&self.set))
    }
}

impl PartialOrd for Next {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Probes {
    /// The probes of tables with these changes, of which each has at most [`MAX_CHANGES`].
    #[must_use]
    pub fn new(mut tables: Vec<Vec<Change>>) -> Self {
        for changes in &mut tables {
            changes.sort_by(|a, b| a.cost.total_cmp(&b.cost));
            changes.truncate(MAX_CHANGES);
        }
        let heap = (0..tables.len()).map(|table| Next { cost: 0.0, table, set: 0 }).collect();
        Self { tables, heap }
    }

    fn push(&mut self, table: usize, set: u64) {
        let cost = bits(set).map(|at| self.tables[table][at].cost).sum();
        self.heap.push(Next { cost, table, set });
    }
}

impl Iterator for Probes {
    /// A table and the changes of its key.
    type Item = (usize, Vec<Change>);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Next { table, set, .. } = self.heap.pop()?;
            // The last change is replaced by the one after it, or that is added.
            let after = bits(set).last().map_or(0, |last| last + 1);
            if after < self.tables[table].len() {
                if set != 0 {
                    self.push(table, set ^ (3 << (after - 1)));
                }
                self.push(table, set | 1 << after);
            }
            let changes: Vec<Change> = bits(set).map(|at| self.tables[table][at]).collect();
            // A cell moves one way only.
            let twice = |change: &Change| changes.iter().filter(|c| c.hash == change.hash).count();
            if changes.iter().all(|change| twice(change) == 1) {
                return Some((table, changes));
            }
        }
    }
}

/// The places of the ones, from the lowest up.
fn bits(set: u64) -> impl Iterator<Item = usize> {
    (0..64).filter(move |at| set >> at & 1 == 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_set_comes_once_by_rising_cost(
            costs in prop::collection::vec(prop::collection::vec(0u8..9, 0..6), 1..4),
            both in any::<bool>(),
        ) {
            // Two changes of each hash, one of which a set may have, or one.
            let ways = 1 + usize::from(both);
            let tables: Vec<Vec<Change>> = costs
                .iter()
                .map(|costs| {
                    costs.iter().enumerate().flat_map(|(hash, &cost)| {
                        (0..ways).map(move |way| Change {
                            hash,
                            step: if way == 0 { 1 } else { -1 },
                            cost: f32::from(cost) + way as f32,
                        })
                    }).collect()
                })
                .collect();
            let all: Vec<(usize, Vec<Change>)> = Probes::new(tables).collect();
            let expected: usize =
                costs.iter().map(|costs| (1 + ways).pow(costs.len() as u32)).sum();
            prop_assert_eq!(all.len(), expected);
            let total = |changes: &[Change]| changes.iter().map(|c| c.cost).sum::<f32>();
            prop_assert!(all.is_sorted_by(|a, b| total(&a.1) <= total(&b.1)));
            let mut seen: Vec<(usize, Vec<(usize, i32)>)> = all
                .into_iter()
                .map(|(table, changes)| {
                    let mut changes: Vec<_> = changes.iter().map(|c| (c.hash, c.step)).collect();
                    changes.sort_unstable();
                    (table, changes)
                })
                .collect();
            seen.sort();
            seen.dedup();
            prop_assert_eq!(seen.len(), expected);
        }
    }
}
