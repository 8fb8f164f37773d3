//! The nearest neighbours of each row: by the codes of rows that share a bucket, and exactly within
//! batches. Lists, never a matrix of all rows by all rows.

use std::cmp::Reverse;

use super::family::{Codes, MAX_HASHES, MAX_LEVELS, matches};
use super::index::{keys, squared};
use super::pairs::sharing;
use super::{count_rows, in_range};
use crate::error::Error;
use crate::kernels::InstructionSet;
use crate::parallel::{collect, share};
use crate::stop::{Asker, Watch};

/// The most views of a graph.
pub const MAX_VIEWS: usize = 256;
/// The most rows of a batch, whose pairs are all compared: 256 MiB of distances.
pub const MAX_BATCH: usize = 1 << 13;
/// Pairs that are compared in one job.
const PAIRS: usize = 1 << 14;

/// For each row its neighbours and their squared distances.
type Lists = Vec<Vec<(f64, u32)>>;

/// Neighbours of rows, and a weight each, as compressed sparse rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graph<W> {
    /// `[rows + 1]`: where the list of each row begins, and where the last ends.
    pub starts: Vec<u64>,
    /// The neighbours, best first, of equal ones the lower row.
    pub neighbours: Vec<u32>,
    /// The weight of each.
    pub weights: Vec<W>,
}

impl<W> Graph<W> {
    fn new() -> Self {
        Self { starts: vec![0], neighbours: Vec::new(), weights: Vec::new() }
    }

    /// Adds the list of the next row.
    fn push(&mut self, list: impl Iterator<Item = (u32, W)>) {
        for (neighbour, weight) in list {
            self.neighbours.push(neighbour);
            self.weights.push(weight);
        }
        self.starts.push(self.neighbours.len() as u64);
    }
}

/// What a graph by codes is made of.
pub struct Views<'a> {
    /// For each view the `[rows, hashes]` cells.
    pub views: &'a [Codes],
    /// How many rows there are.
    pub rows: usize,
    /// How many hashes a view has.
    pub hashes: usize,
    /// How many levels count.
    pub levels: usize,
    /// Hashes of a bucket's key; each `band` hashes are a table, as many as are whole.
    pub band: usize,
    /// How many pairs to take from a bucket.
    pub cap: usize,
    /// How many neighbours to keep.
    pub k: usize,
    /// Seed of the pairs that are taken.
    pub seed: u64,
}

