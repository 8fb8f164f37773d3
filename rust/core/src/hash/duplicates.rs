//! Groups of rows that are nearly the same.

use super::buckets::Buckets;
use super::family::{Family, Hash};
use super::in_range;
use super::index::{keys, value_keys, whole_keys};
use super::pairs::sharing;
use crate::error::Error;
use crate::kernels::InstructionSet;
use crate::parallel::share;
use crate::stop::{Asker, Watch};

/// Pairs that are compared in one job, at most, and values of theirs.
const PAIRS: usize = 1 << 12;
const VALUES: usize = 1 << 22;

/// For each row the lowest row of its group: the connected components of pairs whose cosine is at
/// least `threshold`, among those that share a bucket of `band` bits, at most `cap` of each, and
/// those next to each other among rows of one code, or of the same values.
///
/// Two rows at the angle `t` share a bucket with probability `1 - (1 - (1 - t / pi)^band)^tables`,
/// so a pair can be missed; none is made up, and rows that are the same are always together. The
/// cosine of two rows of zeros is 1, of one and another row 0. O(rows · hashes + pairs · dim).
///
/// # Errors
/// As [`Hash::codes`]; [`Error::Argument`] if a number is out of range or the hashes are no signs;
/// [`Error::NotFinite`] if a product is not.
pub fn groups(
    hash: &Hash,
    rows: &[f32],
    band: usize,
    threshold: f64,
    cap: usize,
    seed: u64,
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Vec<u32>, Error> {
    if hash.family() != Family::Sign {
        return Err(Error::argument("family", "sign", "another"));
    }
    if !(threshold > 0.0 && threshold <= 1.0) {
        return Err(Error::argument("threshold", "above 0 and at most 1", threshold));
    }
    in_range("band", band, 1, hash.hashes().min(64))?;
    let codes = hash.codes(rows, threads, asker)?;
    let (dim, width) = (hash.dim(), hash.code_len());
    let mut pairs = sharing(hash.hashes() / band, cap, seed, threads, asker, |table, watch| {
        keys(&codes, width, table, band, 0, watch)
    })?;
    let watch = &Watch::of(asker);
    let mut steps = watch.steps();
    for keys in [whole_keys(&codes, width, watch)?, value_keys(rows, dim, watch)?] {
        for rows in Buckets::new(&keys, watch)?.iter() {
            steps.add(rows.len())?;
            pairs.extend(rows.windows(2).map(|pair| (pair[0], pair[1])));
        }
    }
    let set = InstructionSet::best();
    let norm = |row: &[f32]| steps.add(row.len()).map(|()| set.squares(row));
    let norms = rows.chunks_exact(dim).map(norm).collect::<Result<Vec<f64>, Error>>()?;
    let step = (VALUES / dim).clamp(1, PAIRS);
    let states = share(pairs.len().div_ceil(step), threads, asker, Vec::new, |near, job, _| {
        let pairs = &pairs[job * step..pairs.len().min((job + 1) * step)];
        let mut products = vec![0.0; pairs.len()];
        set.dots_of_pairs(rows, rows, dim, pairs, &mut products);
        for (&(low, high), product) in pairs.iter().zip(products) {
            if !product.is_finite() {
                return Err(Error::NotFinite {
                    argument: "products",
                    place: format!("rows {low} and {high}"),
                    value: f64::from(product),
                });
            }
            let (left, right) = (low as usize * dim, high as usize * dim);
            let same = || rows[left..][..dim] == rows[right..][..dim];
            let norm = (norms[low as usize] * norms[high as usize]).sqrt();
            if (norm > 0.0 && f64::from(product) >= threshold * norm) || same() {
                near.push((low, high));
            }
        }
        Ok(())
    })?;
    // Each row points to a lower one of its group, or to itself; so do their groups after a union.
    let mut lower: Vec<u32> = (0..norms.len() as u32).collect();
    let mut steps = watch.steps();
    for (low, high) in states.into_iter().flatten() {
        steps.add(20)?;
        let (low, high) = (lowest(&mut lower, low), lowest(&mut lower, high));
        lower[low.max(high) as usize] = low.min(high);
    }
    for row in 0..lower.len() {
        steps.add(1)?;
        lower[row] = lower[lower[row] as usize];
    }
    Ok(lower)
}

/// The lowest row of a row's group; halves the way there.
fn lowest(lower: &mut [u32], mut row: u32) -> u32 {
    while lower[row as usize] != row {
        let next = lower[row as usize];
        lower[row as usize] = lower[next as usize];
        row = next;
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stop::never;

    #[test]
    fn rows_that_are_the_same_are_always_together() {
        // 500 rows of four kinds in turn, zeros among them: far more pairs than are drawn.
        let kinds = [[1.0, 0.0, 2.0], [0.0; 3], [-1.0, 3.0, 0.5], [0.2, -0.1, 0.0]];
        let rows: Vec<f32> = (0..500).flat_map(|row| kinds[row * row % 7 % 4]).collect();
        // Few bits, so that rows of unlike values have one code.
        let hash = Hash::new(Family::Sign, 3, 2, 0, 0, &Watch::none()).unwrap();
        let asker = Asker::new(&never);
        for threads in [1, 3] {
            let found = groups(&hash, &rows, 2, 1.0, 2, 0, threads, &asker).unwrap();
            for (row, &group) in found.iter().enumerate() {
                let kind = row * row % 7 % 4;
                let first = (0..500).find(|first| first * first % 7 % 4 == kind);
                assert_eq!(Some(group as usize), first);
            }
        }
    }

    #[test]
    fn groups_are_connected_components() {
        // Directions 0.1 apart on a circle, with a gap: a chain holds together, a gap does not.
        let angles = [0.0f32, 0.1, 0.2, 0.3, 1.0, 1.1, 2.0];
        let rows: Vec<f32> = angles.iter().flat_map(|t| [3.0 * t.cos(), 3.0 * t.sin()]).collect();
        let hash = Hash::new(Family::Sign, 2, 64, 0, 0, &Watch::none()).unwrap();
        let asker = Asker::new(&never);
        let found = groups(&hash, &rows, 2, f64::from(0.11f32.cos()), 99, 0, 1, &asker).unwrap();
        assert_eq!(found, [0, 0, 0, 0, 4, 4, 6]);
        assert!(groups(&hash, &[], 2, 0.9, 9, 0, 1, &asker).unwrap().is_empty());
        assert!(groups(&hash, &rows, 0, 0.9, 9, 0, 1, &asker).is_err());
        assert!(groups(&hash, &rows, 2, 0.0, 9, 0, 1, &asker).is_err());
        assert!(groups(&hash, &rows, 2, f64::NAN, 9, 0, 1, &asker).is_err());
        assert!(groups(&hash, &[f32::MAX; 2], 2, 0.9, 9, 0, 1, &asker).is_err());
    }
}
