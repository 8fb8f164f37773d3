//! Approximate search: a walk from near examples to nearer ones.
//!
//! Every example is a node with up to [`DEGREE`] links to near ones; near by the cosine of their
//! codes of 4 bits, which can be had from whole numbers alone. A search compares the query with some
//! nodes spread over all, the entries, and walks on from the nearest; what it finds is scored
//! exactly. Of cosines and not of inner products, since those of a few long rows are the largest
//! with everything, and what only they link to is lost.
//!
//! Links are built leaf by leaf, not node by node: nodes that have the same pivots among their
//! nearest are compared in tiles, all with all (after `PiPNN`, arXiv 2602.21247), and each node keeps
//! of its nearest those that are not nearer to one it keeps (Malkov and Yashunin, arXiv 1603.09320;
//! `DiskANN`'s rule). Then whatever no walk could come to is linked to what it can.
//!
//! It is not for everything. The smallest scores are not looked for: there are no links to what is
//! far. Where norms are spread widely ([`Graph::norm_spread`]) the nearest by cosine are not the best
//! by inner product. Filters that few pass, a large `k` and few examples are better off with the
//! scan by the same codes ([`Graph::codes`]), whose answer is proven.

mod build;
mod walk;

use std::sync::Arc;

use self::build::Reached;
use self::walk::{Directions, Gathered, Probe, TILE, Walker, near_of, node_of};
use super::Ends;
use super::certified::{Answer, Request, check, coded_query};
use super::codes::Codes;
use super::exact::Scorer;
use super::top::{self, LARGEST};
use crate::error::Error;
use crate::kernels::InstructionSet;
use crate::memory;
use crate::order;
use crate::parallel::collect;
use crate::random;
use crate::stop::{Asker, Watch};

/// The most links of a node: two lines of a cache.
pub const DEGREE: usize = 32;
/// In the place of a link that there is not.
pub const NONE: u32 = u32::MAX;
/// How many entries there are, as a multiple of the square root of the nodes.
const ENTRIES: usize = 4;

/// Examples linked to near ones.
#[derive(Clone, Debug, PartialEq)]
pub struct Graph {
    /// Node `i` is the example at place `i`.
    codes: Arc<Codes>,
    /// `[nodes, segments]`: what makes unit vectors of codes.
    factors: Vec<f32>,
    /// `[examples]`
    norms: Vec<f32>,
    /// The largest of them over that in the middle.
    spread: f32,
    /// `[nodes, DEGREE]`: the nearest first, [`NONE`] after the last.
    links: Vec<u32>,
    entries: Gathered,
}

/// What a [`Graph`] is made of beside its codes, in flat arrays.
#[derive(Clone, Debug, PartialEq)]
pub struct Parts {
    /// `[examples]`: the norms of the examples.
    pub norms: Vec<f32>,
    /// `[nodes, DEGREE]`: the links of the node at each place, [`NONE`] after the last.
    pub links: Vec<u32>,
    /// The nodes at which walks begin.
    pub entries: Vec<u32>,
}

/// So many nodes more at which walks begin as are missing, of those from `first` on.
fn more_entries(entries: &mut Vec<u32>, first: usize, nodes: usize, seed: u64) {
    let wanted = (ENTRIES * ENTRIES * nodes).isqrt();
    let (count, room) = (wanted.saturating_sub(entries.len()), (nodes - first) as u32);
    let key = random::parameter_key(seed, "entries", &[first as u64]);
    let draw = |at| first as u32 + random::below(random::value(key, at), room) as u32;
    entries.extend((0..count as u64).map(draw));
    entries.sort_unstable();
    entries.dedup();
}

/// The largest norm over that in the middle.
fn spread_of(norms: &[f32]) -> f32 {
    let mut norms = norms.to_vec();
    if norms.is_empty() {
        return 1.0;
    }
    let middle = norms.len() / 2;
    let (_, &mut middle, above) = norms.select_nth_unstable_by(middle, f32::total_cmp);
    let largest = above.iter().fold(middle, |largest, &norm| largest.max(norm));
    if largest == middle { 1.0 } else { largest / middle }
}

fn check_norms(norms: &[f32], examples: usize) -> Result<(), Error> {
    if norms.len() != examples {
        return Err(Error::shape("norms", format!("{examples} values"), norms.len()));
    }
    match norms.iter().find(|norm| !(norm.is_finite() && **norm >= 0.0)) {
        Some(norm) => Err(Error::argument("norms", "finite and not negative", norm)),
        None => Ok(()),
    }
}