/// The `k` most similar of the rows with which each row shares a bucket, in any view and level.
///
/// The similarity is the mean over views of `sum_l 2^-l m_l / sum_l 2^-l`, `m_l` the share of hashes
/// whose cells agree at level `l`. Sums are of whole numbers, so ties are exact. O(pairs · views ·
/// levels · hashes) time and O(pairs) memory; pairs are at most `cap` a bucket.
///
/// # Errors
/// [`Error::Shape`] if views do not fit; [`Error::Argument`] if a number is out of range;
/// [`Error::Stopped`].
pub fn by_codes<'a>(
    request: &Views<'a>,
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Graph<f32>, Error> {
    let &Views { rows, hashes, levels, band, .. } = request;
    in_range("views", request.views.len(), 1, MAX_VIEWS)?;
    in_range("hashes", hashes, 1, MAX_HASHES)?;
    in_range("levels", levels, 1, MAX_LEVELS)?;
    in_range("band", band, 1, hashes)?;
    in_range("rows", rows, 0, u32::MAX as usize)?;
    let cells = |view: &'a Codes| match view {
        Codes::Cells(cells) if cells.len() == rows * hashes => Ok(&cells[..]),
        Codes::Cells(cells) => {
            let must = format!("[{rows}, {hashes}]");
            Err(Error::shape("views", must, format!("{} cells", cells.len())))
        }
        Codes::Bits(_) => Err(Error::argument("views", "of p-stable codes", "sign codes")),
    };
    let views = request.views.iter().map(cells).collect::<Result<Vec<&[i32]>, _>>()?;
    let tables = hashes / band;
    let pairs = sharing(
        views.len() * levels * tables,
        request.cap,
        request.seed,
        threads,
        asker,
        |number, watch| {
            let (view, level) = (number / tables / levels, number / tables % levels);
            keys(&request.views[view], hashes, number % tables, band, level, watch)
        },
    )?;
    // Level l counts 2^(levels - 1 - l) of a whole of 2^levels - 1.
    let agreement = |&(low, high): &(u32, u32)| -> u64 {
        let (low, high) = (low as usize * hashes, high as usize * hashes);
        let of = |view: &&[i32]| -> u64 {
            (0..levels)
                .map(|level| {
                    let found = matches(&view[low..][..hashes], &view[high..][..hashes], level);
                    (found as u64) << (levels - 1 - level)
                })
                .sum()
        };
        views.iter().map(of).sum()
    };
    let work = views.len() * levels * hashes;
    let parts = collect(
        pairs.len().div_ceil(PAIRS),
        threads,
        asker,
        || (),
        |(), job, watch| {
            let pairs = &pairs[job * PAIRS..pairs.len().min((job + 1) * PAIRS)];
            let mut steps = watch.steps();
            let agreement = |pair| steps.add(work).map(|()| agreement(pair));
            pairs.iter().map(agreement).collect::<Result<Vec<u64>, Error>>()
        },
    )?;
    let agreements = parts.into_iter().flatten();
    let mut starts = vec![0usize; rows + 1];
    let mut steps = Watch::of(asker).steps();
    for &(low, high) in &pairs {
        steps.add(10)?;
        starts[low as usize + 1] += 1;
        starts[high as usize + 1] += 1;
    }
    for row in 0..rows {
        starts[row + 1] += starts[row];
    }
    let mut places = starts.clone();
    let mut lists = vec![(0u64, 0u32); 2 * pairs.len()];
    for (&(low, high), agreement) in pairs.iter().zip(agreements) {
        steps.add(20)?;
        for (row, other) in [(low, high), (high, low)] {
            lists[places[row as usize]] = (agreement, other);
            places[row as usize] += 1;
        }
    }
    let whole = (views.len() * hashes) as f64 * f64::from((1u32 << levels) - 1);
    let mut graph = Graph::new();
    for row in 0..rows {
        let list = &mut lists[starts[row]..starts[row + 1]];
        steps.add(10 + 20 * list.len())?;
        list.sort_unstable_by_key(|&(agreement, other)| (Reverse(agreement), other));
        let nearest = list.iter().take(request.k);
        graph.push(nearest.map(|&(agreement, other)| (other, (agreement as f64 / whole) as f32)));
    }
    Ok(graph)
}

/// What a graph within batches is made of.
pub struct Batches<'a> {
    /// `[rows, dim]`.
    pub values: &'a [f32],
    /// Width of a row.
    pub dim: usize,
    /// The batches, which have every row once.
    pub batches: &'a [Vec<u32>],
    /// How many neighbours to keep.
    pub k: usize,
    /// How far a neighbour may be, in medians of the batch's distances.
    pub radius: f64,
}

