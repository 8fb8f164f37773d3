//! Candidates by code, rescored exactly.
//!
//! Rows are ranked by an estimate from the query's projections, which are not rounded, and the
//! rows' codes, which are: for sign codes the sum of the query's projections with the signs of the
//! row's, for cells minus the squared distance from the query's positions to the middles of the
//! row's cells. (That one side need not be rounded: Dong, Charikar and Li, "Asymmetric distance
//! estimation with sketches for similarity search in high-dimensional spaces", SIGIR 2008.) The
//! first of them are scored exactly.
//!
//! What was tried beside the sum as it is, on 20,000 unit rows of sketched gradients, with 300
//! queries and one seed: rows decoded from their signs by least squares find less, of 64, 256 and
//! 512 bits. The mean or the medians taken from the rows before their signs, and the sum divided by
//! what it is for the row itself, find less among plain rows, and among whitened ones less or as
//! much. Independent directions find less than orthogonal ones among whitened rows; among plain ones
//! neither is always ahead.

use super::buckets::Buckets;
use super::family::{Codes, Family, Hash};
use super::probe::{Change, MAX_CHANGES, Probes};
use super::{count_rows, in_range};
use crate::error::Error;
use crate::kernels::InstructionSet;
use crate::order;
use crate::parallel::collect;
use crate::random::absorb;
use crate::search::Hit;
use crate::search::top::{self, LARGEST, SMALLEST};
use crate::stop::{Asker, Watch};

/// The most buckets that are looked up for a query.
pub const MAX_PROBES: usize = 1 << 16;
/// Rows that are estimated together, between two looks at the watch: 128 KiB of codes of 512 bits.
const STEP: usize = 1 << 11;
/// Values of rows that are scored between two looks at the watch.
const VALUES: usize = 1 << 20;
/// Sums of a word of a code: 256 for each byte.
const WORD_SUMS: usize = 8 * 256;

/// The codes of rows, and buckets of parts of the codes.
pub struct Index {
    hash: Hash,
    codes: Codes,
    rows: usize,
    /// Hashes of a bucket's key.
    band: usize,
    tables: Vec<Buckets>,
}

/// What to search for.
pub struct Request<'a> {
    /// `[rows, dim]`: the rows of the index, for exact scores.
    pub rows: &'a [f32],
    /// `[queries, dim]`.
    pub queries: &'a [f32],
    /// How many hits to return; at most the candidates there are.
    pub k: usize,
    /// How many rows to score exactly.
    pub candidates: usize,
    /// How many buckets to look up for each query; none: all rows are estimated.
    pub probes: Option<usize>,
    /// Whether the smallest scores are wanted.
    pub smallest: bool,
}

/// What was found for a query.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// The best first; of equal scores the lower row.
    pub hits: Vec<Hit>,
    /// How many rows were scored exactly.
    pub rescored: usize,
}