impl Graph {
    /// The graph of coded examples, whose norms are about `norms`.
    ///
    /// The same for any number of threads. O(examples · length of a code · leaf) time, and 1 KiB an
    /// example of memory while it is built.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Argument`] if the norms are not one finite number an example;
    /// [`Error::Stopped`].
    pub fn new(
        codes: Arc<Codes>,
        norms: Vec<f32>,
        seed: u64,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Self, Error> {
        check_norms(&norms, codes.len())?;
        let watch = &Watch::of(asker);
        let factors = walk::factors(&codes, watch)?;
        let directions = directions(&codes, &factors);
        let mut entries = Vec::new();
        more_entries(&mut entries, 0, codes.len(), seed);
        let entries = Gathered::new(&directions, entries, watch)?;
        let links = build::build(&directions, &entries, seed, threads, asker)?;
        Ok(Self { codes, factors, spread: spread_of(&norms), norms, links, entries })
    }

    /// A graph with more examples, numbered on from the last: their codes, made as those of the
    /// others, and their norms.
    ///
    /// The same for any number of threads; not the same as a graph of all from the start, but as good.
    /// Fewer than there are, are linked one by one to what a walk finds; else all is built anew.
    /// O(added · walk) time, and that of a copy of the whole.
    ///
    /// # Errors
    /// As [`Graph::new`] and [`Codes::appended`].
    pub fn grown(
        &self,
        more: &Codes,
        norms: &[f32],
        seed: u64,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Self, Error> {
        check_norms(norms, more.len())?;
        let before = self.codes.len();
        let watch = &Watch::of(asker);
        let codes = Arc::new(self.codes.appended(more, watch)?);
        let all: Vec<f32> = self.norms.iter().chain(norms).copied().collect();
        if more.len() >= before {
            return Self::new(codes, all, seed, threads, asker);
        }
        let factors = walk::factors(&codes, watch)?;
        let directions = directions(&codes, &factors);
        let mut links = memory::copied(&self.links, watch)?;
        build::extend(&directions, &mut links, &self.entries, threads, asker)?;
        let mut entries = self.entries.nodes.clone();
        if !more.is_empty() {
            more_entries(&mut entries, before, codes.len(), seed);
        }
        let entries = Gathered::new(&directions, entries, watch)?;
        build::repair(&directions, &mut links, &entries, asker)?;
        Ok(Self { codes, factors, spread: spread_of(&all), norms: all, links, entries })
    }

    /// Up to `k` of the examples with the largest scores of each query, best first.
    ///
    /// Approximate: a walk ends when `width` nodes are known that are nearer than all it could go on
    /// to; the `request.candidates` of them that promise most, all if that is not said, are scored
    /// exactly. Both are at least `k`. Fewer than `k` come back where fewer are eligible and met.
    ///
    /// # Errors
    /// [`Error::Argument`] if the smallest scores are asked for; as [`super::certified::search`].
    pub fn search(
        &self,
        request: &Request<'_>,
        width: usize,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Vec<Answer>, Error> {
        check(&self.codes, request, &Watch::of(asker))?;
        if request.sides.smallest {
            let must = "the largest alone: no links lead to the smallest scores";
            return Err(Error::argument("sides", must, "the smallest"));
        }
        let (count, nodes) = (request.count, self.codes.len());
        let k = request.k.min(nodes);
        if count == 0 || k == 0 || !request.sides.largest {
            return Ok(vec![Answer::default(); count]);
        }
        let width = width.clamp(k, nodes);
        let candidates = request.candidates.unwrap_or(width).clamp(k, width);
        let directions = directions(&self.codes, &self.factors);
        // Queries that meet the entries together.
        let tile = count.div_ceil(threads.max(1)).min(TILE);
        // Where all may be returned, nothing has to be looked up for each node that a walk meets.
        let any = request.eligible.is_empty() && request.excluded.is_empty();
        let passes = |query: usize, node: u32| {
            any || request.allows(query, self.codes.order()[node as usize])
        };
        let answers = collect(
            count.div_ceil(tile),
            threads,
            asker,
            || (Walker::default(), Scorer::default(), Vec::new()),
            |(walker, scorer, examples), job, watch| {
                let mut answers = Vec::with_capacity(tile);
                let first = job * tile;
                let coded = (first..count.min(first + tile))
                    .map(|query| coded_query(&self.codes, request, query));
                let (norms, probes): (Vec<f32>, Vec<Probe>) =
                    coded.map(|query| (query.norm, Probe::query(query))).unzip();
                let graph = (&self.links[..], &self.entries);
                let passes = |probe, node| passes(first + probe, node);
                walker.walk(&directions, graph, &probes, width, passes, watch)?;
                for (slot, norm) in norms.into_iter().enumerate() {
                    watch.check()?;
                    let found = &mut walker.found[slot];
                    // What the codes promise, and of equal promises the lower example.
                    for key in &mut *found {
                        let example = self.codes.order()[node_of(*key) as usize];
                        *key = walk::key(near_of(*key) * self.norms[example as usize], example);
                    }
                    order::sort(found, watch, |a, b| b.cmp(a))?;
                    let next = found.get(candidates).map(|&key| near_of(key) * norm);
                    examples.clear();
                    examples.extend(found.iter().take(candidates).map(|&key| node_of(key)));
                    order::sort(examples, watch, Ord::cmp)?; // rows together are read together
                    let mut hits = Vec::with_capacity(examples.len());
                    scorer.score(
                        request.rows,
                        (request.numbers, nodes, examples),
                        (request.queries, count, first + slot),
                        &mut hits,
                        watch,
                    )?;
                    let largest = top::finish(hits, k, LARGEST, watch)?;
                    let mut answer = Answer { scored: examples.len(), ..Answer::default() };
                    answer.margins = [f32::INFINITY; 2];
                    if let (Some(hit), Some(next)) = (largest.last(), next) {
                        answer.margins[0] = hit.score - next;
                    }
                    answer.ends = Ends { largest, smallest: Vec::new() };
                    answers.push(answer);
                }
                Ok(answers)
            },
        )?;
        Ok(answers.into_iter().flatten().collect())
    }

    /// The codes, for a scan where walks would not do.
    #[must_use]
    pub fn codes(&self) -> &Arc<Codes> {
        &self.codes
    }

    /// How many examples there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.codes.len()
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.codes.is_empty()
    }

    /// The largest norm over that in the middle: far above 1, walks by cosines miss what inner
    /// products are largest with. 1 without examples, infinite if most are zero and not all.
    #[must_use]
    pub fn norm_spread(&self) -> f32 {
        self.spread
    }

    /// Bytes it takes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let numbers = self.factors.len() + self.norms.len() + self.links.len();
        self.codes.bytes() + 4 * numbers + self.entries.bytes()
    }

    /// A number that two graphs have in common only if their nodes and links are the same, but for
    /// chance.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub fn digest(&self, watch: &Watch<'_>) -> Result<u64, Error> {
        let mut steps = watch.steps();
        let mut digest = self.len() as u64;
        for &word in self.codes.order().iter().chain(&self.links).chain(&self.entries.nodes) {
            steps.add(5)?;
            digest = random::value(digest, u64::from(word));
        }
        Ok(digest)
    }

