//! Seeded orders.

use crate::error::Error;
use crate::random::{parameter_key, value};
use crate::stop::Watch;

/// A number below `n` from 64 random bits; uniform, but for `n / 2^64`.
#[must_use]
pub(super) fn below(bits: u64, n: u64) -> u64 {
    ((u128::from(bits) * u128::from(n)) >> 64) as u64
}

/// Puts things into a random order (Fisher and Yates): step `i` swaps places `i` and
/// `i + (value i * (n - i)) >> 64`, of the product of 128 bits, in the stream of the seed, this
/// name and no shape.
///
/// # Errors
/// [`Error::Stopped`].
pub fn shuffle<T>(things: &mut [T], seed: u64, name: &str, watch: &Watch<'_>) -> Result<(), Error> {
    let key = parameter_key(seed, name, &[]);
    let mut steps = watch.steps();
    for step in 0..things.len() {
        steps.add(10)?;
        let left = (things.len() - step) as u64;
        things.swap(step, step + below(value(key, step as u64), left) as usize);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_orders_are_equally_likely() {
        let mut counts = [0u32; 27];
        for seed in 0..6000 {
            let mut things = [0usize, 1, 2];
            shuffle(&mut things, seed, "t", &Watch::none()).unwrap();
            counts[things[0] * 9 + things[1] * 3 + things[2]] += 1;
        }
        let counts: Vec<u32> = counts.into_iter().filter(|&count| count > 0).collect();
        assert_eq!(counts.len(), 6);
        // Binomial: 1000 and a standard deviation of 28.9; five of them.
        assert!(counts.iter().all(|count| count.abs_diff(1000) < 145), "{counts:?}");
        shuffle::<u8>(&mut [], 0, "t", &Watch::none()).unwrap();
    }
}