/// The `k` nearest rows of each row's batch, exactly, with squared distances as weights; and the
/// median distance of each batch, 0 for a batch of one row.
///
/// O(rows · batch · dim) time and, with each thread, 8 bytes for each pair of a batch.
///
/// # Errors
/// [`Error::Shape`], [`Error::NotFinite`]; [`Error::Argument`] if the batches do not have every row
/// once, one is larger than [`MAX_BATCH`], or the radius is negative or NaN; [`Error::Stopped`].
pub fn within_batches(
    request: &Batches<'_>,
    threads: usize,
    asker: &Asker<'_>,
) -> Result<(Graph<f64>, Vec<f64>), Error> {
    let &Batches { values, dim, batches, k, radius } = request;
    let rows = count_rows("rows", values, dim, &Watch::of(asker))?;
    if radius.is_nan() || radius < 0.0 {
        return Err(Error::argument("radius", "at least 0", radius));
    }
    let mut batch_of = vec![usize::MAX; rows];
    for (number, batch) in batches.iter().enumerate() {
        in_range("batch", batch.len(), 1, MAX_BATCH)?;
        for &row in batch {
            match batch_of.get_mut(row as usize) {
                Some(place) if *place == usize::MAX => *place = number,
                _ => return Err(Error::argument("batches", "of every row once", row)),
            }
        }
    }
    if let Some(row) = batch_of.iter().position(|&number| number == usize::MAX) {
        return Err(Error::argument("batches", "of every row once", format!("none of row {row}")));
    }
    let set = InstructionSet::best();
    let states = share(
        batches.len(),
        threads,
        asker,
        || (Vec::new(), Vec::new(), Vec::new()),
        |(done, squares, difference), number, watch| {
            let batch = &batches[number];
            let row = |at: usize| &values[batch[at] as usize * dim..][..dim];
            squares.clear();
            let mut steps = watch.steps();
            for at in 1..batch.len() {
                for before in 0..at {
                    steps.add(dim)?;
                    let square = squared(set, row(at), row(before), difference);
                    if !square.is_finite() {
                        return Err(Error::NotFinite {
                            argument: "distances",
                            place: format!("rows {} and {}", batch[before], batch[at]),
                            value: square,
                        });
                    }
                    squares.push(square);
                }
            }
            let square_of = |at: usize, other: usize| {
                let (low, high) = (at.min(other), at.max(other));
                squares[high * (high - 1) / 2 + low]
            };
            let median = median_root(squares, watch)?;
            let most = (radius * median) * (radius * median);
            let lists = (0..batch.len())
                .map(|at| {
                    steps.add(20 * batch.len())?;
                    let mut list: Vec<(f64, u32)> = (0..batch.len())
                        .filter(|&other| other != at)
                        .map(|other| (square_of(at, other), batch[other]))
                        // An infinite radius times a median of 0 is no number, and no bound.
                        .filter(|&(square, _)| most.is_nan() || square <= most)
                        .collect();
                    list.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
                    list.truncate(k);
                    Ok(list)
                })
                .collect::<Result<Lists, Error>>()?;
            done.push((number, lists, median));
            Ok(())
        },
    )?;
    let mut lists: Lists = vec![Vec::new(); rows];
    let mut medians = vec![0.0; batches.len()];
    for (number, found, median) in states.into_iter().flat_map(|(done, _, _)| done) {
        medians[number] = median;
        for (&row, list) in batches[number].iter().zip(found) {
            lists[row as usize] = list;
        }
    }
    let mut graph = Graph::new();
    let mut steps = Watch::of(asker).steps();
    for list in lists {
        steps.add(10 + list.len())?;
        graph.push(list.into_iter().map(|(square, row)| (row, square)));
    }
    Ok((graph, medians))
}

/// So many numbers are ordered within a millisecond, in which nobody needs to ask to stop.
const FEW: usize = 1 << 16;

/// The median of the roots of numbers that are not negative; of an even number the mean of the two
/// in the middle.
fn median_root(squares: &[f64], watch: &Watch<'_>) -> Result<f64, Error> {
    let (middle, even) = (squares.len() / 2, squares.len().is_multiple_of(2));
    if squares.is_empty() {
        return Ok(0.0);
    }
    if squares.len() <= FEW {
        let mut squares = squares.to_vec();
        let (below, &mut high, _) = squares.select_nth_unstable_by(middle, f64::total_cmp);
        let low = if even { below.iter().copied().fold(0.0, f64::max) } else { high };
        return Ok(f64::midpoint(low.sqrt(), high.sqrt()));
    }
    let high = in_order(squares, middle, watch)?.sqrt();
    if !even {
        return Ok(high);
    }
    Ok(f64::midpoint(in_order(squares, middle - 1, watch)?.sqrt(), high))
}

