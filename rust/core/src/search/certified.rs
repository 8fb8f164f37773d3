//! Search by codes, whose bounds prove that the answer is the scan's.
//!
//! Block after block, in falling order of norms: the products of the codes' segments with the
//! queries' give estimates of all scores, and bounds of how far off they are. A row stays only while
//! its score may reach the k-th best that is certain so far; those that stay to the end are scored
//! exactly, in the order of what they may reach, until nothing that is left can matter. Nothing here
//! decides by an estimate alone, unless the caller asked for an approximate answer.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering as Atomic};

use half::bf16;

use super::codes::{BLOCK, Bits, CodedQuery, CodedSegment, Codes, Segment};
use super::exact::{Scorer, excludes};
use super::rows::check_numbers;
use super::{Ends, Hit, Rows, Sides, top};
use crate::error::Error;
use crate::kernels::InstructionSet;
use crate::order;
use crate::parallel::collect;
use crate::stop::{Asker, Watch};

/// Queries that meet a block together.
const GROUP: usize = 32;
/// From so many queries on, all bits of the codes are taken at once: reading them is not what takes
/// the time then, and a product of 8 bits takes no longer than one of 4.
const SEVERAL: usize = 4;
/// A query of which more than this share of a block's rows is left goes on with all of them.
const DENSE: usize = 4;
/// Rows that are scored exactly at a time.
const BATCH: usize = 16;
/// What products of numbers near the smallest that there are may lose, whatever the scale.
const SMALLEST: f32 = 1e-35;

/// What to search for in [`Codes`].
pub struct Request<'a> {
    /// The rows that the codes are of.
    pub rows: &'a Rows,
    /// `[checkpoints, examples]`: the number of the row of each example at each checkpoint; empty
    /// for one checkpoint whose rows have the numbers of their examples.
    pub numbers: &'a [u64],
    /// `[checkpoints, queries, dim]`: the query rows, each times the weight of its checkpoint.
    pub queries: &'a [f32],
    /// How many queries there are.
    pub count: usize,
    /// How many hits to return at each end.
    pub k: usize,
    /// Which ends to return.
    pub sides: Sides,
    /// Whether each example may be returned; empty for all.
    pub eligible: &'a [bool],
    /// For each query the examples it must not return, in rising order; empty for none at all.
    pub excluded: &'a [Vec<u64>],
    /// For how many candidates of each end, chosen by the codes' estimates, to stop short of proof.
    pub candidates: Option<usize>,
}

impl Request<'_> {
    /// Whether a query may be answered with an example.
    pub(super) fn allows(&self, query: usize, example: u32) -> bool {
        self.eligible.get(example as usize) != Some(&false)
            && !excludes(self.excluded, query, u64::from(example))
    }
}

/// An answer and what it took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// What was found.
    pub ends: Ends,
    /// How many rows were scored exactly.
    pub scored: usize,
    /// For an approximate answer: by how much the last hit of each end is better than the best
    /// estimate among those that were not scored; negative where that one promised more.
    /// Infinite where all were scored.
    pub margins: [f32; 2],
}

/// What may still be among the best: what its score reaches at most, and at least, and its place.
/// For the smallest scores all with the sign turned.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    most: f32,
    least: f32,
    place: u32,
}

/// The candidates of a query for one end.
#[derive(Clone, Debug)]
struct Pool {
    /// What a candidate must reach.
    threshold: f32,
    all: Vec<Candidate>,
    /// When to look again for what has fallen behind.
    full: usize,
    k: usize,
}

impl Pool {
    fn new(k: usize, wanted: bool) -> Self {
        let threshold = if wanted { f32::NEG_INFINITY } else { f32::INFINITY };
        Self { threshold, all: Vec::new(), full: k.saturating_mul(2).saturating_add(32), k }
    }

    #[inline]
    fn add(&mut self, candidate: Candidate) {
        // What is no number stays: its exact score will say what it is.
        let Candidate { most, least, place } = candidate;
        let most = if most.is_nan() { f32::INFINITY } else { most };
        let least = if least.is_nan() { f32::NEG_INFINITY } else { least };
        if most < self.threshold {
            return;
        }
        self.all.push(Candidate { most, least, place });
        if self.all.len() >= self.full {
            self.prune();
        }
    }

    /// Raises the threshold to the `k`-th best that is certain, and drops what does not reach it.
    fn prune(&mut self) {
        if self.k == 0 || self.all.len() < self.k {
            return;
        }
        self.all.select_nth_unstable_by(self.k - 1, |a, b| b.least.total_cmp(&a.least));
        let threshold = self.all[self.k - 1].least;
        if threshold > self.threshold {
            self.threshold = threshold;
        }
        let threshold = self.threshold;
        self.all.retain(|candidate| candidate.most >= threshold);
        self.full = self.all.len().saturating_mul(2).max(self.k.saturating_mul(2)) + 32;
    }

