//! Exact search: the examples with the largest and the smallest scores, in one pass.
//!
//! The score of an example for a query is the sum over checkpoints of
//! `scale * (stored row . query row)`. Examples are scored a block at a time; a block's scores are
//! sifted at once, so no array of all examples by all queries exists.

use std::cmp::Ordering;

use crate::error::Error;
use crate::kernels::InstructionSet;
use crate::parallel::share;
use crate::sketch::MAX_DIM;
use crate::stop::Asker;
use crate::store::{Cursor, RowFile};

/// Values of a block of rows: 1 MiB as f32, half of a common second cache.
const BLOCK: usize = 1 << 18;
/// Values of a group of queries that meet a block together.
const GROUP: usize = 1 << 17;

/// An example and its score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// Index of the example.
    pub example: u64,
    /// Its score.
    pub score: f32,
}

/// The best and the worst examples of one query, best first and worst first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ends {
    /// The largest scores, largest first.
    pub largest: Vec<Hit>,
    /// The smallest scores, smallest first.
    pub smallest: Vec<Hit>,
}

/// Rows in files, numbered through: those of the first file, then of the second, and so on.
pub struct Rows {
    files: Vec<RowFile>,
    starts: Vec<u64>,
    scales: Vec<f32>,
    dim: usize,
}

impl Rows {
    /// The rows of `files`, each `dim` wide, with one scale a row.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not as many scales as rows; [`Error::Argument`] unless
    /// `1 <= dim <=` [`MAX_DIM`].
    pub fn new(files: Vec<RowFile>, scales: Vec<f32>, dim: usize) -> Result<Self, Error> {
        if dim == 0 || dim > MAX_DIM {
            return Err(Error::argument("dim", format!("from 1 to {MAX_DIM}"), dim));
        }
        let mut total = 0u64;
        let mut starts = Vec::with_capacity(files.len());
        for file in &files {
            starts.push(total);
            total = total.saturating_add(file.rows());
        }
        if total != scales.len() as u64 {
            return Err(Error::shape("scales", format!("{total} values"), scales.len()));
        }
        Ok(Self { files, starts, scales, dim })
    }

    /// The number of rows.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.scales.len() as u64
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.scales.is_empty()
    }

    /// Reads the rows with these numbers, stored values and scales apart.
    ///
    /// # Errors
    /// [`Error::Argument`] if a number is not that of a row; [`Error::Io`].
    pub fn read(
        &self,
        numbers: &[u64],
        values: &mut [f32],
        scales: &mut Vec<f32>,
        cursor: &mut Cursor,
    ) -> Result<(), Error> {
        scales.clear();
        let mut done = 0;
        while done < numbers.len() {
            let first = numbers[done];
            if first >= self.len() {
                return Err(Error::argument("rows", format!("below {}", self.len()), first));
            }
            // The last file that starts at or before the row; empty files start with their heirs.
            let file = self.starts.partition_point(|&start| start <= first) - 1;
            let at = first - self.starts[file];
            let left = self.files[file].rows() - at;
            let run = numbers[done..]
                .iter()
                .zip(first..first + left)
                .take_while(|&(&number, expected)| number == expected)
                .count();
            let out = &mut values[done * self.dim..(done + run) * self.dim];
            self.files[file].read(at, out, cursor)?;
            scales.extend_from_slice(&self.scales[first as usize..first as usize + run]);
            done += run;
        }
        Ok(())
    }

    /// The rows with these numbers, `[numbers, dim]`, scaled back.
    ///
    /// # Errors
    /// As [`Rows::read`]; [`Error::Shape`] if they are more than memory could hold.
    pub fn scaled(&self, numbers: &[u64]) -> Result<Vec<f32>, Error> {
        if let Some(number) = numbers.iter().find(|&&number| number >= self.len()) {
            return Err(Error::argument("rows", format!("below {}", self.len()), number));
        }
        let size = numbers
            .len()
            .checked_mul(self.dim)
            .ok_or_else(|| Error::shape("rows", "fewer than memory could hold", numbers.len()))?;
        let mut values = vec![0.0; size];
        let mut scales = Vec::new();
        self.read(numbers, &mut values, &mut scales, &mut Cursor::default())?;
        for (row, scale) in values.chunks_exact_mut(self.dim).zip(scales) {
            for value in row {
                *value *= scale;
            }
        }
        Ok(values)
    }
}

