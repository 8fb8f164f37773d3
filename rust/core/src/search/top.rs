//! The best examples so far.

use std::cmp::Ordering;

use super::{Ends, Hit, Sides};
use crate::error::Error;
use crate::order;
use crate::stop::Watch;

/// The side of the largest scores.
pub(crate) const LARGEST: usize = 0;
/// The side of the smallest scores.
pub(crate) const SMALLEST: usize = 1;

/// Larger score first, then lower example.
fn by_largest(a: &Hit, b: &Hit) -> Ordering {
    b.score.total_cmp(&a.score).then(a.example.cmp(&b.example))
}

/// Smaller score first, then lower example.
fn by_smallest(a: &Hit, b: &Hit) -> Ordering {
    a.score.total_cmp(&b.score).then(a.example.cmp(&b.example))
}

/// The candidates of one query for the ends that are wanted; examples may come in any order.
#[derive(Clone, Debug)]
pub(crate) struct Sieve {
    /// A score must be as large to be among the largest.
    pub(crate) above: f32,
    /// A score must be as small to be among the smallest.
    pub(super) below: f32,
    largest: Vec<Hit>,
    smallest: Vec<Hit>,
}

impl Sieve {
    pub(crate) fn new(sides: Sides) -> Self {
        let open = |wanted: bool| if wanted { f32::NEG_INFINITY } else { f32::INFINITY };
        Self {
            above: open(sides.largest),
            below: -open(sides.smallest),
            largest: Vec::new(),
            smallest: Vec::new(),
        }
    }

    /// One that knows what an example must reach, and has none.
    pub(super) fn emptied(&self) -> Self {
        Self { largest: Vec::new(), smallest: Vec::new(), ..*self }
    }

    /// What the size of a score must reach to matter: the lower of both ends' thresholds, with
    /// those that were found so far looked at once more.
    pub(super) fn threshold(&mut self, k: usize) -> f32 {
        if let Some(above) = keep(&mut self.largest, k, LARGEST) {
            self.above = above;
        }
        if let Some(below) = keep(&mut self.smallest, k, SMALLEST) {
            self.below = below;
        }
        self.above.min(-self.below)
    }

    /// Adds an example, once; of which the first `k` will be asked for.
    pub(crate) fn add(&mut self, hit: Hit, k: usize) {
        // Zeros of both signs are one score.
        let hit = Hit { score: hit.score + 0.0, ..hit };
        let full = k.saturating_mul(2).max(64);
        if hit.score >= self.above {
            self.largest.push(hit);
            if self.largest.len() >= full {
                self.above = keep(&mut self.largest, k, LARGEST).unwrap_or(self.above);
            }
        }
        if hit.score <= self.below {
            self.smallest.push(hit);
            if self.smallest.len() >= full {
                self.below = keep(&mut self.smallest, k, SMALLEST).unwrap_or(self.below);
            }
        }
    }

    /// Takes what another has found.
    pub(super) fn merge(&mut self, other: Self) {
        self.largest.extend(other.largest);
        self.smallest.extend(other.smallest);
    }

    pub(crate) fn finish(self, k: usize, watch: &Watch<'_>) -> Result<Ends, Error> {
        Ok(Ends {
            largest: finish(self.largest, k, LARGEST, watch)?,
            smallest: finish(self.smallest, k, SMALLEST, watch)?,
        })
    }
}

/// The order of a side.
fn order_of(side: usize) -> fn(&Hit, &Hit) -> Ordering {
    [by_largest, by_smallest][side]
}

/// Keeps the first `k` of a side, the last of them at its place, and returns that one's score if
/// others went.
pub(crate) fn keep(hits: &mut Vec<Hit>, k: usize, side: usize) -> Option<f32> {
    let last = k.checked_sub(1)?;
    if last < hits.len() {
        hits.select_nth_unstable_by(last, order_of(side));
        hits.truncate(k);
        return Some(hits[last].score);
    }
    None
}

/// The first `k` of a side, in order.
pub(crate) fn finish(
    mut hits: Vec<Hit>,
    k: usize,
    side: usize,
    watch: &Watch<'_>,
) -> Result<Vec<Hit>, Error> {
    keep(&mut hits, k, side);
    order::sort(&mut hits, watch, order_of(side))?;
    hits.truncate(k);
    Ok(hits)
}

/// A whole number for a score: in the order of scores, from that of the least NaN to the greatest.
pub(super) fn rank(score: f32) -> u32 {
    let bits = score.to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

/// The score of a whole number.
pub(super) fn of_rank(rank: u32) -> f32 {
    f32::from_bits(if rank >> 31 == 1 { rank ^ 1 << 31 } else { !rank })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranks_are_in_the_order_of_scores(a in any::<u32>(), b in any::<u32>()) {
            let (a, b) = (f32::from_bits(a), f32::from_bits(b));
            prop_assert_eq!(rank(a).cmp(&rank(b)), a.total_cmp(&b));
            prop_assert_eq!(of_rank(rank(a)).to_bits(), a.to_bits());
        }
    }
}