    /// Drops what has fallen behind; the rest in falling order of what it reaches at most.
    fn sort(&mut self, order: &[u32], watch: &Watch<'_>) -> Result<(), Error> {
        self.prune();
        let example = |candidate: &Candidate| order[candidate.place as usize];
        order::sort(&mut self.all, watch, |a, b| {
            b.most.total_cmp(&a.most).then_with(|| example(a).cmp(&example(b)))
        })
    }
}

/// The highest threshold that any worker knows of, of both ends of a query.
struct Shared([AtomicU32; 2]);

impl Shared {
    fn new() -> Self {
        Self([AtomicU32::new(0), AtomicU32::new(0)])
    }

    fn meet(&self, side: usize, threshold: &mut f32) {
        let mine = top::rank(*threshold);
        let best = self.0[side].fetch_max(mine, Atomic::Relaxed);
        if best > mine {
            *threshold = top::of_rank(best);
        }
    }
}

/// The `k` examples with the largest and the smallest scores of each query.
///
/// Without `candidates` the same as [`super::ends`] returns, to the bit, whatever the data: at worst
/// every example is scored. O(queries · examples · length / 2) additions of products of 8 bits at
/// worst, and what is scored.
///
/// # Errors
/// [`Error::Shape`] if the arrays do not fit together; [`Error::NotFinite`] if a query or a score
/// that matters is not finite; [`Error::Io`]; [`Error::Stopped`].
pub fn search(
    codes: &Codes,
    request: &Request<'_>,
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Vec<Answer>, Error> {
    check(codes, request, &Watch::of(asker))?;
    let count = request.count;
    let k = request.k.min(codes.len());
    if count == 0 || k == 0 {
        return Ok(vec![Answer::default(); count]);
    }
    let queries = coded(codes, request, threads, asker)?;
    let blocks = codes.len().div_ceil(BLOCK);
    let groups = count.div_ceil(GROUP);
    let slices = threads.div_ceil(groups).clamp(1, blocks);
    let shared: Vec<Shared> = (0..count).map(|_| Shared::new()).collect();
    let wanted = [request.sides.largest, request.sides.smallest];
    let kept = request.candidates.map_or(k, |candidates| candidates.clamp(k, codes.len()));
    let parts = collect(
        groups * slices,
        threads,
        asker,
        || Scan::new(codes, request),
        |scan, job, watch| {
            let (group, slice) = (job / slices, job % slices);
            let first = group * GROUP;
            let last = count.min(first + GROUP);
            let mut pools: Vec<[Pool; 2]> =
                (first..last).map(|_| wanted.map(|wanted| Pool::new(kept, wanted))).collect();
            let here = (&queries[first..last], &shared[first..last]);
            scan.blocks((slice..blocks).step_by(slices), here, first, &mut pools, watch)?;
            Ok(pools)
        },
    )?;
    let mut pools: Vec<[Pool; 2]> =
        (0..count).map(|_| wanted.map(|wanted| Pool::new(kept, wanted))).collect();
    for (job, parts) in parts.into_iter().enumerate() {
        for (pools, parts) in pools[job / slices * GROUP..].iter_mut().zip(parts) {
            for (pool, part) in pools.iter_mut().zip(parts) {
                pool.threshold = pool.threshold.max(part.threshold);
                pool.all.extend(part.all);
            }
        }
    }
    score_candidates(codes, request, k, pools, threads, asker)
}

/// The queries as the codes meet them.
fn coded(
    codes: &Codes,
    request: &Request<'_>,
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Vec<CodedQuery>, Error> {
    let count = request.count;
    let threads = threads.min(1 + count / 8);
    collect(count, threads, asker, || (), |(), query, _| Ok(coded_query(codes, request, query)))
}

/// A query as the codes meet it.
pub(super) fn coded_query(codes: &Codes, request: &Request<'_>, query: usize) -> CodedQuery {
    let dim = request.rows.dim();
    // The weights are in the codes already.
    let rows = codes.weights().iter().enumerate().flat_map(|(checkpoint, &weight)| {
        let row = &request.queries[(checkpoint * request.count + query) * dim..][..dim];
        let inverse = f64::from(weight).recip();
        row.iter().map(move |&value| f64::from(value) * inverse)
    });
    CodedQuery::new(codes.rotation(), rows)
}

/// What a worker scans with.
struct Scan<'a> {
    set: InstructionSet,
    codes: &'a Codes,
    request: &'a Request<'a>,
    /// What rounding adds to a bound, as a share of the product of norms.
    slack: f32,
    /// Of a block: by segment scales, errors of the planes in use, tails.
    numbers: Vec<[Vec<f32>; 4]>,
    /// `[queries, rows]` of a block.
    products: Vec<i32>,
    estimates: Vec<f32>,
    bounds: Vec<f32>,
    survivors: Vec<u32>,
}

impl<'a> Scan<'a> {
    fn new(codes: &'a Codes, request: &'a Request<'a>) -> Self {
        let checkpoints = codes.weights().len();
        // Steps of rounding of a score: its lanes, their sum, scale, weight, sum over checkpoints;
        // and those of an estimate.
        let steps = request.rows.dim() / 16 + checkpoints + 2 * codes.segments().len() + 32;
        Self {
            set: InstructionSet::best(),
            codes,
            request,
            slack: steps as f32 * f32::EPSILON,
            numbers: vec![<[Vec<f32>; 4]>::default(); codes.segments().len()],
            products: vec![0; GROUP * BLOCK],
            estimates: vec![0.0; GROUP * BLOCK],
            bounds: vec![0.0; BLOCK],
            survivors: Vec::new(),
        }
    }

    /// Passes the queries, of which the first is query `first`, over blocks, into their pools.
    fn blocks(
        &mut self,
        blocks: impl Iterator<Item = usize>,
        (queries, shared): (&[CodedQuery], &[Shared]),
        first: usize,
        pools: &mut [[Pool; 2]],
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        let mut active: Vec<usize> = Vec::with_capacity(queries.len());
        for block in blocks {
            let reach = self.codes.reaches()[block];
            active.clear();
            active.extend((0..queries.len()).filter(|&query| {
                let coded = &queries[query];
                let most = (coded.norm + coded.error) * reach * (1.0 + self.slack) + SMALLEST;
                let mut any = false;
                for (side, pool) in pools[query].iter_mut().enumerate() {
                    shared[query].meet(side, &mut pool.threshold);
                    any |= most.is_nan() || most >= pool.threshold;
                }
                any
            }));
            if active.is_empty() {
                continue;
            }
            watch.check()?;
            let places = block * BLOCK..self.codes.len().min((block + 1) * BLOCK);
            self.block(places.start, places.len(), reach, queries, &active, first, pools);
        }
        Ok(())
    }

    /// One block of `rows` rows from place `start` on.
    fn block(
        &mut self,
        start: usize,
        rows: usize,
        reach: f32,
        queries: &[CodedQuery],
        active: &[usize],
        first: usize,
        pools: &mut [[Pool; 2]],
    ) {
        let last = self.codes.segments().len() - 1;
        let both = self.codes.bits() == Bits::Eight;
        for (index, (segment, numbers)) in
            self.codes.segments().iter().zip(&mut self.numbers).enumerate()
        {
            // Prefixes are taken with all the bits there are; the rest with its upper four first.
            let whole = both && index < last;
            let errors = if whole { &segment.errors } else { &segment.upper_errors };
            numbers[0].clear();
            numbers[0].extend_from_slice(&segment.scales[start..start + rows]);
            widen(&errors[start..start + rows], &mut numbers[1]);
            if index < last {
                widen(&segment.tails[start..start + rows], &mut numbers[2]);
            } else if both {
                widen(&segment.errors[start..start + rows], &mut numbers[3]);
            }
        }
        // A query goes on with all rows of the block, or, when few are left, with each by itself.
        let mut dense = active.to_vec();
        self.estimates[..active.len() * rows].fill(0.0);
        for stage in 0..=last {
            let segment = &self.codes.segments()[stage];
            let several = dense.len() >= SEVERAL && self.request.candidates.is_none();
            let exact = both && (stage < last || several);
            let mut views: [&[i8]; GROUP] = [&[]; GROUP];
            for (view, &query) in views.iter_mut().zip(&dense) {
                *view = &queries[query].segments[stage].factors;
            }
            let products = &mut self.products[..dense.len() * rows];
            let places = start..start + rows;
            multiply(self.set, segment, exact, places, &views[..dense.len()], products);
            let mut kept = Vec::with_capacity(dense.len());
            for (slot, &query) in dense.iter().enumerate() {
                let from = slot * rows;
                let coded = &queries[query];
                let (factor, offset) = factor_and_offset(&coded.segments[stage], exact);
                let estimates = &mut self.estimates[from..from + rows];
                let products = &self.products[from..from + rows];
                self.set.add_estimates(
                    products,
                    offset,
                    &self.numbers[stage][0],
                    factor,
                    estimates,
                );
                let mut bounds = std::mem::take(&mut self.bounds);
                self.bound(stage, exact, 0..rows, reach, coded, &mut bounds[..rows]);
                self.bounds = bounds;
                let pool = &mut pools[query];
                self.survivors.clear();
                self.set.sift(
                    &self.estimates[from..from + rows],
                    &self.bounds[..rows],
                    pool[0].threshold,
                    -pool[1].threshold,
                    &mut self.survivors,
                );
                if stage < last && self.survivors.len() * DENSE > rows {
                    kept.push((slot, query));
                    continue;
                }
                let survivors = std::mem::take(&mut self.survivors);
                for &row in &survivors {
                    let row = row as usize;
                    let estimate = self.estimates[from + row];
                    let query = (coded, first + query);
                    let refined = exact && stage == last;
                    self.finish(stage, start, row, (estimate, refined), reach, query, pool);
                }
                self.survivors = survivors;
            }
            // Estimates move up to the slots of those that go on.
            for (to, &(slot, _)) in kept.iter().enumerate() {
                self.estimates.copy_within(slot * rows..(slot + 1) * rows, to * rows);
            }
            dense.clear();
            dense.extend(kept.iter().map(|&(_, query)| query));
            if dense.is_empty() {
                break;
            }
        }
    }

    /// How far the estimates of some rows of the block are off after a stage; `refined` if the
    /// lower plane of the last segment is in.
    fn bound(
        &self,
        stage: usize,
        refined: bool,
        rows: Range<usize>,
        reach: f32,
        query: &CodedQuery,
        bounds: &mut [f32],
    ) {
        let last = self.numbers.len() - 1;
        if self.request.candidates.is_some() {
            // How far the estimate itself may still move.
            bounds.fill(0.0);
            if stage < last {
                let rest = (query.segments[stage].rest + query.error) * (1.0 + self.slack);
                bounds.fill(SMALLEST);
                let mut add = |numbers: &[f32]| {
                    self.set.add_multiple(&numbers[rows.clone()], rest, bounds);
                };
                add(&self.numbers[stage][2]);
                for numbers in &self.numbers[stage + 1..] {
                    add(&numbers[1]);
                }
            }
            return;
        }
        // What the query's code and rounding add, whatever the row.
        let rounding = query.error + self.slack * (query.norm + query.error);
        bounds.fill(rounding * reach + SMALLEST);
        let mut add =
            |numbers: &[f32], factor| self.set.add_multiple(&numbers[rows.clone()], factor, bounds);
        for (index, (numbers, segment)) in
            self.numbers[..=stage].iter().zip(&query.segments).enumerate()
        {
            add(if refined && index == last { &numbers[3] } else { &numbers[1] }, segment.norm);
        }
        if stage < last {
            add(&self.numbers[stage][2], query.segments[stage].rest);
        }
    }

    /// The rest of what can be known of a row that survived a stage; into the pools with it, if
    /// that leaves it a chance. `refined` if its lower plane is in the estimate already.
    fn finish(
        &self,
        stage: usize,
        start: usize,
        row: usize,
        (mut estimate, refined): (f32, bool),
        reach: f32,
        (query, number): (&CodedQuery, usize),
        pools: &mut [Pool; 2],
    ) {
        let place = start + row;
        let example = self.codes.order()[place];
        if !self.request.allows(number, example) {
            return;
        }
        let last = self.numbers.len() - 1;
        let both = self.codes.bits() == Bits::Eight;
        let bound_of = |stage, refined| {
            let mut bound = [0.0];
            self.bound(stage, refined, row..row + 1, reach, query, &mut bound);
            bound[0]
        };
        let mut bound = bound_of(stage, refined);
        let lost = |estimate: f32, bound: f32, pools: &[Pool; 2]| {
            estimate + bound < pools[0].threshold && bound - estimate < pools[1].threshold
        };
        for next in stage + 1..=last {
            let exact = both && next < last;
            let (segment, coded) = (&self.codes.segments()[next], &query.segments[next]);
            let mut product = [0];
            let places = place..place + 1;
            multiply(self.set, segment, exact, places, &[&coded.factors], &mut product);
            let (factor, offset) = factor_and_offset(coded, exact);
            let (scale, out) =
                (&self.numbers[next][0][row..=row], std::slice::from_mut(&mut estimate));
            self.set.add_estimates(&product, offset, scale, factor, out);
            bound = bound_of(next, false);
            if lost(estimate, bound, pools) {
                return;
            }
        }
        if both && !refined && self.request.candidates.is_none() {
            let (segment, coded) = (&self.codes.segments()[last], &query.segments[last]);
            let mut product = [0];
            let plane = place * segment.width..(place + 1) * segment.width;
            let lower = &segment.lower[plane];
            self.set.nibble_dots(lower, segment.width, &[&coded.factors], &mut product);
            // What the lower plane adds: scale (lower - 7.5).
            let (scale, out) =
                (&self.numbers[last][0][row..=row], std::slice::from_mut(&mut estimate));
            self.set.add_estimates(&product, 15 * coded.sum, scale, coded.scale / 2.0, out);
            bound = bound_of(last, true);
        }
        for (pool, estimate) in pools.iter_mut().zip([estimate, -estimate]) {
            let (most, least) = (estimate + bound, estimate - bound);
            pool.add(Candidate { most, least, place: place as u32 });
        }
    }
}

/// The products of the codes at some places with the segments of queries, `[queries, places]`: of
/// all their bits if `exact`, else of the upper ones.
fn multiply(
    set: InstructionSet,
    segment: &Segment,
    exact: bool,
    places: Range<usize>,
    queries: &[&[i8]],
    products: &mut [i32],
) {
    let plane = places.start * segment.width..places.end * segment.width;
    let upper = &segment.upper[plane.clone()];
    if exact {
        set.code_dots(upper, &segment.lower[plane], segment.width, queries, products);
    } else {
        set.nibble_dots(upper, segment.width, queries, products);
    }
}

/// What a product of codes is multiplied with beside the row's scale, and what is taken off twice
/// the product before: codes stand for numbers from their middle.
fn factor_and_offset(query: &CodedSegment, exact: bool) -> (f32, i32) {
    if exact { (query.scale / 2.0, 255 * query.sum) } else { (query.scale * 8.0, 15 * query.sum) }
}

/// Numbers of 16 bits as f32.
fn widen(numbers: &[bf16], out: &mut Vec<f32>) {
    out.clear();
    out.extend(numbers.iter().map(|number| f32::from_bits(u32::from(number.to_bits()) << 16)));
}

/// Scores the candidates exactly, those that promise most first, until the rest cannot matter.
fn score_candidates(
    codes: &Codes,
    request: &Request<'_>,
    k: usize,
    pools: Vec<[Pool; 2]>,
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Vec<Answer>, Error> {
    let pools: Vec<_> = pools.into_iter().map(Mutex::new).collect();
    collect(request.count, threads, asker, Scorer::default, |scorer, query, watch| {
        let mut pools = pools[query].lock().map_err(Error::panicked)?;
        let mut answer = Answer { margins: [f32::INFINITY; 2], ..Answer::default() };
        for (side, pool) in pools.iter_mut().enumerate() {
            let mut score = |examples: &[u32], hits: &mut Vec<Hit>| {
                watch.check()?;
                let examples = (request.numbers, codes.len(), examples);
                let queries = (request.queries, request.count, query);
                scorer.score(request.rows, examples, queries, hits, watch)
            };
            pool.sort(codes.order(), watch)?;
            // Proof goes on from the first `k` as far as it has to.
            let mut least = k;
            if request.candidates.is_some() {
                pool.all.truncate(pool.k);
                least = pool.k;
            }
            let order = (codes.order(), side);
            let (hits, scored) = best(&pool.all, order, k, least, &mut score, watch)?;
            answer.scored += scored;
            if request.candidates.is_some()
                && let (Some(hit), Some(candidate)) = (hits.last(), pool.all.get(pool.k - 1))
            {
                answer.margins[side] = signed(hit.score, side) - candidate.most;
            }
            *[&mut answer.ends.largest, &mut answer.ends.smallest][side] = hits;
        }
        Ok(answer)
    })
}

/// A score as the pool of a side has it.
fn signed(score: f32, side: usize) -> f32 {
    if side == top::LARGEST { score } else { -score }
}

/// The best `k` of candidates in falling order of what they may reach, of which at least the first
/// `least` are scored; and how many were.
fn best(
    mut candidates: &[Candidate],
    (order, side): (&[u32], usize),
    k: usize,
    least: usize,
    score: &mut impl FnMut(&[u32], &mut Vec<Hit>) -> Result<(), Error>,
    watch: &Watch<'_>,
) -> Result<(Vec<Hit>, usize), Error> {
    let (mut hits, mut scored) = (Vec::new(), 0);
    let mut examples = Vec::new();
    while let Some(next) = candidates.first() {
        let mut size = least;
        if scored >= least {
            top::keep(&mut hits, k, side);
            if next.most < signed(hits[k - 1].score, side) {
                break;
            }
            size = BATCH.max(k / 4);
        }
        let (here, after) = candidates.split_at(size.min(candidates.len()));
        candidates = after;
        examples.clear();
        examples.extend(here.iter().map(|candidate| order[candidate.place as usize]));
        order::sort(&mut examples, watch, Ord::cmp)?; // rows that lie together are read together
        score(&examples, &mut hits)?;
        scored += here.len();
    }
    Ok((top::finish(hits, k, side, watch)?, scored))
}

pub(super) fn check(codes: &Codes, request: &Request<'_>, watch: &Watch<'_>) -> Result<(), Error> {
    let (checkpoints, dim) = (codes.weights().len(), request.rows.dim());
    if checkpoints.checked_mul(dim) != Some(codes.rotation().length()) {
        let must = format!("{} wide", codes.rotation().length() / checkpoints.max(1));
        return Err(Error::shape("rows", must, dim));
    }
    check_numbers("numbers", request.numbers, checkpoints, codes.len())?;
    let width = checkpoints.checked_mul(dim).and_then(|width| width.checked_mul(request.count));
    if width != Some(request.queries.len()) {
        let must = format!("[{checkpoints}, {}, {dim}]", request.count);
        return Err(Error::shape("queries", must, request.queries.len()));
    }
    if !request.eligible.is_empty() && request.eligible.len() != codes.len() {
        let must = format!("{} values", codes.len());
        return Err(Error::shape("eligible", must, request.eligible.len()));
    }
    super::exact::check_excluded(request.excluded, request.count)?;
    super::exact::check_finite(request.queries, request.count, dim, watch)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::random;
    use crate::search::rotation::{Rotation, UNIT};
    use crate::search::{self, ends};
    use crate::stop::never;
    use crate::store::Shard;

    struct Data {
        rows: Rows,
        numbers: Vec<u64>,
        norms: Vec<f32>,
    }

    /// Rows of some kind of hostility: 0 none, 1 whole numbers with ties everywhere, 2 all rows the
    /// same, 3 norms over decades, 4 numbers near the smallest there are, 5 zeros among others.
    fn data(kind: u8, examples: usize, checkpoints: usize, dim: usize, seed: u64) -> Data {
        let random = |i: usize| (random::value(seed, i as u64) >> 40) as f32 / 8_388_608.0 - 1.0;
        let total = examples * checkpoints;
        let value = |i: usize| match kind {
            1 => (random(i) * 2.5).round(),
            2 => random(i % dim),
            3 => random(i) * 10f32.powf(12.0 * random(total * dim + i / dim)),
            4 => random(i) * 1e-38,
            5 if !(i / dim).is_multiple_of(3) => 0.0,
            _ => random(i),
        };
        let values: Vec<f32> = (0..total * dim).map(value).collect();
        let scales: Vec<f32> = (0..total).map(|i| (i % 4) as f32 * 0.5).collect();
        let norms = (0..examples).map(|i| values[i * dim].abs()).collect(); // any order will do
        let rows = Rows::new(vec![Shard::in_memory(values, dim)], scales, dim).unwrap();
        // The rows of a checkpoint in order, those of the next reversed.
        let numbers = (0..checkpoints)
            .flat_map(|checkpoint| {
                (0..examples).map(move |i| {
                    let i = if checkpoint % 2 == 0 { i } else { examples - 1 - i };
                    (checkpoint * examples + i) as u64
                })
            })
            .collect();
        Data { rows, numbers, norms }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(192))]

        #[test]
        fn the_answer_is_the_scans_whatever_the_data(
            kind in 0u8..6, examples in 1usize..700, checkpoints in 1usize..3, dim in 1usize..150,
            count in 1usize..40, k in 1usize..60, eight in any::<bool>(), prefix in any::<bool>(),
            filter in 0usize..4, largest in any::<bool>(), threads in 1usize..4, seed in any::<u64>(),
            added in 0usize..700,
        ) {
            let Data { rows, numbers, norms } = data(kind, examples, checkpoints, dim, seed);
            let length = checkpoints * dim;
            let prefix = if prefix && length > UNIT { vec![UNIT] } else { vec![] };
            let directions: Vec<f64> =
                (0..2 * length).map(|i| (random::value(seed ^ 3, i as u64) % 64) as f64 - 31.5).collect();
            let rotation = Rotation::new(length, &prefix, &directions, seed).unwrap();
            let bits = if eight { Bits::Eight } else { Bits::Four };
            let weights = &[0.5, 2.0][..checkpoints];
            let asker = Asker::new(&never);
            // Those of the first examples, and those of the others after them.
            let made = |from: usize, to: usize| {
                let numbers: Vec<u64> =
                    numbers.chunks(examples).flat_map(|numbers| &numbers[from..to]).copied().collect();
                let (norms, rotation) = (&norms[from..to], rotation.clone());
                Codes::new(&rows, &numbers, weights, norms, rotation, bits, threads, &asker).unwrap()
            };
            let first = examples - added.min(examples);
            let codes = made(0, first).appended(&made(first, examples), &Watch::none()).unwrap();
            prop_assert_eq!(codes.bits(), bits);
            let size = (checkpoints, examples);
            let digest = rows.digest(&numbers, size, examples, threads, &asker).unwrap();
            prop_assert_eq!(codes.digest(), digest);
            let some = rows.digest(&numbers, size, first, 1, &asker).unwrap();
            prop_assert_eq!(made(0, first).digest(), some);
            let back = Codes::from_parts(
                codes.rotation().clone(), codes.weights().to_vec(), codes.order().to_vec(),
                codes.segments().to_vec(), codes.reaches().to_vec(), codes.digest(), &Watch::none(),
            );
            prop_assert_eq!(&back.unwrap(), &codes);
            let queries: Vec<f32> = (0..count * length)
                .map(|i| (random::value(seed ^ 1, i as u64) >> 40) as f32 / 8_388_608.0 - 1.0)
                .map(|value| if kind == 1 { (2.0 * value).round() } else { value })
                .collect();
            let eligible: Vec<bool> = match filter {
                0 => Vec::new(),
                _ => (0..examples).map(|i| i % (3 * filter) < 2).collect(),
            };
            let excluded: Vec<Vec<u64>> = match filter {
                1 => (0..count as u64).map(|q| (q % 4..examples as u64).step_by(5).collect()).collect(),
                _ => Vec::new(),
            };
            let sides = Sides { largest, smallest: !largest || seed % 2 == 0 };
            let request = Request {
                rows: &rows, numbers: &numbers, queries: &queries, count, k, sides,
                eligible: &eligible, excluded: &excluded, candidates: None,
            };
            let found = search(&codes, &request, threads, &asker).unwrap();
            // The scan takes the eligible alone, and numbers them anew.
            let picked: Vec<usize> =
                (0..examples).filter(|&i| eligible.get(i) != Some(&false)).collect();
            let scan_numbers: Vec<u64> = numbers
                .chunks(examples)
                .flat_map(|numbers| picked.iter().map(|&i| numbers[i]))
                .collect();
            let renamed: Vec<Vec<u64>> = excluded
                .iter()
                .map(|list| {
                    let place = |example: &u64| picked.binary_search(&(*example as usize)).ok();
                    list.iter().filter_map(place).map(|place| place as u64).collect()
                })
                .collect();
            let scan = search::Request {
                rows: &scan_numbers, examples: picked.len(), queries: &queries, count, k, sides,
                excluded: &renamed, norms: &[], segments: &[],
            };
            let expected = ends(&rows, &scan, 1, &asker).unwrap();
            for (found, expected) in found.iter().zip(expected) {
                for (found, expected) in [
                    (&found.ends.largest, expected.largest), (&found.ends.smallest, expected.smallest)
                ] {
                    let expected: Vec<Hit> = expected
                        .into_iter()
                        .map(|hit| Hit { example: picked[hit.example as usize] as u64, ..hit })
                        .collect();
                    prop_assert_eq!(found, &expected);
                }
            }
        }

        #[test]
        fn an_approximate_answer_is_that_of_the_best_estimates(
            examples in 200usize..600, k in 1usize..6, threads in 1usize..4, seed in any::<u64>(),
            prefix in any::<bool>(), eight in any::<bool>(),
        ) {
            let dim = 130;
            let Data { rows, numbers, norms } = data(0, examples, 1, dim, seed);
            let prefix = if prefix { vec![UNIT] } else { vec![] };
            let rotation = Rotation::new(dim, &prefix, &[], seed).unwrap();
            let asker = Asker::new(&never);
            let bits = if eight { Bits::Eight } else { Bits::Four };
            let codes =
                Codes::new(&rows, &numbers, &[1.0], &norms, rotation, bits, 2, &asker).unwrap();
            let queries: Vec<f32> =
                (0..3 * dim).map(|i| (random::value(seed ^ 1, i as u64) >> 40) as f32).collect();
            let mut request = Request {
                rows: &rows, numbers: &numbers, queries: &queries, count: 3, k, sides: Sides::BOTH,
                eligible: &[], excluded: &[], candidates: Some(4 * k),
            };
            let found = search(&codes, &request, threads, &asker).unwrap();
            prop_assert_eq!(&found, &search(&codes, &request, 1, &asker).unwrap());
            request.candidates = None;
            let proven = search(&codes, &request, 1, &asker).unwrap();
            request.candidates = Some(examples);
            let all = search(&codes, &request, 1, &asker).unwrap();
            for (((found, proven), all), queries) in
                found.iter().zip(&proven).zip(&all).zip(queries.chunks(dim))
            {
                // Of all candidates the best are the best.
                prop_assert_eq!(&all.ends, &proven.ends);
                prop_assert_eq!(found.scored, 8 * k);
                prop_assert_eq!((found.ends.largest.len(), found.ends.smallest.len()), (k, k));
                // No score is better than the scan's of that rank, and every score is the row's own.
                for rank in 0..k {
                    let (mine, best) = (found.ends.largest[rank], proven.ends.largest[rank]);
                    prop_assert!(mine.score <= best.score);
                    let (mine, best) = (found.ends.smallest[rank], proven.ends.smallest[rank]);
                    prop_assert!(mine.score >= best.score);
                }
                for hit in found.ends.largest.iter().chain(&found.ends.smallest) {
                    let row = rows.scaled(&[hit.example], &Watch::none()).unwrap();
                    let exact: f64 =
                        row.iter().zip(queries).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
                    let size: f64 =
                        row.iter().zip(queries).map(|(x, y)| f64::from((x * y).abs())).sum();
                    prop_assert!((f64::from(hit.score) - exact).abs() <= 1e-5 * size);
                }
            }
        }
    }

    struct Parts {
        weights: Vec<f32>,
        order: Vec<u32>,
        segments: Vec<Segment>,
        reaches: Vec<f32>,
    }

    #[test]
    fn parts_that_a_search_could_not_rely_on_are_refused() {
        let Data { rows, numbers, norms } = data(0, 300, 1, 100, 1);
        let rotation = Rotation::new(100, &[UNIT], &[], 0).unwrap();
        let asker = Asker::new(&never);
        let codes =
            Codes::new(&rows, &numbers, &[1.0], &norms, rotation, Bits::Eight, 1, &asker).unwrap();
        let with = |change: &dyn Fn(&mut Parts)| {
            let mut parts = Parts {
                weights: codes.weights().to_vec(),
                order: codes.order().to_vec(),
                segments: codes.segments().to_vec(),
                reaches: codes.reaches().to_vec(),
            };
            change(&mut parts);
            let Parts { weights, order, segments, reaches } = parts;
            let rotation = codes.rotation().clone();
            Codes::from_parts(
                rotation,
                weights,
                order,
                segments,
                reaches,
                codes.digest(),
                &Watch::none(),
            )
        };
        assert!(with(&|_| ()).is_ok());
        assert!(with(&|parts| parts.weights[0] = 0.0).is_err());
        assert!(with(&|parts| parts.weights.extend([1.0, 1.0])).is_err());
        assert!(with(&|parts| parts.order[1] = parts.order[0]).is_err());
        assert!(with(&|parts| parts.order[0] = 300).is_err());
        assert!(with(&|parts| parts.order.truncate(299)).is_err());
        assert!(with(&|parts| parts.segments.truncate(1)).is_err());
        assert!(with(&|parts| parts.segments.clear()).is_err());
        assert!(with(&|parts| parts.segments[0].width = 0).is_err());
        assert!(with(&|parts| parts.segments[1].lower.clear()).is_err());
        assert!(with(&|parts| parts.segments[0].tails.clear()).is_err());
        assert!(with(&|parts| parts.segments[0].scales[7] = f32::NAN).is_err());
        assert!(with(&|parts| parts.segments[0].errors[7] = bf16::from_f32(-1.0)).is_err());
        assert!(with(&|parts| parts.reaches[2] = -1.0).is_err());
        assert!(with(&|parts| parts.reaches[0] = f32::NAN).is_err());
        assert!(with(&|parts| parts.reaches.truncate(1)).is_err());
    }

    #[test]
    fn few_rows_are_scored_where_norms_differ() {
        let Data { rows, numbers, .. } = data(3, 4000, 1, 64, 7);
        let values = rows.scaled(&numbers, &Watch::none()).unwrap();
        let norms: Vec<f32> = values
            .chunks(64)
            .map(|row| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32)
            .collect();
        let rotation = Rotation::new(64, &[], &[], 0).unwrap();
        let asker = Asker::new(&never);
        let codes =
            Codes::new(&rows, &numbers, &[1.0], &norms, rotation, Bits::Eight, 1, &asker).unwrap();
        let queries = vec![0.25; 64];
        let request = Request {
            rows: &rows,
            numbers: &numbers,
            queries: &queries,
            count: 1,
            k: 5,
            sides: Sides::BOTH,
            eligible: &[],
            excluded: &[],
            candidates: None,
        };
        let found = search(&codes, &request, 1, &asker).unwrap();
        assert!(found[0].scored < 60, "{}", found[0].scored);
    }

    #[test]
    fn what_does_not_fit_and_what_overflows_are_errors() {
        let Data { rows, numbers, norms } = data(0, 10, 1, 4, 1);
        let asker = Asker::new(&never);
        let rotation = || Rotation::new(4, &[], &[], 0).unwrap();
        let new = |numbers: &[u64], weights: &[f32], norms: &[f32], rotation| {
            Codes::new(&rows, numbers, weights, norms, rotation, Bits::Four, 1, &asker)
        };
        assert!(new(&numbers[1..], &[1.0], &norms, rotation()).is_err());
        assert!(new(&numbers, &[f32::NAN], &norms, rotation()).is_err());
        assert!(new(&numbers, &[], &norms, rotation()).is_err());
        assert!(new(&[77; 10], &[1.0], &norms, rotation()).is_err());
        let wide = Rotation::new(5, &[], &[], 0).unwrap();
        assert!(new(&numbers, &[1.0], &norms, wide).is_err());
        let codes = new(&numbers, &[1.0], &norms, rotation()).unwrap();
        let ask = |numbers: &[u64], queries: &[f32], eligible: &[bool], excluded: &[Vec<u64>]| {
            let request = Request {
                rows: &rows,
                numbers,
                queries,
                count: 1,
                k: 1,
                sides: Sides::BOTH,
                eligible,
                excluded,
                candidates: None,
            };
            search(&codes, &request, 1, &asker)
        };
        assert!(ask(&numbers, &[1.0; 4], &[], &[]).is_ok());
        assert!(ask(&numbers[1..], &[1.0; 4], &[], &[]).is_err());
        assert!(ask(&numbers, &[1.0; 3], &[], &[]).is_err());
        assert!(ask(&numbers, &[f32::NAN; 4], &[], &[]).is_err());
        assert!(ask(&numbers, &[1.0; 4], &[true], &[]).is_err());
        assert!(ask(&numbers, &[1.0; 4], &[], &[vec![], vec![]]).is_err());
        assert!(matches!(
            ask(&numbers, &[f32::MAX, f32::MAX, f32::MAX, f32::MAX], &[], &[]),
            Err(Error::NotFinite { .. })
        ));
        let huge =
            Rows::new(vec![Shard::in_memory(vec![f32::MAX; 8], 4)], vec![3.0; 2], 4).unwrap();
        let found =
            Codes::new(&huge, &[0, 1], &[1.0], &[1.0; 2], rotation(), Bits::Four, 1, &asker);
        assert!(matches!(found, Err(Error::NotFinite { .. })));
    }
}