/// What to search for.
pub struct Request<'a> {
    /// `[checkpoints, examples]`: the number of the row of each example at each checkpoint.
    pub rows: &'a [u64],
    /// How many examples there are.
    pub examples: usize,
    /// `[checkpoints, queries, dim]`: the query rows.
    pub queries: &'a [f32],
    /// How many queries there are.
    pub count: usize,
    /// How many hits to return at each end; at most the examples there are.
    pub k: usize,
    /// For each query the examples it must not return, in rising order; empty for none at all.
    pub excluded: &'a [Vec<u64>],
    /// The parts of factored rows, in order: the lengths of a left and a right factor, or 0 and the
    /// length of a part that is no product. Empty for rows whose score is their inner product.
    pub segments: &'a [(usize, usize)],
}

/// Inner products of rows with queries, or of factored rows part by part.
struct Products<'a> {
    set: InstructionSet,
    dim: usize,
    segments: &'a [(usize, usize)],
    /// Columns of the rows, of the queries, and their products.
    columns: [Vec<f32>; 2],
    factors: [Vec<f32>; 2],
}

impl<'a> Products<'a> {
    fn new(set: InstructionSet, dim: usize, segments: &'a [(usize, usize)]) -> Self {
        Self { set, dim, segments, columns: Default::default(), factors: Default::default() }
    }

    /// `out[r * queries + q]`: the product of every row with every query. The sum over segments of
    /// (left . left') (right . right'), where there are segments.
    fn of(&mut self, rows: &[f32], queries: &[f32], out: &mut [f32]) {
        if self.segments.is_empty() {
            self.set.dots(rows, queries, self.dim, out);
            return;
        }
        let mut at = 0;
        for &(left, right) in self.segments {
            let mut sides = [at..at + left, at + left..at + left + right];
            at += left + right;
            for (side, factor) in sides.iter_mut().zip(&mut self.factors) {
                factor.clear();
                factor.resize(out.len(), 1.0);
                if side.start == side.end {
                    continue;
                }
                for (columns, all) in self.columns.iter_mut().zip([rows, queries]) {
                    columns.clear();
                    for row in all.chunks_exact(self.dim) {
                        columns.extend_from_slice(&row[side.clone()]);
                    }
                }
                self.set.dots(&self.columns[0], &self.columns[1], side.len(), factor);
            }
            for (out, (left, right)) in
                out.iter_mut().zip(self.factors[0].iter().zip(&self.factors[1]))
            {
                *out += left * right;
            }
        }
    }
}

