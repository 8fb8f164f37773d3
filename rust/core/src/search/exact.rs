//! The scan of all examples that defines every answer.
//!
//! Examples are scored a block at a time; a block's scores are sifted at once, so no array of all
//! examples by all queries exists.

use std::cmp::Ordering;
use std::ops::Range;

use super::rows::{check_numbers, number};
use super::top::Sieve;
use super::{Ends, Hit, Rows, Sides};
use crate::error::Error;
use crate::kernels::{InstructionSet, LANES};
use crate::order;
use crate::parallel::share;
use crate::stop::{Asker, Watch};
use crate::store::Cursor;

/// Values of a block of rows: 1 MiB as f32, half of a common second cache.
const BLOCK: usize = 1 << 18;
/// Values of a group of queries that meet a block together.
const GROUP: usize = 1 << 17;
/// Examples of the largest norms that are scored first.
const LEAD: usize = 1024;

/// What to search for.
pub struct Request<'a> {
    /// `[checkpoints, examples]`: the number of the row of each example at each checkpoint; empty
    /// for one checkpoint whose rows have the numbers of their examples.
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
    /// `[examples]`: at least the norm of each example's rows, over all checkpoints; empty if not
    /// known, or for factored rows.
    pub norms: &'a [f32],
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
/// fewer are eligible. With norms, first the examples of the largest are scored, and then those
/// whose norm leaves them a chance. Takes O(checkpoints · examples · queries · dim) time at most
/// and O(threads · queries · (k + block)) memory, whatever the size of the files.
///
/// # Errors
/// [`Error::Shape`] if the arrays do not fit together; [`Error::NotFinite`] if a query, or a score
/// that matters, is NaN or infinite; [`Error::Io`]; [`Error::Stopped`].
pub fn ends(
    rows: &Rows,
    request: &Request<'_>,
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Vec<Ends>, Error> {
    let checkpoints = check(rows, request, &Watch::of(asker))?;
    let (count, norms) = (request.count, request.norms);
    if count == 0 {
        return Ok(Vec::new());
    }
    let k = request.k.min(request.examples); // the caller's number never sizes an allocation
    let scan = Scan { rows, request, checkpoints, k, reaches: reaches(request, checkpoints) };
    let sieves = vec![Sieve::new(request.sides); count];
    let first = LEAD.max(k.saturating_mul(4));
    if norms.len() / 2 < first {
        let sieves = scan.over(&Picked::All(request.examples), sieves, threads, asker)?;
        return sieves.into_iter().map(|sieve| sieve.finish(k, &Watch::of(asker))).collect();
    }
    let watch = &Watch::of(asker);
    let mut lead = longest(norms, first, watch)?;
    order::sort(&mut lead, watch, Ord::cmp)?; // rows that lie together are read together
    let mut sieves = scan.over(&Picked::Some(&lead), sieves, threads, asker)?;
    // The lowest norm with which a row can still matter to any query.
    let mut floor = f32::INFINITY;
    for (sieve, reach) in sieves.iter_mut().zip(&scan.reaches) {
        floor = floor.min(sieve.threshold(k) / reach * (1.0 - 2.0 * f32::EPSILON));
    }
    let mut rest = Vec::new();
    let mut lead = lead.into_iter().peekable();
    let mut steps = watch.steps();
    for (example, &norm) in (0..).zip(norms) {
        steps.add(1)?;
        if lead.next_if_eq(&example).is_none() && (norm >= floor || floor.is_nan()) {
            rest.push(example);
        }
    }
    // A block of rows of like norms matters to few queries; but rows in files are read in order.
    if rows.in_memory() && rest.len() < norms.len() / 2 {
        order::sort(&mut rest, watch, by_norm(norms))?;
    }
    let sieves = scan.over(&Picked::Some(&rest), sieves, threads, asker)?;
    sieves.into_iter().map(|sieve| sieve.finish(k, watch)).collect()
}

/// The longer first; of equal norms the lower example.
fn by_norm(norms: &[f32]) -> impl Fn(&u32, &u32) -> Ordering {
    |&a, &b| norms[b as usize].total_cmp(&norms[a as usize]).then(a.cmp(&b))
}

/// The `count` examples of the largest norms, of equal ones the lower; `count` is not 0.
fn longest(norms: &[f32], count: usize, watch: &Watch<'_>) -> Result<Vec<u32>, Error> {
    let mut kept: Vec<u32> = Vec::with_capacity(2 * count);
    let mut least = f32::NEG_INFINITY;
    let mut steps = watch.steps();
    for (example, &norm) in (0..).zip(norms) {
        steps.add(1)?;
        if norm < least {
            continue;
        }
        kept.push(example);
        if kept.len() == 2 * count {
            kept.select_nth_unstable_by(count - 1, by_norm(norms));
            kept.truncate(count);
            least = norms[kept[count - 1] as usize];
        }
    }
    if kept.len() > count {
        kept.select_nth_unstable_by(count - 1, by_norm(norms));
        kept.truncate(count);
    }
    Ok(kept)
}

/// The norm of each query, over all checkpoints, with room for rounding: times the norm of an
/// example it is at least the example's score.
fn reaches(request: &Request<'_>, checkpoints: usize) -> Vec<f32> {
    let dim = request.queries.len() / (request.count * checkpoints);
    let mut squares = vec![0f64; request.count];
    for queries in request.queries.chunks_exact(request.count * dim) {
        for (square, query) in squares.iter_mut().zip(queries.chunks_exact(dim)) {
            *square += InstructionSet::best().squares(query);
        }
    }
    let slack = 1.0 + (dim / LANES + checkpoints + 32) as f64 * f64::from(f32::EPSILON);
    squares.into_iter().map(|square| (square.sqrt() * slack) as f32 + f32::MIN_POSITIVE).collect()
}

/// Which examples are scanned.
enum Picked<'a> {
    /// So many, all of them.
    All(usize),
    /// These, in this order.
    Some(&'a [u32]),
}

impl Picked<'_> {
    fn len(&self) -> usize {
        match self {
            Self::All(examples) => *examples,
            Self::Some(examples) => examples.len(),
        }
    }

    fn get(&self, index: usize) -> usize {
        match self {
            Self::All(_) => index,
            Self::Some(examples) => examples[index] as usize,
        }
    }
}