impl Index {
    /// The index of rows. With a `band`, each `band` hashes in order are the key of a table of
    /// buckets, as many as are whole.
    ///
    /// O(rows · hashes) memory in bits, or words of 32 for cells, and 12 bytes a row and table, and
    /// 16 more for a bucket.
    ///
    /// # Errors
    /// As [`Hash::codes`]; [`Error::Argument`] if `band` is out of range.
    pub fn new(
        hash: Hash,
        rows: &[f32],
        band: Option<usize>,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Self, Error> {
        let count = count_rows("rows", rows, hash.dim(), &Watch::of(asker))?;
        let most = match hash.family() {
            Family::Sign => MAX_CHANGES,
            Family::PStable { .. } => MAX_CHANGES / 2,
        };
        let band =
            band.map(|band| in_range("band", band, 1, most.min(hash.hashes()))).transpose()?;
        let codes = hash.codes(rows, threads, asker)?;
        let numbers = 0..band.map_or(0, |band| hash.hashes() / band);
        let tables = collect(
            numbers.len(),
            threads,
            asker,
            || (),
            |(), table, watch| {
                let keys = keys(&codes, hash.code_len(), table, band.unwrap_or(1), 0, watch)?;
                Buckets::new(&keys, watch)
            },
        )?;
        Ok(Self { hash, codes, rows: count, band: band.unwrap_or(0), tables })
    }

    /// The hash functions.
    #[must_use]
    pub fn hash(&self) -> &Hash {
        &self.hash
    }

    /// How many rows there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// The codes of the rows.
    #[must_use]
    pub fn codes(&self) -> &Codes {
        &self.codes
    }

    /// How many tables of buckets there are.
    #[must_use]
    pub fn tables(&self) -> usize {
        self.tables.len()
    }

    /// The rows of each query with the largest, or smallest, scores among its candidates.
    ///
    /// The score is the inner product for sign hashes, and minus the Euclidean distance for p-stable
    /// ones. A query whose buckets hold fewer than `k` rows is answered as if `probes` were none, so
    /// that every query has `min(k, candidates, rows)` hits. O(rows · hashes / 8) for sign hashes, or
    /// O(rows · hashes), without `probes`, and O(candidates · dim), for each query.
    ///
    /// # Errors
    /// [`Error::Shape`] if arrays do not fit; [`Error::Argument`] if `probes` is out of range, there
    /// are no buckets to probe, or farthest rows are asked of buckets; [`Error::NotFinite`] if a
    /// value or a score is not; [`Error::Stopped`].
    pub fn search(
        &self,
        request: &Request<'_>,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Vec<Found>, Error> {
        let dim = self.hash.dim();
        if self.rows.checked_mul(dim) != Some(request.rows.len()) {
            let must = format!("[{}, {dim}], as indexed", self.rows);
            return Err(Error::shape("rows", must, format!("{} values", request.rows.len())));
        }
        if let Some(probes) = request.probes {
            in_range("probes", probes, 1, MAX_PROBES)?;
            if self.tables.is_empty() {
                return Err(Error::argument("probes", "none for an index without band", probes));
            }
            if request.smallest && self.hash.family() != Family::Sign {
                let must = "none for the smallest scores of p-stable hashes";
                return Err(Error::argument("probes", must, probes));
            }
        }
        let queries = count_rows("queries", request.queries, dim, &Watch::of(asker))?;
        let projections = self.hash.project(request.queries, threads, asker)?;
        collect(queries, threads, asker, Worker::default, |worker, query, watch| {
            let projections = &projections[query * self.hash.hashes()..][..self.hash.hashes()];
            worker.rank(self, request, projections, watch)?;
            worker.score(self, request, query, watch)
        })
    }
}

/// The key of each row in table `table` of a level: the bits of the band, or its cells, mixed.
pub(super) fn keys(
    codes: &Codes,
    code_len: usize,
    table: usize,
    band: usize,
    level: usize,
    watch: &Watch<'_>,
) -> Result<Vec<u64>, Error> {
    let first = table * band;
    match codes {
        Codes::Bits(bits) => each(bits, code_len, watch, |code| bits_at(code, first, band)),
        Codes::Cells(cells) => each(cells, code_len, watch, |code| {
            mixed(code[first..][..band].iter().map(|cell| cell >> level))
        }),
    }
}

/// What a function says of each code.
fn each<T>(
    codes: &[T],
    code_len: usize,
    watch: &Watch<'_>,
    of: impl Fn(&[T]) -> u64,
) -> Result<Vec<u64>, Error> {
    let mut steps = watch.steps();
    let codes = codes.chunks_exact(code_len);
    codes.map(|code| steps.add(10 + code.len()).map(|()| of(code))).collect()
}

/// The key of a row's whole code.
pub(super) fn whole_keys(
    codes: &Codes,
    code_len: usize,
    watch: &Watch<'_>,
) -> Result<Vec<u64>, Error> {
    match codes {
        Codes::Bits(bits) => {
            each(bits, code_len, watch, |code| code.iter().fold(0, |key, &word| absorb(key, word)))
        }
        Codes::Cells(cells) => each(cells, code_len, watch, |code| mixed(code.iter().copied())),
    }
}

/// The key of each row's values; zeros of both signs are one value.
pub(super) fn value_keys(rows: &[f32], dim: usize, watch: &Watch<'_>) -> Result<Vec<u64>, Error> {
    each(rows, dim, watch, |row| {
        row.iter().fold(0, |key, value| absorb(key, u64::from((value + 0.0).to_bits())))
    })
}

/// Cells as one key. Two keys of unlike cells are the same once in 2^64.
fn mixed(cells: impl Iterator<Item = i32>) -> u64 {
    cells.fold(0, |key, cell| absorb(key, u64::from(cell.cast_unsigned())))
}

/// `count` bits, at most 64, from bit `first` on.
fn bits_at(code: &[u64], first: usize, count: usize) -> u64 {
    let (word, bit) = (first / 64, first % 64);
    let low = code[word] >> bit;
    let high = if bit + count > 64 { code[word + 1] << (64 - bit) } else { 0 };
    (low | high) & (u64::MAX >> (64 - count))
}

/// What a thread keeps between queries.
#[derive(Default)]
struct Worker {
    estimator: Vec<f32>,
    /// Rows and what their scores are estimated to be, up to what all rows have in common.
    ranked: Vec<Hit>,
    /// For each row whether the query has seen it.
    seen: Vec<bool>,
    rows: Vec<u32>,
    pairs: Vec<(u32, u32)>,
    scores: Vec<f32>,
}

impl Worker {
    /// The candidates of a query, in no order, in `ranked`.
    fn rank(
        &mut self,
        index: &Index,
        request: &Request<'_>,
        projections: &[f32],
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        let turn = if request.smallest { -1.0 } else { 1.0 };
        self.estimator.clear();
        match index.hash.family() {
            Family::Sign => {
                self.estimator.extend(projections.iter().map(|projection| projection * turn));
            }
            Family::PStable { .. } => self.estimator.extend_from_slice(projections),
        }
        self.rows.clear();
        if let Some(probes) = request.probes {
            self.probe(index, probes, watch)?;
        }
        let wanted = request.k.min(request.candidates).min(index.rows);
        if self.rows.len() < wanted || request.probes.is_none() {
            self.rows.clear();
            self.rows.extend(0..index.rows as u32);
        }
        self.ranked.clear();
        // A candidate of few has its place whatever its estimate.
        if self.rows.len() <= request.candidates {
            self.ranked
                .extend(self.rows.iter().map(|&row| Hit { example: u64::from(row), score: 0.0 }));
            return Ok(());
        }
        if let Codes::Bits(_) = index.codes {
            tabulate(&mut self.estimator);
        }
        let width = index.hash.code_len();
        for rows in self.rows.chunks(STEP) {
            watch.check()?;
            self.scores.clear();
            self.scores.resize(rows.len(), 0.0);
            match &index.codes {
                Codes::Bits(bits) => {
                    let (sums, _) = self.estimator.as_chunks::<WORD_SUMS>();
                    // Word by word: the sums of one fit the first cache, those of all do not.
                    for (word, sums) in sums.iter().enumerate() {
                        for (score, &row) in self.scores.iter_mut().zip(rows) {
                            *score += tabulated(sums, bits[row as usize * width + word]);
                        }
                    }
                }
                Codes::Cells(cells) => {
                    for (score, &row) in self.scores.iter_mut().zip(rows) {
                        let cells = &cells[row as usize * width..][..width];
                        *score = -turn * squared_distance(&self.estimator, cells);
                    }
                }
            }
            let hits = rows.iter().zip(&self.scores);
            let hits = hits.map(|(&row, &score)| Hit { example: u64::from(row), score });
            self.ranked.extend(hits);
        }
        top::keep(&mut self.ranked, request.candidates, LARGEST);
        Ok(())
    }