/// The `k` examples with the largest and the `k` with the smallest scores, for each query.
///
/// Of equal scores the lower example comes first at either end. Returns fewer than `k` only where
/// fewer are eligible. Takes O(checkpoints · examples · queries · dim) time and
/// O(threads · queries · (k + block)) memory, whatever the size of the files.
///
/// # Errors
/// [`Error::Shape`] if the arrays do not fit together; [`Error::NotFinite`] if a query or a score
/// is NaN or infinite; [`Error::Io`]; [`Error::Stopped`].
pub fn ends(
    rows: &Rows,
    request: &Request<'_>,
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Vec<Ends>, Error> {
    let checkpoints = check(rows, request)?;
    let (examples, count, dim) = (request.examples, request.count, rows.dim);
    if count == 0 {
        return Ok(Vec::new());
    }
    let k = request.k.min(examples); // the caller's number never sizes an allocation
    let set = InstructionSet::best();
    let step = (BLOCK / dim).clamp(4, 1024);
    let group = (GROUP / dim).clamp(12, 1024);
    let states = share(
        examples.div_ceil(step),
        threads,
        asker,
        || State::new(count, Products::new(set, dim, request.segments)),
        |state, job, watch| {
            let first = job * step;
            let here = step.min(examples - first);
            state.values.resize(here * dim, 0.0);
            state.scores.clear();
            state.scores.resize(here * count, 0.0);
            for checkpoint in 0..checkpoints {
                let numbers = &request.rows[checkpoint * examples + first..][..here];
                let State { values, scales, cursor, scores, products, of, .. } = state;
                rows.read(numbers, values, scales, cursor)?;
                let queries = &request.queries[checkpoint * count * dim..][..count * dim];
                for (index, queries) in queries.chunks(group * dim).enumerate() {
                    watch.check()?;
                    let width = queries.len() / dim;
                    products.clear();
                    products.resize(here * width, 0.0);
                    of.of(values, queries, products);
                    for ((scores, products), scale) in
                        scores.chunks_mut(count).zip(products.chunks(width)).zip(scales.iter())
                    {
                        let scores = &mut scores[index * group..][..width];
                        for (score, product) in scores.iter_mut().zip(products) {
                            *score += scale * product;
                        }
                    }
                }
            }
            for (index, scores) in state.scores.chunks(count).enumerate() {
                let example = (first + index) as u64;
                for (query, (&score, sieve)) in scores.iter().zip(&mut state.sieves).enumerate() {
                    if !score.is_finite() {
                        return Err(Error::NotFinite {
                            argument: "scores",
                            place: format!(
                                "query {query}, eligible example {example} (counted from 0)"
                            ),
                            value: f64::from(score),
                        });
                    }
                    if score > sieve.above || score < sieve.below {
                        let excluded = request.excluded.get(query);
                        if excluded.is_none_or(|list| list.binary_search(&example).is_err()) {
                            sieve.add(Hit { example, score }, k);
                        }
                    }
                }
            }
            Ok(())
        },
    )?;
    let mut all = vec![Sieve::default(); count];
    for state in states {
        for (all, mut sieve) in all.iter_mut().zip(state.sieves) {
            all.largest.append(&mut sieve.largest);
            all.smallest.append(&mut sieve.smallest);
        }
    }
    Ok(all.into_iter().map(|sieve| sieve.finish(k)).collect())
}

/// The number of checkpoints, if all sizes fit.
fn check(rows: &Rows, request: &Request<'_>) -> Result<usize, Error> {
    let width = request.count.checked_mul(rows.dim).filter(|&width| width > 0);
    let checkpoints = width.map_or(1, |width| request.queries.len() / width);
    if width.is_some_and(|width| width * checkpoints != request.queries.len())
        || (width.is_none() && !request.queries.is_empty())
    {
        return Err(Error::shape(
            "queries",
            format!("[checkpoints, {}, {}]", request.count, rows.dim),
            request.queries.len(),
        ));
    }
    if checkpoints.checked_mul(request.examples) != Some(request.rows.len()) {
        return Err(Error::shape(
            "rows",
            format!("[{checkpoints}, {}]", request.examples),
            request.rows.len(),
        ));
    }
    if !request.excluded.is_empty() && request.excluded.len() != request.count {
        return Err(Error::shape(
            "excluded",
            format!("one list for each of {} queries", request.count),
            request.excluded.len(),
        ));
    }
    let widths = request
        .segments
        .iter()
        .try_fold(0usize, |sum, &(left, right)| sum.checked_add(left)?.checked_add(right));
    if !request.segments.is_empty() && widths != Some(rows.dim) {
        let must = format!("parts of {} columns together", rows.dim);
        return Err(Error::shape("segments", must, format!("{:?}", request.segments)));
    }
    if let Some(at) = request.queries.iter().position(|value| !value.is_finite()) {
        return Err(Error::NotFinite {
            argument: "queries",
            place: format!("query {}, column {}", at / rows.dim % request.count, at % rows.dim),
            value: f64::from(request.queries[at]),
        });
    }
    Ok(checkpoints)
}

/// What a worker keeps between blocks.
struct State<'a> {
    of: Products<'a>,
    values: Vec<f32>,
    scales: Vec<f32>,
    cursor: Cursor,
    products: Vec<f32>,
    scores: Vec<f32>,
    sieves: Vec<Sieve>,
}