/// The number at a place of the order of some that are not negative, whose bits have the same order:
/// found by counting 16 bits at a time.
fn in_order(numbers: &[f64], place: usize, watch: &Watch<'_>) -> Result<f64, Error> {
    const DIGIT: u32 = 16;
    let (mut above, mut left) = (0u64, place);
    for shift in (0..u64::BITS).step_by(DIGIT as usize).rev() {
        let mut counts = vec![0usize; 1 << DIGIT];
        for numbers in numbers.chunks(1 << 14) {
            watch.check()?;
            for bits in numbers.iter().map(|number| number.to_bits() >> shift) {
                counts[(bits & 0xFFFF) as usize] += usize::from(bits >> DIGIT == above);
            }
        }
        for (digit, count) in (0u64..).zip(counts) {
            if left < count {
                above = above << DIGIT | digit;
                break;
            }
            left -= count;
        }
    }
    Ok(f64::from_bits(above))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::stop::never;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn neighbours_by_codes_are_those_of_all_pairs(
            cells in prop::collection::vec(-6i32..6, 120), views in 1usize..3, levels in 1usize..4,
            band in 1usize..4, k in 0usize..9, threads in 1usize..4,
        ) {
            let hashes = 4;
            let rows = 60 / hashes;
            let all: Vec<Vec<i32>> = (0..views).map(|v| cells[v * 60..][..60].to_vec()).collect();
            let codes: Vec<Codes> = all.iter().cloned().map(Codes::Cells).collect();
            let graph = by_codes(&Views {
                views: &codes, rows, hashes, levels, band, cap: 10_000, k, seed: 0,
            }, threads, &Asker::new(&never)).unwrap();
            prop_assert_eq!(graph.starts.len(), rows + 1);
            for row in 0..rows {
                let mut expected: Vec<(f64, u32)> = (0..rows).filter(|&other| other != row).filter_map(|other| {
                    let cell = |view: &Vec<i32>, row: usize, hash: usize, level: usize| {
                        f64::from(view[row * hashes + hash]).div_euclid(f64::from(1 << level))
                    };
                    let (mut sum, mut weights, mut shares) = (0.0, 0.0, false);
                    for view in &all {
                        for level in 0..levels {
                            let same: Vec<bool> = (0..hashes).map(|hash| {
                                cell(view, row, hash, level) == cell(view, other, hash, level)
                            }).collect();
                            let share = same.iter().filter(|&&same| same).count() as f64 / hashes as f64;
                            sum += share / f64::from(1 << level);
                            weights += 1.0 / f64::from(1 << level);
                            shares |= same.chunks_exact(band).any(|band| band.iter().all(|&same| same));
                        }
                    }
                    shares.then_some((-sum / weights, other as u32))
                }).collect();
                // To nine digits, which rounding does not reach.
                expected.sort_by_key(|pair| ((pair.0 * 1e9).round() as i64, pair.1));
                expected.truncate(k);
                let here = graph.starts[row] as usize..graph.starts[row + 1] as usize;
                let others: Vec<u32> = expected.iter().map(|pair| pair.1).collect();
                prop_assert_eq!(&graph.neighbours[here.clone()], &others[..]);
                for (weight, expected) in graph.weights[here].iter().zip(expected) {
                    prop_assert!((f64::from(*weight) + expected.0).abs() < 1e-6);
                }
            }
        }

        #[test]
        fn neighbours_within_batches_are_those_of_a_sort(
            values in prop::collection::vec(-3i8..4, 2..60), parts in 1usize..4, k in 0usize..8,
            radius in prop::sample::select(vec![0.0, 0.7, f64::INFINITY]), threads in 1usize..4,
        ) {
            // Whole numbers: distances are exact, and ties are everywhere.
            let rows = values.len() / 2;
            let values: Vec<f32> = values[..rows * 2].iter().map(|&value| f32::from(value)).collect();
            let batches: Vec<Vec<u32>> = (0..parts.min(rows))
                .map(|part| (0..rows as u32).rev().filter(|row| *row as usize % parts == part).collect())
                .collect();
            let request = Batches { values: &values, dim: 2, batches: &batches, k, radius };
            let (graph, medians) = within_batches(&request, threads, &Asker::new(&never)).unwrap();
            let square = |a: u32, b: u32| -> f64 {
                (0..2).map(|d| f64::from(values[a as usize * 2 + d] - values[b as usize * 2 + d]).powi(2)).sum()
            };
            for (batch, median) in batches.iter().zip(medians) {
                let mut all: Vec<f64> = Vec::new();
                for (at, &row) in batch.iter().enumerate() {
                    all.extend(batch[..at].iter().map(|&other| square(row, other).sqrt()));
                }
                all.sort_by(f64::total_cmp);
                let expected = match all.len() {
                    0 => 0.0,
                    len if len % 2 == 1 => all[len / 2],
                    len => f64::midpoint(all[len / 2 - 1], all[len / 2]),
                };
                prop_assert_eq!(median, expected);
                for &row in batch {
                    let mut list: Vec<(f64, u32)> = batch.iter()
                        .filter(|&&other| other != row)
                        .map(|&other| (square(row, other), other))
                        .filter(|pair| radius.is_infinite() || pair.0 <= (radius * median).powi(2))
                        .collect();
                    list.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
                    list.truncate(k);
                    let here = graph.starts[row as usize] as usize..graph.starts[row as usize + 1] as usize;
                    let found: Vec<(f64, u32)> = graph.weights[here.clone()].iter().copied()
                        .zip(graph.neighbours[here].iter().copied()).collect();
                    prop_assert_eq!(found, list);
                }
            }
        }
    }

    #[test]
    fn medians_of_few_and_of_many_are_those_of_the_order() {
        for count in [0, 1, 2, 3, 6, FEW - 1, FEW, FEW + 1, FEW + 2, 3 * FEW] {
            let squares: Vec<f64> =
                (0..count as u64).map(|i| (crate::random::value(7, i) % 50_000) as f64).collect();
            let mut roots: Vec<f64> = squares.iter().map(|square| square.sqrt()).collect();
            roots.sort_by(f64::total_cmp);
            let expected = match count {
                0 => 0.0,
                count if count % 2 == 1 => roots[count / 2],
                count => f64::midpoint(roots[count / 2 - 1], roots[count / 2]),
            };
            assert_eq!(median_root(&squares, &Watch::none()).unwrap(), expected, "{count}");
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let asker = Asker::new(&never);
        let values = [0.0, 1.0, 2.0];
        for (batches, radius) in [
            (vec![vec![0, 1]], 1.0),
            (vec![vec![0, 1], vec![1, 2]], 1.0),
            (vec![vec![0, 1, 3]], 1.0),
            (vec![vec![], vec![0, 1, 2]], 1.0),
            (vec![vec![0, 1, 2]], f64::NAN),
            (vec![vec![0, 1, 2]], -1.0),
        ] {
            let request = Batches { values: &values, dim: 1, batches: &batches, k: 1, radius };
            assert!(matches!(within_batches(&request, 1, &asker), Err(Error::Argument { .. })));
        }
        let views = [Codes::Cells(vec![0; 8])];
        let good =
            Views { views: &views, rows: 4, hashes: 2, levels: 1, band: 2, cap: 9, k: 1, seed: 0 };
        assert!(by_codes(&good, 1, &asker).is_ok());
        for wrong in [
            Views { views: &[], ..good },
            Views { views: &[Codes::Bits(vec![0; 8])], ..good },
            Views { rows: 5, ..good },
            Views { rows: usize::MAX, ..good },
            Views { hashes: 0, ..good },
            Views { levels: 0, ..good },
            Views { levels: 40, ..good },
            Views { band: 3, ..good },
            Views { band: 0, ..good },
            Views { cap: 0, ..good },
            Views { cap: usize::MAX, ..good },
        ] {
            assert!(by_codes(&wrong, 1, &asker).is_err());
        }
    }
}