    /// The rows in the cheapest `probes` buckets, in `rows`.
    fn probe(&mut self, index: &Index, probes: usize, watch: &Watch<'_>) -> Result<(), Error> {
        self.seen.resize(index.rows, false);
        let band = index.band;
        let positions = self.estimator.chunks_exact(band);
        let changes = positions.clone().map(|positions| match index.hash.family() {
            Family::Sign => bit_changes(positions),
            Family::PStable { .. } => cell_changes(positions),
        });
        for (table, changes) in Probes::new(changes.collect()).take(probes) {
            watch.check()?;
            let positions = &self.estimator[table * band..][..band];
            let key = match index.hash.family() {
                Family::Sign => {
                    changes.iter().fold(bits_of(positions), |key, change| key ^ 1 << change.hash)
                }
                Family::PStable { .. } => mixed(positions.iter().enumerate().map(|(hash, at)| {
                    let step = changes.iter().find(|change| change.hash == hash);
                    (at.floor() as i32).wrapping_add(step.map_or(0, |change| change.step))
                })),
            };
            for &row in index.tables[table].of(key) {
                if !std::mem::replace(&mut self.seen[row as usize], true) {
                    self.rows.push(row);
                }
            }
            if self.rows.len() == index.rows {
                break;
            }
        }
        for &row in &self.rows {
            self.seen[row as usize] = false;
        }
        Ok(())
    }