impl<'a> State<'a> {
    fn new(queries: usize, of: Products<'a>) -> Self {
        Self {
            of,
            values: Vec::new(),
            scales: Vec::new(),
            cursor: Cursor::default(),
            products: Vec::new(),
            scores: Vec::new(),
            sieves: vec![Sieve::default(); queries],
        }
    }
}

/// Larger score first, then lower example.
fn by_largest(a: &Hit, b: &Hit) -> Ordering {
    b.score.total_cmp(&a.score).then(a.example.cmp(&b.example))
}

/// Smaller score first, then lower example.
fn by_smallest(a: &Hit, b: &Hit) -> Ordering {
    a.score.total_cmp(&b.score).then(a.example.cmp(&b.example))
}

/// The candidates of one query for both ends.
///
/// Examples come in rising order, so one that only equals the k-th best so far is not better.
#[derive(Clone)]
struct Sieve {
    /// A score must be larger to be among the largest.
    above: f32,
    /// A score must be smaller to be among the smallest.
    below: f32,
    largest: Vec<Hit>,
    smallest: Vec<Hit>,
}

impl Default for Sieve {
    fn default() -> Self {
        Self {
            above: f32::NEG_INFINITY,
            below: f32::INFINITY,
            largest: Vec::new(),
            smallest: Vec::new(),
        }
    }
}

impl Sieve {
    fn add(&mut self, hit: Hit, k: usize) {
        // Zeros of both signs are one score.
        let hit = Hit { score: hit.score + 0.0, ..hit };
        let full = k.saturating_mul(2).max(64);
        if hit.score > self.above {
            self.largest.push(hit);
            if self.largest.len() >= full {
                self.above = keep(&mut self.largest, k, by_largest).unwrap_or(self.above);
            }
        }
        if hit.score < self.below {
            self.smallest.push(hit);
            if self.smallest.len() >= full {
                self.below = keep(&mut self.smallest, k, by_smallest).unwrap_or(self.below);
            }
        }
    }

    fn finish(mut self, k: usize) -> Ends {
        self.largest.sort_unstable_by(by_largest);
        self.smallest.sort_unstable_by(by_smallest);
        self.largest.truncate(k);
        self.smallest.truncate(k);
        Ends { largest: self.largest, smallest: self.smallest }
    }
}

