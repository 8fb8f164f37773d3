//! Sorting that can be stopped.

use std::cmp::Ordering;

use crate::error::Error;
use crate::memory;
use crate::stop::Watch;

/// Values that are sorted, or merged, between two looks at the watch.
const RUN: usize = 1 << 16;

/// Sorts values by a total order; those that are equal by it come in no order.
///
/// O(values · log values) time; another array of the same size if there are many, runs of which are
/// sorted and then merged, run by run.
///
/// # Errors
/// [`Error::Stopped`]; the values are then in no order, and some may be there twice.
pub fn sort<T: Copy>(
    values: &mut Vec<T>,
    watch: &Watch<'_>,
    order: impl Fn(&T, &T) -> Ordering,
) -> Result<(), Error> {
    for run in values.chunks_mut(RUN) {
        watch.check()?;
        run.sort_unstable_by(&order);
    }
    if values.len() <= RUN {
        return Ok(());
    }
    let mut spare = memory::copied(values, watch)?;
    let mut width = RUN;
    while width < values.len() {
        for (from, to) in values.chunks(2 * width).zip(spare.chunks_mut(2 * width)) {
            merge(from.split_at(width.min(from.len())), to, watch, &order)?;
        }
        std::mem::swap(values, &mut spare);
        width *= 2;
    }
    Ok(())
}

/// Removes all but one of values that are the same and lie next to each other. O(values).
///
/// # Errors
/// [`Error::Stopped`]; the values are then any of those that were there.
pub fn dedup<T: Copy + PartialEq>(values: &mut Vec<T>, watch: &Watch<'_>) -> Result<(), Error> {
    let mut kept = 0;
    for at in 0..values.len() {
        if at % RUN == 0 {
            watch.check()?;
        }
        if kept == 0 || values[at] != values[kept - 1] {
            values[kept] = values[at];
            kept += 1;
        }
    }
    values.truncate(kept);
    Ok(())
}

/// Puts two sorted parts together in `to`.
fn merge<T: Copy>(
    (left, right): (&[T], &[T]),
    to: &mut [T],
    watch: &Watch<'_>,
    order: impl Fn(&T, &T) -> Ordering,
) -> Result<(), Error> {
    let (mut at, mut other) = (0, 0);
    for to in to.chunks_mut(RUN) {
        watch.check()?;
        for to in to {
            let first = match (left.get(at), right.get(other)) {
                (Some(a), Some(b)) => order(a, b) != Ordering::Greater,
                (a, _) => a.is_some(),
            };
            (*to, at, other) =
                if first { (left[at], at + 1, other) } else { (right[other], at, other + 1) };
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::random;
    use crate::stop::Asker;

    #[test]
    fn values_come_in_order_however_many() {
        for count in [0, 1, 1000, RUN, RUN + 1, 3 * RUN, 4 * RUN, 5 * RUN + 7] {
            // Many are the same.
            let values = (0..count as u64).map(|at| (random::value(7, at) % 50_000, at % 3));
            let mut values: Vec<_> = values.collect();
            let mut expected = values.clone();
            expected.sort_unstable();
            sort(&mut values, &Watch::none(), Ord::cmp).unwrap();
            assert_eq!(values, expected);
            expected.reverse();
            sort(&mut values, &Watch::none(), |a, b| b.cmp(a)).unwrap();
            assert_eq!(values, expected);
            let distinct: BTreeSet<_> = values.iter().copied().collect();
            dedup(&mut values, &Watch::none()).unwrap();
            assert!(values.iter().eq(distinct.iter().rev()));
        }
    }

    #[test]
    fn can_be_stopped() {
        let yes = || true;
        let asker = Asker::new(&yes);
        std::thread::sleep(std::time::Duration::from_millis(60));
        let found = sort(&mut vec![2, 1], &Watch::of(&asker), Ord::cmp);
        assert!(matches!(found, Err(Error::Stopped)));
    }
}