    /// The best of the ranked rows by their exact scores.
    fn score(
        &mut self,
        index: &Index,
        request: &Request<'_>,
        query: usize,
        watch: &Watch<'_>,
    ) -> Result<Found, Error> {
        let dim = index.hash.dim();
        let set = InstructionSet::best();
        // In the order they lie in.
        order::sort(&mut self.ranked, watch, |a, b| a.example.cmp(&b.example))?;
        self.pairs.clear();
        self.pairs.extend(self.ranked.iter().map(|hit| (hit.example as u32, query as u32)));
        self.scores.clear();
        self.scores.resize(self.pairs.len(), 0.0);
        let mut difference = Vec::with_capacity(dim);
        let step = VALUES / dim + 1;
        for (pairs, scores) in self.pairs.chunks(step).zip(self.scores.chunks_mut(step)) {
            watch.check()?;
            match index.hash.family() {
                Family::Sign => {
                    let Request { rows, queries, .. } = request;
                    set.dots_of_pairs(rows, queries, dim, pairs, scores);
                }
                Family::PStable { .. } => {
                    let query = &request.queries[query * dim..][..dim];
                    for (score, &(row, _)) in scores.iter_mut().zip(pairs) {
                        let row = &request.rows[row as usize * dim..][..dim];
                        *score = -squared(set, row, query, &mut difference).sqrt() as f32;
                    }
                }
            }
        }
        if let Some(at) = self.scores.iter().position(|score| !score.is_finite()) {
            return Err(Error::NotFinite {
                argument: "scores",
                place: format!("query {query}, row {}", self.pairs[at].0),
                value: f64::from(self.scores[at]),
            });
        }
        let rescored = self.scores.len();
        // Zeros of both signs are one score.
        let hits = self
            .pairs
            .iter()
            .zip(&self.scores)
            .map(|(&(row, _), score)| Hit { example: u64::from(row), score: score + 0.0 });
        let side = if request.smallest { SMALLEST } else { LARGEST };
        Ok(Found { hits: top::finish(hits.collect(), request.k, side, watch)?, rescored })
    }
}

/// The squared distance of two rows; `difference` is scratch.
pub(super) fn squared(
    set: InstructionSet,
    left: &[f32],
    right: &[f32],
    difference: &mut Vec<f32>,
) -> f64 {
    difference.clear();
    difference.extend(left.iter().zip(right).map(|(left, right)| left - right));
    set.squares(difference)
}

/// The key of the query's own bucket.
fn bits_of(projections: &[f32]) -> u64 {
    projections
        .iter()
        .enumerate()
        .fold(0, |key, (bit, &projection)| key | u64::from(projection >= 0.0) << bit)
}

fn bit_changes(projections: &[f32]) -> Vec<Change> {
    let change =
        |(hash, projection): (usize, &f32)| Change { hash, step: 1, cost: projection * projection };
    projections.iter().enumerate().map(change).collect()
}

fn cell_changes(positions: &[f32]) -> Vec<Change> {
    let changes = |(hash, &position): (usize, &f32)| {
        let above = position - position.floor();
        let change = |step, distance: f32| Change { hash, step, cost: distance * distance };
        [change(-1, above), change(1, 1.0 - above)]
    };
    positions.iter().enumerate().flat_map(changes).collect()
}

/// Replaces projections by sums over them: entry `256 b + m` is the sum of those of byte `b` of a
/// code, filled up with zeros to whole words, whose bits are set in `m`.
///
/// That is half the sum with signs, and half of what all rows have in common.
fn tabulate(projections: &mut Vec<f32>) {
    projections.resize(projections.len().next_multiple_of(64), 0.0);
    let mut sums = Vec::with_capacity(projections.len() / 8 * 256);
    for projections in projections.as_chunks::<8>().0 {
        let first = sums.len();
        sums.push(0.0);
        for mask in 1..256usize {
            let bit = mask.trailing_zeros() as usize;
            sums.push(sums[first + (mask & (mask - 1))] + projections[bit]);
        }
    }
    *projections = sums;
}

/// The sum over the bytes of a word, added up by halves.
fn tabulated(sums: &[f32; WORD_SUMS], word: u64) -> f32 {
    let bytes = word.to_le_bytes();
    let of = |byte: usize| sums[256 * byte + usize::from(bytes[byte])];
    ((of(0) + of(4)) + (of(2) + of(6))) + ((of(1) + of(5)) + (of(3) + of(7)))
}

/// The squared distance from positions to the middles of cells, in four lanes that are added up by
/// halves.
fn squared_distance(positions: &[f32], cells: &[i32]) -> f32 {
    let mut lanes = [0.0; 4];
    for (positions, cells) in positions.chunks(4).zip(cells.chunks(4)) {
        for ((lane, position), &cell) in lanes.iter_mut().zip(positions).zip(cells) {
            let difference = position - (cell as f32 + 0.5);
            *lane += difference * difference;
        }
    }
    (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::normal::quantile;
    use crate::random::value;
    use crate::stop::never;

    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        (0..count as u64).map(|at| quantile((value(seed, at) >> 32) as u32) as f32).collect()
    }

    const FAMILIES: [Family; 2] = [Family::Sign, Family::PStable { width: 2.0, levels: 1 }];

    /// All rows by their exact scores.
    fn sorted(family: Family, rows: &[f32], query: &[f32], smallest: bool) -> Vec<(u64, f64)> {
        let turn = if smallest { -1.0 } else { 1.0 };
        let mut all: Vec<(u64, f64)> = (0..)
            .zip(rows.chunks(query.len()))
            .map(|(row, values)| {
                let of = |f: fn(f64, f64) -> f64| -> f64 {
                    values.iter().zip(query).map(|(&x, &y)| f(x.into(), y.into())).sum()
                };
                let score = match family {
                    Family::Sign => of(|x, y| x * y),
                    Family::PStable { .. } => -of(|x, y| (x - y) * (x - y)).sqrt(),
                };
                (row, score)
            })
            .collect();
        all.sort_by(|a, b| (turn * b.1).total_cmp(&(turn * a.1)).then(a.0.cmp(&b.0)));
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn with_all_rows_as_candidates_a_search_is_exact(
            count in 1usize..60, dim in 1usize..30, seed in any::<u64>(), k in 0usize..70,
            smallest in any::<bool>(),
        ) {
            let (rows, queries) = (numbers(count * dim, seed), numbers(3 * dim, !seed));
            let asker = Asker::new(&never);
            for family in FAMILIES {
                let hash = Hash::new(family, dim, 12, seed, 0, &Watch::none()).unwrap();
                let index = Index::new(hash, &rows, Some(4), 2, &asker).unwrap();
                let request = Request {
                    rows: &rows, queries: &queries, k, candidates: usize::MAX, probes: None, smallest,
                };
                let found = index.search(&request, 2, &asker).unwrap();
                for (found, query) in found.iter().zip(queries.chunks(dim)) {
                    prop_assert_eq!(found.rescored, count);
                    let expected = sorted(family, &rows, query, smallest);
                    prop_assert_eq!(found.hits.len(), k.min(count));
                    for (hit, expected) in found.hits.iter().zip(expected) {
                        prop_assert!((f64::from(hit.score) - expected.1).abs() < 1e-4);
                    }
                }
            }
        }

        #[test]
        fn candidates_are_the_best_by_the_estimate(
            count in 2usize..60, hashes in 1usize..140, seed in any::<u64>(),
            candidates in 1usize..20, smallest in any::<bool>(), threads in 1usize..4,
        ) {
            let dim = 9;
            let (rows, query) = (numbers(count * dim, seed), numbers(dim, !seed));
            let asker = Asker::new(&never);
            for family in FAMILIES {
                let hash = Hash::new(family, dim, hashes, seed, 0, &Watch::none()).unwrap();
                let turn = if smallest { -1.0 } else { 1.0 };
                let at = hash.project(&query, 1, &asker).unwrap();
                let rows_at = hash.project(&rows, 1, &asker).unwrap();
                let mut estimates: Vec<(usize, f64)> = rows_at.chunks(hashes).map(|row| {
                    turn * row.iter().zip(&at).map(|(&row, &at)| match family {
                        Family::Sign => f64::from(at) * if row >= 0.0 { 1.0 } else { -1.0 },
                        Family::PStable { .. } => -f64::from(row.floor() + 0.5 - at).powi(2),
                    }).sum::<f64>()
                }).enumerate().collect();
                estimates.sort_by(|a, b| b.1.total_cmp(&a.1));
                let index = Index::new(hash, &rows, None, threads, &asker).unwrap();
                let request = Request {
                    rows: &rows, queries: &query, k: count, candidates, probes: None, smallest,
                };
                let found = index.search(&request, threads, &asker).unwrap();
                prop_assert_eq!(found[0].rescored, candidates.min(count));
                let worst = estimates[candidates.min(count) - 1].1;
                for hit in &found[0].hits {
                    let of = estimates.iter().find(|(row, _)| *row as u64 == hit.example).unwrap();
                    // Sums of f32 that differ by rounding may change places.
                    prop_assert!(of.1 >= worst - 1e-3 * (1.0 + worst.abs()));
                }
            }
        }

        #[test]
        fn probing_finds_the_rows_of_the_cheapest_buckets(
            seed in any::<u64>(), probes in 1usize..30, band in 1usize..5,
        ) {
            let (dim, count, hashes) = (6, 50, 8);
            let (rows, query) = (numbers(count * dim, seed), numbers(dim, !seed));
            let asker = Asker::new(&never);
            let hash = Hash::new(Family::Sign, dim, hashes, seed, 0, &Watch::none()).unwrap();
            let at = hash.project(&query, 1, &asker).unwrap();
            let rows_at = hash.project(&rows, 1, &asker).unwrap();
            let mut buckets: Vec<(f32, usize, usize)> = (0..hashes / band).flat_map(|table| {
                let at = &at[table * band..][..band];
                (0..1usize << band).map(move |flips| {
                    let cost = (0..band).filter(|bit| flips >> bit & 1 == 1);
                    (cost.map(|bit| at[bit] * at[bit]).sum(), table, flips)
                })
            }).collect();
            buckets.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            buckets.truncate(probes);
            let expected: Vec<u64> = (0..count).filter(|row| {
                buckets.iter().any(|&(_, table, flips)| (0..band).all(|bit| {
                    let hash = table * band + bit;
                    (rows_at[row * hashes + hash] >= 0.0)
                        == ((at[hash] >= 0.0) != (flips >> bit & 1 == 1))
                }))
            }).map(|row| row as u64).collect();
            let index = Index::new(hash, &rows, Some(band), 1, &asker).unwrap();
            let request = Request {
                rows: &rows, queries: &query, k: 1, candidates: count, probes: Some(probes),
                smallest: false,
            };
            let found = index.search(&request, 1, &asker).unwrap();
            let all = if expected.is_empty() { count } else { expected.len() };
            prop_assert_eq!(found[0].rescored, all);
            // The smallest of a query are the largest of its negative, with the sign turned.
            let negative: Vec<f32> = query.iter().map(|value| -value).collect();
            let other = Request { queries: &negative, smallest: true, ..request };
            let other = index.search(&other, 1, &asker).unwrap();
            prop_assert_eq!(other[0].hits[0].example, found[0].hits[0].example);
            prop_assert_eq!(other[0].hits[0].score, -found[0].hits[0].score);
        }
    }

    #[test]
    fn cells_beside_the_query_are_probed_by_distance() {
        let hash = Hash::new(Family::PStable { width: 1.0, levels: 1 }, 1, 1, 5, 0, &Watch::none())
            .unwrap();
        let asker = Asker::new(&never);
        let rows: Vec<f32> = (-40..40).map(|at| at as f32 / 8.0).collect();
        let cells = hash.project(&rows, 1, &asker).unwrap();
        let at = hash.project(&[0.3], 1, &asker).unwrap()[0];
        let index = Index::new(hash, &rows, Some(1), 1, &asker).unwrap();
        let side = if at - at.floor() < 0.5 { -1.0 } else { 1.0 };
        for (probes, wanted) in [(1, vec![0.0]), (2, vec![0.0, side]), (3, vec![0.0, 1.0, -1.0])] {
            let expected = cells
                .iter()
                .filter(|cell| wanted.iter().any(|step| cell.floor() == at.floor() + step))
                .count();
            let request = Request {
                rows: &rows,
                queries: &[0.3],
                k: 1,
                candidates: 80,
                probes: Some(probes),
                smallest: false,
            };
            assert!(expected > 0);
            assert_eq!(index.search(&request, 1, &asker).unwrap()[0].rescored, expected);
        }
    }

    #[test]
    fn keys_are_the_bits_of_the_band_across_words() {
        let codes = Codes::Bits(vec![0b1011 << 60, 0b101]);
        assert_eq!(keys(&codes, 2, 10, 6, 0, &Watch::none()).unwrap(), [0b01_1011]);
        assert_eq!(keys(&codes, 2, 0, 64, 0, &Watch::none()).unwrap(), [0b1011 << 60]);
        assert_eq!(keys(&codes, 1, 0, 3, 0, &Watch::none()).unwrap(), [0, 0b101]);
    }

    #[test]
    fn what_cannot_be_asked_is_an_error() {
        let asker = Asker::new(&never);
        let rows = numbers(20, 1);
        for family in FAMILIES {
            let new = |band| {
                let hash = Hash::new(family, 2, 8, 0, 0, &Watch::none()).unwrap();
                Index::new(hash, &rows, band, 1, &asker)
            };
            assert!(new(Some(0)).is_err());
            assert!(new(Some(9)).is_err());
            let request = Request {
                rows: &rows,
                queries: &rows,
                k: 1,
                candidates: 1,
                probes: Some(1),
                smallest: false,
            };
            assert!(new(None).unwrap().search(&request, 1, &asker).is_err());
            let index = new(Some(4)).unwrap();
            assert!(index.search(&request, 1, &asker).is_ok());
            let farthest = Request { smallest: true, ..request };
            assert_eq!(index.search(&farthest, 1, &asker).is_ok(), family == Family::Sign);
            for probes in [0, usize::MAX] {
                let request = Request { probes: Some(probes), ..request };
                assert!(index.search(&request, 1, &asker).is_err());
            }
            assert!(index.search(&Request { rows: &rows[2..], ..request }, 1, &asker).is_err());
            assert!(index.search(&Request { queries: &rows[1..], ..request }, 1, &asker).is_err());
        }
    }
}