/// Keeps the first `k` in `order` and returns the last one's score.
fn keep(hits: &mut Vec<Hit>, k: usize, order: fn(&Hit, &Hit) -> Ordering) -> Option<f32> {
    let last = k.checked_sub(1)?;
    if last < hits.len() {
        hits.select_nth_unstable_by(last, order);
        hits.truncate(k);
        return Some(hits[last].score);
    }
    None
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::{AtomicU64, Ordering as Atomic};

    use proptest::prelude::*;

    use super::*;
    use crate::stop::never;

    /// A file of rows that is gone when the test is.
    struct Written(std::path::PathBuf);

    impl Drop for Written {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn file(values: &[f32], dim: usize) -> (RowFile, Written) {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Atomic::Relaxed);
        let path =
            std::env::temp_dir().join(format!("whence-search-{}-{number}", std::process::id()));
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        std::fs::File::create(&path).unwrap().write_all(&bytes).unwrap();
        let rows = (values.len() / dim) as u64;
        (RowFile::new(&path, 0, rows, dim, false).unwrap(), Written(path))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn agrees_with_sorting_every_score(
            values in prop::collection::vec(-3i8..4, 0..1200), split in 0usize..60,
            count in 1usize..16, k in 0usize..400, dim in 1usize..20, threads in 1usize..4,
        ) {
            // Small whole numbers: sums are exact in any order, and ties are everywhere.
            let whole = values.len() / dim * dim;
            let values: Vec<f32> = values[..whole].iter().map(|&value| f32::from(value)).collect();
            let examples = whole / dim;
            let cut = split.min(examples) * dim;
            let (files, _written): (Vec<_>, Vec<_>) =
                [file(&values[..cut], dim), file(&values[cut..], dim)].into_iter().unzip();
            let scales: Vec<f32> = (0..examples).map(|i| (i % 3) as f32).collect();
            let queries: Vec<f32> = (0..2 * count * dim).map(|i| (i * 7 % 5) as f32 - 2.0).collect();
            // Checkpoint 0 in order, checkpoint 1 reversed.
            let order = (0..examples as u64).chain((0..examples as u64).rev()).collect::<Vec<_>>();
            let excluded: Vec<Vec<u64>> =
                (0..count as u64).map(|q| (q % 4..examples as u64).step_by(5).collect()).collect();
            let rows = Rows::new(files, scales.clone(), dim).unwrap();
            let request =
                Request { rows: &order, examples, queries: &queries, count, k, excluded: &excluded, segments: &[] };
            let found = ends(&rows, &request, threads, &Asker::new(&never)).unwrap();
            prop_assert_eq!(found.len(), count);
            for (query, found) in found.into_iter().enumerate() {
                let score = |example: usize| -> f32 {
                    (0..2).map(|checkpoint| {
                        let row = order[checkpoint * examples + example] as usize;
                        let product: f32 = (0..dim)
                            .map(|d| values[row * dim + d] * queries[(checkpoint * count + query) * dim + d])
                            .sum();
                        scales[row] * product
                    }).sum::<f32>() + 0.0
                };
                let mut all: Vec<Hit> = (0..examples)
                    .filter(|&example| !excluded[query].contains(&(example as u64)))
                    .map(|example| Hit { example: example as u64, score: score(example) })
                    .collect();
                all.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.example.cmp(&b.example)));
                prop_assert_eq!(&found.largest[..], &all[..k.min(all.len())]);
                all.sort_by(|a, b| a.score.total_cmp(&b.score).then(a.example.cmp(&b.example)));
                prop_assert_eq!(&found.smallest[..], &all[..k.min(all.len())]);
            }
        }
    }

    #[test]
    fn factored_rows_are_multiplied_part_by_part() {
        // (2 x 3) outer product, 2 plain values, (1 x 1) outer product: whole numbers, exact.
        let segments = [(2, 3), (0, 2), (1, 1)];
        let number = |seed: usize| ((seed * 7 + 3) % 11) as f32 - 5.0;
        let values: Vec<f32> = (0..20 * 9).map(number).collect();
        let queries: Vec<f32> = (0..2 * 9).map(|i| number(i * i + 1)).collect();
        let (file, _written) = file(&values, 9);
        let rows = Rows::new(vec![file], vec![2.0; 20], 9).unwrap();
        let order: Vec<u64> = (0..20).collect();
        let mut request = Request {
            rows: &order,
            examples: 20,
            queries: &queries,
            count: 2,
            k: 20,
            excluded: &[],
            segments: &segments,
        };
        let found = ends(&rows, &request, 2, &Asker::new(&never)).unwrap();
        for (found, query) in found.iter().zip(queries.chunks(9)) {
            for hit in &found.largest {
                let row = &values[hit.example as usize * 9..][..9];
                let dot = |from: usize, to: usize| -> f32 {
                    row[from..to].iter().zip(&query[from..to]).map(|(x, y)| x * y).sum()
                };
                let score = dot(0, 2) * dot(2, 5) + dot(5, 7) + dot(7, 8) * dot(8, 9);
                assert_eq!(hit.score, 2.0 * score + 0.0);
            }
        }
        request.segments = &[(2, 3), (0, usize::MAX)];
        assert!(ends(&rows, &request, 1, &Asker::new(&never)).is_err());
    }

    #[test]
    fn overflow_and_nan_are_errors() {
        let (file, _written) = file(&[1.0, 1.0], 1);
        let rows = Rows::new(vec![file], vec![f32::MAX, 1.0], 1).unwrap();
        for query in [f32::MAX, f32::NAN] {
            let request = Request {
                rows: &[0, 1],
                examples: 2,
                queries: &[query],
                count: 1,
                k: 1,
                excluded: &[],
                segments: &[],
            };
            let found = ends(&rows, &request, 1, &Asker::new(&never));
            assert!(matches!(found, Err(Error::NotFinite { .. })));
        }
    }
}
