//! The scan of all examples that defines every answer.
//!
//! Examples are scored a block at a time; a block's scores are sifted at once, so no array of all
//! examples by all queries exists.

use super::top::Sieve;
use super::{Ends, Hit, Rows, Sides};
use crate::error::Error;
use crate::kernels::InstructionSet;
use crate::parallel::share;
use crate::stop::Asker;
use crate::store::Cursor;

/// Values of a block of rows: 1 MiB as f32, half of a common second cache.
const BLOCK: usize = 1 << 18;
/// Values of a group of queries that meet a block together.
const GROUP: usize = 1 << 17;

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
    /// Which ends to return.
    pub sides: Sides,
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
    let (examples, count, dim) = (request.examples, request.count, rows.dim());
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
        || State::new(count, request.sides, Products::new(set, dim, request.segments)),
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
                    finite(score, query, example)?;
                    if sieve.takes(score) {
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
    let mut all = vec![Sieve::new(request.sides); count];
    for state in states {
        for (all, sieve) in all.iter_mut().zip(state.sieves) {
            all.merge(sieve);
        }
    }
    Ok(all.into_iter().map(|sieve| sieve.finish(k)).collect())
}

/// The number of checkpoints, if all sizes fit.
fn check(rows: &Rows, request: &Request<'_>) -> Result<usize, Error> {
    let width = request.count.checked_mul(rows.dim()).filter(|&width| width > 0);
    let checkpoints = width.map_or(1, |width| request.queries.len() / width);
    if width.is_some_and(|width| width * checkpoints != request.queries.len())
        || (width.is_none() && !request.queries.is_empty())
    {
        return Err(Error::shape(
            "queries",
            format!("[checkpoints, {}, {}]", request.count, rows.dim()),
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
    check_excluded(request.excluded, request.count)?;
    let widths = request
        .segments
        .iter()
        .try_fold(0usize, |sum, &(left, right)| sum.checked_add(left)?.checked_add(right));
    if !request.segments.is_empty() && widths != Some(rows.dim()) {
        let must = format!("parts of {} columns together", rows.dim());
        return Err(Error::shape("segments", must, format!("{:?}", request.segments)));
    }
    check_finite(request.queries, request.count, rows.dim())?;
    Ok(checkpoints)
}

/// Whether there is a list for each query, or none at all.
pub(super) fn check_excluded(excluded: &[Vec<u64>], queries: usize) -> Result<(), Error> {
    if excluded.is_empty() || excluded.len() == queries {
        return Ok(());
    }
    let must = format!("one list for each of {queries} queries");
    Err(Error::shape("excluded", must, excluded.len()))
}

/// Whether every value of `[checkpoints, queries, dim]` is finite.
pub(super) fn check_finite(values: &[f32], queries: usize, dim: usize) -> Result<(), Error> {
    let Some(at) = values.iter().position(|value| !value.is_finite()) else {
        return Ok(());
    };
    Err(Error::NotFinite {
        argument: "queries",
        place: format!("query {}, column {}", at / dim % queries, at % dim),
        value: f64::from(values[at]),
    })
}

/// Scores some examples for one query, as [`ends`] does.
#[derive(Default)]
pub(super) struct Scorer {
    numbers: Vec<u64>,
    values: Vec<f32>,
    scales: Vec<f32>,
    products: Vec<f32>,
    cursor: Cursor,
}

impl Scorer {
    /// The scores of examples, given with `[checkpoints, all]` numbers of rows of all examples; for
    /// query `query` of `[checkpoints, count, dim]`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a score is NaN or infinite; [`Error::Io`].
    pub(super) fn score(
        &mut self,
        rows: &Rows,
        (numbers, all, examples): (&[u64], usize, &[u32]),
        (queries, count, query): (&[f32], usize, usize),
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let (dim, set) = (rows.dim(), InstructionSet::best());
        self.values.resize(examples.len() * dim, 0.0);
        self.products.resize(examples.len(), 0.0);
        out.clear();
        out.resize(examples.len(), 0.0);
        for (numbers, queries) in numbers.chunks_exact(all).zip(queries.chunks_exact(count * dim)) {
            self.numbers.clear();
            self.numbers.extend(examples.iter().map(|&example| numbers[example as usize]));
            rows.read(&self.numbers, &mut self.values, &mut self.scales, &mut self.cursor)?;
            set.dots(&self.values, &queries[query * dim..][..dim], dim, &mut self.products);
            for (score, (product, scale)) in
                out.iter_mut().zip(self.products.iter().zip(&self.scales))
            {
                *score += scale * product;
            }
        }
        for (&score, &example) in out.iter().zip(examples) {
            finite(score, query, u64::from(example))?;
        }
        Ok(())
    }
}

/// Nothing, if a score is a number.
fn finite(score: f32, query: usize, example: u64) -> Result<(), Error> {
    if score.is_finite() {
        return Ok(());
    }
    Err(Error::NotFinite {
        argument: "scores",
        place: format!("query {query}, eligible example {example} (counted from 0)"),
        value: f64::from(score),
    })
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
    fn new(queries: usize, sides: Sides, of: Products<'a>) -> Self {
        Self {
            of,
            values: Vec::new(),
            scales: Vec::new(),
            cursor: Cursor::default(),
            products: Vec::new(),
            scores: Vec::new(),
            sieves: vec![Sieve::new(sides); queries],
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::{AtomicU64, Ordering as Atomic};

    use proptest::prelude::*;

    use super::*;
    use crate::stop::never;
    use crate::store::{Kind, Shard};

    /// A file of rows that is gone when the test is.
    struct Written(std::path::PathBuf);

    impl Drop for Written {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn file(values: &[f32], dim: usize) -> (Shard, Written) {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Atomic::Relaxed);
        let path =
            std::env::temp_dir().join(format!("whence-search-{}-{number}", std::process::id()));
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        std::fs::File::create(&path).unwrap().write_all(&bytes).unwrap();
        let rows = (values.len() / dim) as u64;
        (Shard::in_file(&path, 0, rows, dim, Kind::F32).unwrap(), Written(path))
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
                Request { rows: &order, examples, queries: &queries, count, k, sides: Sides::BOTH, excluded: &excluded, segments: &[] };
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
            sides: Sides::BOTH,
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
                sides: Sides::BOTH,
                excluded: &[],
                segments: &[],
            };
            let found = ends(&rows, &request, 1, &Asker::new(&never));
            assert!(matches!(found, Err(Error::NotFinite { .. })));
        }
    }
}