    /// What it is made of beside its codes.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub fn parts(&self, watch: &Watch<'_>) -> Result<Parts, Error> {
        Ok(Parts {
            norms: memory::copied(&self.norms, watch)?,
            links: memory::copied(&self.links, watch)?,
            entries: memory::copied(&self.entries.nodes, watch)?,
        })
    }

    /// A graph that was taken apart.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Argument`] if the parts are not such as a walk can rely on: sizes
    /// that fit, links of a node to others, each once, and from the entries a way to every node;
    /// [`Error::Stopped`].
    pub fn from_parts(codes: Arc<Codes>, parts: Parts, watch: &Watch<'_>) -> Result<Self, Error> {
        let Parts { norms, links, entries } = parts;
        let nodes = codes.len();
        check_norms(&norms, nodes)?;
        if nodes.checked_mul(DEGREE) != Some(links.len()) {
            return Err(Error::shape("links", format!("[{nodes}, {DEGREE}]"), links.len()));
        }
        let rising = entries.is_sorted_by(|a, b| a < b);
        if !rising || entries.iter().any(|&entry| entry as usize >= nodes) {
            let must = format!("rising numbers below {nodes}");
            return Err(Error::argument("entries", must, "others"));
        }
        let mut sorted = [NONE; DEGREE];
        let mut steps = watch.steps();
        for (node, links) in links.chunks_exact(DEGREE).enumerate() {
            steps.add(10 * DEGREE)?;
            sorted.copy_from_slice(links);
            sorted.sort_unstable();
            let count = links.iter().filter(|&&link| link != NONE).count();
            let fits =
                links[..count].iter().all(|&link| (link as usize) < nodes && link as usize != node)
                    && sorted[..count].is_sorted_by(|a, b| a < b);
            if !fits {
                let must = format!("to other nodes below {nodes}, each once, then none");
                return Err(Error::argument("links", must, format!("others at node {node}")));
            }
        }
        if !Reached::new(&links, &entries, watch)?.is_all() {
            let must = "ways from the entries to every node";
            return Err(Error::argument("links", must, "none to some"));
        }
        let factors = walk::factors(&codes, watch)?;
        let entries = Gathered::new(&directions(&codes, &factors), entries, watch)?;
        Ok(Self { codes, factors, spread: spread_of(&norms), norms, links, entries })
    }
}

fn directions<'a>(codes: &'a Codes, factors: &'a [f32]) -> Directions<'a> {
    Directions { set: InstructionSet::best(), codes, factors }
}

#[cfg(test)]
mod tests;