/// A search under way.
struct Scan<'a> {
    rows: &'a Rows,
    request: &'a Request<'a>,
    checkpoints: usize,
    k: usize,
    reaches: Vec<f32>,
}

impl Scan<'_> {
    /// What has been found with these examples too.
    fn over(
        &self,
        picked: &Picked<'_>,
        sieves: Vec<Sieve>,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Vec<Sieve>, Error> {
        let step = (BLOCK / self.rows.dim()).clamp(4, 1024);
        let states = share(
            picked.len().div_ceil(step),
            threads,
            asker,
            || State::new(self, &sieves),
            |state, job, watch| {
                let first = job * step;
                let here = step.min(picked.len() - first);
                self.block(state, picked, first..first + here, watch)
            },
        )?;
        let mut all = sieves;
        for state in states {
            for (all, sieve) in all.iter_mut().zip(state.sieves) {
                all.merge(sieve);
            }
        }
        Ok(all)
    }

    fn block(
        &self,
        state: &mut State<'_>,
        picked: &Picked<'_>,
        here: Range<usize>,
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        let (request, dim) = (self.request, self.rows.dim());
        // Queries for which a row of the largest norm in the block could matter.
        let norms = request.norms;
        let largest =
            here.clone().map(|at| norms.get(picked.get(at)).copied().unwrap_or(f32::INFINITY));
        let largest = largest.fold(0f32, f32::max);
        let State { active, above, below, .. } = state;
        active.clear();
        active.extend((0..request.count).filter(|&query| {
            let most = self.reaches[query] * largest;
            // What is no number can be any.
            !(most < above[query] && -most > below[query])
        }));
        if state.active.is_empty() {
            return Ok(());
        }
        let (rows, count) = (here.len(), state.active.len());
        state.scores.clear();
        state.scores.resize(rows * count, 0.0);
        let group = (GROUP / dim).clamp(12, 1024);
        for checkpoint in 0..self.checkpoints {
            let State { values, scales, cursor, scores, products, of, active, queries, .. } = state;
            state.numbers.clear();
            state.numbers.extend(
                here.clone()
                    .map(|at| number(request.rows, request.examples, checkpoint, picked.get(at))),
            );
            let values = self.rows.lend(&state.numbers, values, scales, cursor, watch)?;
            let all = &request.queries[checkpoint * request.count * dim..][..request.count * dim];
            let wanted = if count == request.count {
                all
            } else {
                queries.clear();
                for &query in &*active {
                    queries.extend_from_slice(&all[query * dim..][..dim]);
                }
                queries
            };
            for (index, queries) in wanted.chunks(group * dim).enumerate() {
                watch.check()?;
                let width = queries.len() / dim;
                products.clear();
                products.resize(rows * width, 0.0);
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
        self.sift(state, picked, here, watch)
    }

    /// Adds what a block has to the sieves.
    fn sift(
        &self,
        state: &mut State<'_>,
        picked: &Picked<'_>,
        here: Range<usize>,
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        let State { scores, sieves, active, above, below, bounds, survivors, .. } = state;
        let count = active.len();
        for side in &mut *bounds {
            side.clear();
        }
        bounds[0].extend(active.iter().map(|&query| above[query]));
        bounds[1].extend(active.iter().map(|&query| below[query]));
        let set = InstructionSet::best();
        for (scores, at) in scores.chunks(count).zip(here) {
            watch.check()?;
            survivors.clear();
            set.sift_each(scores, &bounds[0], &bounds[1], survivors);
            for &index in &*survivors {
                let (index, example) = (index as usize, picked.get(at) as u64);
                let (score, query) = (scores[index], active[index]);
                finite(score, query, example)?;
                if excludes(self.request.excluded, query, example) {
                    continue;
                }
                let sieve = &mut sieves[query];
                sieve.add(Hit { example, score }, self.k);
                (above[query], below[query]) = (sieve.above, sieve.below);
                (bounds[0][index], bounds[1][index]) = (sieve.above, sieve.below);
            }
        }
        Ok(())
    }
}

/// The number of checkpoints, if all sizes fit.
fn check(rows: &Rows, request: &Request<'_>, watch: &Watch<'_>) -> Result<usize, Error> {
    let width = request.count.checked_mul(rows.dim()).filter(|&width| width > 0);
    let checkpoints = width.map_or(1, |width| request.queries.len() / width);
    if width.is_some_and(|width| checkpoints == 0 || width * checkpoints != request.queries.len())
        || (width.is_none() && !request.queries.is_empty())
    {
        return Err(Error::shape(
            "queries",
            format!("[checkpoints, {}, {}]", request.count, rows.dim()),
            request.queries.len(),
        ));
    }
    check_numbers("rows", request.rows, checkpoints, request.examples)?;
    if request.rows.is_empty() && request.examples as u64 > rows.len() {
        let must = format!("at most the {} rows", rows.len());
        return Err(Error::shape("examples", must, request.examples));
    }
    check_excluded(request.excluded, request.count)?;
    if !request.norms.is_empty() {
        if request.norms.len() != request.examples || !request.segments.is_empty() {
            let must = format!("{} values, and none for factored rows", request.examples);
            return Err(Error::shape("norms", must, request.norms.len()));
        }
        if request.examples > u32::MAX as usize {
            let must = format!("at most {} with norms", u32::MAX);
            return Err(Error::shape("rows", must, request.examples));
        }
    }
    let widths = request
        .segments
        .iter()
        .try_fold(0usize, |sum, &(left, right)| sum.checked_add(left)?.checked_add(right));
    if !request.segments.is_empty() && widths != Some(rows.dim()) {
        let must = format!("parts of {} columns together", rows.dim());
        return Err(Error::shape("segments", must, format!("{:?}", request.segments)));
    }
    check_finite(request.queries, request.count, rows.dim(), watch)?;
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

/// Whether a query must not be answered with an example.
pub(super) fn excludes(excluded: &[Vec<u64>], query: usize, example: u64) -> bool {
    excluded.get(query).is_some_and(|list| list.binary_search(&example).is_ok())
}

/// Whether every value of `[checkpoints, queries, dim]` is finite.
pub(super) fn check_finite(
    values: &[f32],
    queries: usize,
    dim: usize,
    watch: &Watch<'_>,
) -> Result<(), Error> {
    let Some(at) = not_finite(values, watch)? else { return Ok(()) };
    Err(Error::NotFinite {
        argument: "queries",
        place: format!("query {}, column {}", at / dim % queries, at % dim),
        value: f64::from(values[at]),
    })
}

/// Where the first value is that is not finite.
pub(crate) fn not_finite(values: &[f32], watch: &Watch<'_>) -> Result<Option<usize>, Error> {
    /// Values between two looks at the watch.
    const STEP: usize = 1 << 18;
    for (values, at) in values.chunks(STEP).zip((0..).step_by(STEP)) {
        watch.check()?;
        if let Some(place) = values.iter().position(|value| !value.is_finite()) {
            return Ok(Some(at + place));
        }
    }
    Ok(None)
}

/// Scores some examples for one query, as [`ends`] does.
#[derive(Default)]
pub(super) struct Scorer {
    numbers: Vec<u64>,
    values: Vec<f32>,
    scales: Vec<f32>,
    products: Vec<f32>,
    scores: Vec<f32>,
    cursor: Cursor,
}

impl Scorer {
    /// Appends examples with their scores; given with `[checkpoints, all]` numbers of rows of all
    /// examples; for query `query` of `[checkpoints, count, dim]`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a score is NaN or infinite; [`Error::Io`].
    pub(super) fn score(
        &mut self,
        rows: &Rows,
        (numbers, all, examples): (&[u64], usize, &[u32]),
        (queries, count, query): (&[f32], usize, usize),
        hits: &mut Vec<Hit>,
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        let (dim, set) = (rows.dim(), InstructionSet::best());
        self.values.resize(examples.len() * dim, 0.0);
        self.products.resize(examples.len(), 0.0);
        self.scores.clear();
        self.scores.resize(examples.len(), 0.0);
        for (checkpoint, queries) in queries.chunks_exact(count * dim).enumerate() {
            self.numbers.clear();
            let row = |&example: &u32| number(numbers, all, checkpoint, example as usize);
            self.numbers.extend(examples.iter().map(row));
            let Self { numbers, values, scales, cursor, .. } = self;
            rows.read(numbers, values, scales, cursor, watch)?;
            set.dots(&self.values, &queries[query * dim..][..dim], dim, &mut self.products);
            for (score, (product, scale)) in
                self.scores.iter_mut().zip(self.products.iter().zip(&self.scales))
            {
                *score += scale * product;
            }
        }
        for (&score, &example) in self.scores.iter().zip(examples) {
            let example = u64::from(example);
            finite(score, query, example)?;
            hits.push(Hit { example, score: score + 0.0 }); // zeros of both signs are one score
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
    numbers: Vec<u64>,
    values: Vec<f32>,
    scales: Vec<f32>,
    cursor: Cursor,
    /// The queries that a block can matter to, and their rows.
    active: Vec<usize>,
    queries: Vec<f32>,
    products: Vec<f32>,
    scores: Vec<f32>,
    survivors: Vec<u32>,
    /// Of the active queries what a score must reach, or fall to.
    bounds: [Vec<f32>; 2],
    sieves: Vec<Sieve>,
    /// The same of all queries.
    above: Vec<f32>,
    below: Vec<f32>,
}

impl<'a> State<'a> {
    /// A worker that goes on from what has been found: it only counts what is new.
    fn new(scan: &Scan<'a>, found: &[Sieve]) -> Self {
        let set = InstructionSet::best();
        let sieves: Vec<Sieve> = found.iter().map(Sieve::emptied).collect();
        Self {
            of: Products::new(set, scan.rows.dim(), scan.request.segments),
            numbers: Vec::new(),
            values: Vec::new(),
            scales: Vec::new(),
            cursor: Cursor::default(),
            active: Vec::new(),
            queries: Vec::new(),
            products: Vec::new(),
            scores: Vec::new(),
            survivors: Vec::new(),
            bounds: Default::default(),
            above: sieves.iter().map(|sieve| sieve.above).collect(),
            below: sieves.iter().map(|sieve| sieve.below).collect(),
            sieves,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::{AtomicU64, Ordering as Atomic};

    use proptest::prelude::*;

    use super::*;
    use crate::random;
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
        (Shard::in_file(&path, 0, rows, dim, Kind::F32, None).unwrap(), Written(path))
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
            let norms: Vec<f32> = (0..examples)
                .map(|example| {
                    let row = |at: usize| {
                        let row = &values[at * dim..(at + 1) * dim];
                        scales[at] * row.iter().map(|x| x * x).sum::<f32>().sqrt()
                    };
                    row(example).hypot(row(examples - 1 - example)) * 1.0001
                })
                .collect();
            let norms = if count % 2 == 0 { &norms[..] } else { &[] };
            let request = Request {
                rows: &order,
                examples,
                queries: &queries,
                count,
                k,
                sides: Sides::BOTH,
                excluded: &excluded,
                norms,
                segments: &[],
            };
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
    fn norms_leave_out_nothing_that_matters() {
        for (seed, sides) in [
            (1, Sides::BOTH),
            (2, Sides { largest: true, smallest: false }),
            (3, Sides { largest: false, smallest: true }),
        ] {
            let (examples, dim, count) = (5000, 20, 40);
            let random =
                |i: usize| (random::value(seed, i as u64) >> 40) as f32 / 8_388_608.0 - 1.0;
            let values: Vec<f32> = (0..examples * dim).map(random).collect();
            let scales: Vec<f32> =
                (0..examples).map(|i| 10f32.powf(3.0 * random(i << 32))).collect();
            let queries: Vec<f32> = (0..count * dim).map(|i| random(i << 40)).collect();
            let rows = Rows::new(vec![Shard::in_memory(values, dim)], scales, dim).unwrap();
            let asker = Asker::new(&never);
            let norms = rows.norms(2, &asker).unwrap();
            let order: Vec<u64> = (0..examples as u64).collect();
            let (queries, rows_of, excluded, segments) = (&queries[..], &order[..], &[], &[]);
            let mut request = Request {
                rows: rows_of,
                examples,
                queries,
                count,
                k: 7,
                sides,
                excluded,
                norms: &norms,
                segments,
            };
            let found = ends(&rows, &request, 2, &asker).unwrap();
            request.norms = &[];
            assert_eq!(found, ends(&rows, &request, 1, &asker).unwrap());
            // In falling order of norms, and in memory, the same examples under other numbers.
            let mut by_norm = order.clone();
            by_norm.sort_by(|&a, &b| norms[b as usize].total_cmp(&norms[a as usize]));
            let sorted = rows.gathered(&by_norm, &Watch::none()).unwrap();
            let norms: Vec<f32> = by_norm.iter().map(|&at| norms[at as usize]).collect();
            request.norms = &norms;
            for (found, sorted) in found.iter().zip(ends(&sorted, &request, 2, &asker).unwrap()) {
                let renamed = |hit: &Hit| Hit { example: by_norm[hit.example as usize], ..*hit };
                let largest: Vec<Hit> = sorted.largest.iter().map(renamed).collect();
                let smallest: Vec<Hit> = sorted.smallest.iter().map(renamed).collect();
                assert_eq!((&found.largest, &found.smallest), (&largest, &smallest));
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
            norms: &[],
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
                norms: &[],
                segments: &[],
            };
            let found = ends(&rows, &request, 1, &Asker::new(&never));
            assert!(matches!(found, Err(Error::NotFinite { .. })));
        }
    }
}
