//! Walks along links, from near nodes to nearer ones.

use super::{DEGREE, NONE};
use crate::error::Error;
use crate::kernels::{InstructionSet, Lines};
use crate::search::codes::{CodedQuery, Codes, Segment};
use crate::search::top;
use crate::stop::Watch;

/// The most probes that are multiplied together.
pub(super) const TILE: usize = 32;
/// Walks that take turns: one computes while memory answers the others.
const WALKS: usize = 8;
/// Entries among which the far ones are sifted out at once.
const SIFTED: usize = 64;
/// Rounds of turns between two looks at the watch.
const ROUNDS: usize = 16;

/// A node and how near it is, in one number that is the larger the nearer the node is; of equally
/// near nodes, that of the lower one.
pub(super) fn key(near: f32, node: u32) -> u64 {
    // Zeros of both signs are one number.
    u64::from(top::rank(near + 0.0)) << 32 | u64::from(!node)
}

/// The node of a key.
pub(super) fn node_of(key: u64) -> u32 {
    !(key as u32)
}

/// How near the node of a key is.
pub(super) fn near_of(key: u64) -> f32 {
    top::of_rank((key >> 32) as u32)
}

/// Keeps the largest `count` keys, the smallest of them last.
pub(super) fn keep(keys: &mut Vec<u64>, count: usize) {
    if count < keys.len() {
        keys.select_nth_unstable_by(count - 1, |a, b| b.cmp(a));
        keys.truncate(count);
    }
}

/// The links of a node.
pub(super) fn links_of(links: &[u32], node: u32) -> &[u32] {
    let links = &links[node as usize * DEGREE..][..DEGREE];
    &links[..links.iter().position(|&link| link == NONE).unwrap_or(DEGREE)]
}

/// The unit vectors along the codes of rows.
#[derive(Clone, Copy)]
pub(super) struct Directions<'a> {
    pub(super) set: InstructionSet,
    pub(super) codes: &'a Codes,
    /// `[nodes, segments]`: what makes unit vectors of codes.
    pub(super) factors: &'a [f32],
}

/// What nodes are compared with: a query, or one of them.
pub(super) struct Probe(Vec<Part>);

/// One segment of a [`Probe`].
#[derive(Default)]
struct Part {
    /// The factors of a plane's lower halves, then of its upper halves.
    factors: Vec<i8>,
    /// 15 times their sum: what is taken off twice a product, for codes count from their middle.
    offset: i32,
    scale: f32,
}

impl Probe {
    /// A query, as a unit vector.
    pub(super) fn query(query: CodedQuery) -> Self {
        let norm = query.norm;
        let parts = query.segments.into_iter().map(|segment| Part {
            factors: segment.factors,
            offset: 15 * segment.sum,
            scale: if norm > 0.0 { segment.scale / norm } else { 0.0 },
        });
        Self(parts.collect())
    }

    /// As many as are multiplied together, to be set to nodes.
    pub(super) fn tile(codes: &Codes) -> Vec<Self> {
        (0..TILE).map(|_| Self::empty(codes)).collect()
    }

    /// One that is to be set to a node.
    pub(super) fn empty(codes: &Codes) -> Self {
        let part =
            |segment: &Segment| Part { factors: vec![0; 2 * segment.width], ..Part::default() };
        Self(codes.segments().iter().map(part).collect())
    }

    pub(super) fn set(&mut self, directions: &Directions<'_>, node: u32) {
        let count = self.0.len();
        for (index, (part, segment)) in
            self.0.iter_mut().zip(directions.codes.segments()).enumerate()
        {
            part.offset = 15 * centred(row(segment, node), &mut part.factors);
            part.scale = directions.factors[node as usize * count + index];
        }
    }
}

/// The codes of a node.
fn row(segment: &Segment, node: u32) -> &[u8] {
    &segment.upper[node as usize * segment.width..][..segment.width]
}

/// The codes of a row as whole numbers with 0 in the middle, `2 code - 15`; returns their sum.
fn centred(row: &[u8], factors: &mut [i8]) -> i32 {
    let (low, high) = factors.split_at_mut(row.len());
    let mut sum = 0;
    for ((&pair, low), high) in row.iter().zip(low).zip(high) {
        *low = 2 * (pair & 15).cast_signed() - 15;
        *high = 2 * (pair >> 4).cast_signed() - 15;
        sum += i32::from(*low) + i32::from(*high);
    }
    sum
}

/// `[nodes, segments]`: what makes unit vectors of codes; 0 for those of rows of zeros.
pub(super) fn factors(codes: &Codes, watch: &Watch<'_>) -> Result<Vec<f32>, Error> {
    let mut factors = Vec::with_capacity(codes.len() * codes.segments().len());
    let mut probe = Probe::empty(codes);
    let mut steps = watch.steps();
    for node in 0..codes.len() {
        steps.add(codes.rotation().length())?;
        let mut square = 0.0;
        for (part, segment) in probe.0.iter_mut().zip(codes.segments()) {
            centred(row(segment, node as u32), &mut part.factors);
            let whole: i32 = part.factors.iter().map(|&x| i32::from(x) * i32::from(x)).sum();
            square += f64::from(whole) * f64::from(segment.scales[node]).powi(2);
        }
        let inverse = if square > 0.0 { square.sqrt().recip() } else { 0.0 };
        factors
            .extend(codes.segments().iter().map(|s| (f64::from(s.scales[node]) * inverse) as f32));
    }
    Ok(factors)
}

/// Cosines of nodes with probes, and what they are made of.
#[derive(Default)]
pub(super) struct Near {
    products: Vec<i32>,
    factors: Vec<f32>,
    pub(super) values: Vec<f32>,
}

impl Near {
    /// The cosines of nodes with a probe, into `values`.
    pub(super) fn some(&mut self, directions: &Directions<'_>, probe: &Probe, nodes: &[u32]) {
        let (set, count) = (directions.set, probe.0.len());
        self.values.clear();
        self.values.resize(nodes.len(), 0.0);
        self.products.resize(nodes.len(), 0);
        for (index, (part, segment)) in probe.0.iter().zip(directions.codes.segments()).enumerate()
        {
            let factor = |&node: &u32| directions.factors[node as usize * count + index];
            self.factors.clear();
            self.factors.extend(nodes.iter().map(factor));
            let products = &mut self.products;
            set.picked_nibble_dots(&segment.upper, segment.width, nodes, &part.factors, products);
            set.add_estimates(products, part.offset, &self.factors, part.scale, &mut self.values);
        }
    }

    /// The cosines of gathered nodes from `first` on with up to [`TILE`] probes,
    /// `[probes, gathered]`, into `values`.
    pub(super) fn all(
        &mut self,
        set: InstructionSet,
        probes: &[Probe],
        gathered: &Gathered,
        first: usize,
    ) {
        let rows = gathered.nodes.len() - first;
        self.values.clear();
        self.values.resize(rows * probes.len(), 0.0);
        self.products.resize(rows * probes.len(), 0);
        if rows == 0 {
            return;
        }
        for (index, (codes, factors)) in gathered.planes.iter().enumerate() {
            let mut views: [&[i8]; TILE] = [&[]; TILE];
            for (view, probe) in views.iter_mut().zip(probes) {
                *view = &probe.0[index].factors;
            }
            let width = codes.len() / gathered.nodes.len();
            let views = &views[..probes.len()];
            set.nibble_dots(&codes[first * width..], width, views, &mut self.products);
            for ((probe, values), products) in
                probes.iter().zip(self.values.chunks_mut(rows)).zip(self.products.chunks(rows))
            {
                let Part { offset, scale, .. } = probe.0[index];
                set.add_estimates(products, offset, &factors[first..], scale, values);
            }
        }
    }
}

/// Codes of some nodes, copied to lie one after the other.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Gathered {
    pub(super) nodes: Vec<u32>,
    /// By segment: codes and factors.
    planes: Vec<(Lines, Vec<f32>)>,
}

impl Gathered {
    pub(super) fn new(
        directions: &Directions<'_>,
        nodes: Vec<u32>,
        watch: &Watch<'_>,
    ) -> Result<Self, Error> {
        let mut steps = watch.steps();
        let count = directions.codes.segments().len();
        let planes = directions.codes.segments().iter().enumerate().map(|(index, segment)| {
            let mut codes = Lines::zeros(nodes.len() * segment.width, watch)?;
            for (codes, &node) in codes.chunks_exact_mut(segment.width).zip(&nodes) {
                steps.add(segment.width)?;
                codes.copy_from_slice(row(segment, node));
            }
            let factor = |&node: &u32| directions.factors[node as usize * count + index];
            Ok((codes, nodes.iter().map(factor).collect()))
        });
        let planes = planes.collect::<Result<_, Error>>()?;
        Ok(Self { nodes, planes })
    }

    /// Bytes it takes in memory.
    pub(super) fn bytes(&self) -> usize {
        let plane = |(codes, factors): &(Lines, Vec<f32>)| codes.len() + 4 * factors.len();
        4 * self.nodes.len() + self.planes.iter().map(plane).sum::<usize>()
    }
}

/// The nodes that a walk has seen: a bit for each there is.
#[derive(Default)]
struct Seen {
    bits: Vec<u64>,
    /// Those whose bit is set.
    nodes: Vec<u32>,
}

impl Seen {
    fn clear(&mut self, nodes: usize) {
        for node in self.nodes.drain(..) {
            self.bits[node as usize / 64] = 0;
        }
        self.bits.resize(nodes.div_ceil(64), 0);
    }

    fn add(&mut self, node: u32) {
        self.bits[node as usize / 64] |= 1 << (node % 64);
        self.nodes.push(node);
    }

    /// Adds nodes, and returns those that were not there.
    fn add_new(&mut self, nodes: &[u32]) -> &[u32] {
        let before = self.nodes.len();
        let mut count = before;
        self.nodes.resize(before + nodes.len(), NONE);
        for &node in nodes {
            // Whether it is there nobody could predict: so without a branch.
            let word = &mut self.bits[node as usize / 64];
            let bit = 1 << (node % 64);
            self.nodes[count] = node;
            count += usize::from(*word & bit == 0);
            *word |= bit;
        }
        self.nodes.truncate(count);
        &self.nodes[before..]
    }
}

/// One walk.
#[derive(Default)]
struct Walk {
    /// Which of the probes it is for.
    probe: usize,
    seen: Seen,
    /// Keys of nodes whose links have not been followed, the nearest last.
    frontier: Vec<u64>,
    /// Keys of the nearest nodes that passed, the nearest first.
    pool: Vec<u64>,
    /// A node whose links come next.
    open: Option<u32>,
    /// Nodes that have been seen and not yet compared.
    fresh: Vec<u32>,
    near: Near,
}

impl Walk {
    /// Begins at the nearest of the entries, whose cosines are given.
    fn begin(
        &mut self,
        probe: usize,
        (entries, near): (&[u32], &[f32]),
        directions: &Directions<'_>,
        width: usize,
        passes: &impl Fn(usize, u32) -> bool,
    ) {
        self.probe = probe;
        self.seen.clear(directions.codes.len());
        self.frontier.clear();
        self.pool.clear();
        self.open = None;
        self.fresh.clear();
        let zeros = [0.0; SIFTED];
        let mut places = Vec::with_capacity(SIFTED);
        let mut bar = f32::NEG_INFINITY;
        for (entries, near) in entries.chunks(SIFTED).zip(near.chunks(SIFTED)) {
            places.clear();
            let zeros = &zeros[..near.len()];
            directions.set.sift(near, zeros, bar, f32::NEG_INFINITY, &mut places);
            for &place in &places {
                let key = key(near[place as usize], entries[place as usize]);
                let passed = passes(probe, node_of(key));
                if passed { &mut self.pool } else { &mut self.frontier }.push(key);
            }
            if self.pool.len() >= width + SIFTED {
                keep(&mut self.pool, width);
                bar = near_of(self.pool[width - 1]);
            }
        }
        keep(&mut self.pool, width);
        self.pool.sort_unstable_by(|a, b| b.cmp(a));
        let least = if self.pool.len() < width { 0 } else { self.pool[width - 1] };
        self.frontier.retain(|&key| key > least);
        self.frontier.extend(&self.pool);
        self.frontier.sort_unstable();
        // The others are too far, and will be again if a link leads to them.
        for &key in &self.frontier {
            self.seen.add(node_of(key));
        }
    }

    /// Takes a node that is near enough into the frontier, and into the pool if it passes.
    fn meet(&mut self, key: u64, width: usize, passes: &impl Fn(usize, u32) -> bool) {
        if self.pool.len() >= width && key < self.pool[width - 1] {
            return;
        }
        let at = self.frontier.partition_point(|&other| other < key);
        self.frontier.insert(at, key);
        if passes(self.probe, node_of(key)) {
            let at = self.pool.partition_point(|&other| other > key);
            self.pool.insert(at, key);
            self.pool.truncate(width);
        }
    }

    /// Half a step: of the nearest node not yet opened the links, or the codes of those that it
    /// links to, are asked for in one turn and looked at in the next. `false` at the end of the walk.
    fn turn(
        &mut self,
        directions: &Directions<'_>,
        links: &[u32],
        probes: &[Probe],
        width: usize,
        passes: &impl Fn(usize, u32) -> bool,
    ) -> bool {
        if let Some(node) = self.open.take() {
            let fresh = self.seen.add_new(links_of(links, node));
            let count = directions.codes.segments().len();
            for &link in fresh {
                for segment in directions.codes.segments() {
                    InstructionSet::fetch(row(segment, link));
                }
                InstructionSet::fetch(&directions.factors[link as usize * count..][..count]);
            }
            self.fresh.clear();
            self.fresh.extend_from_slice(fresh);
            return true;
        }
        let (mut near, fresh) = (std::mem::take(&mut self.near), std::mem::take(&mut self.fresh));
        near.some(directions, &probes[self.probe], &fresh);
        for (&near, &node) in near.values.iter().zip(&fresh) {
            self.meet(key(near, node), width, passes);
        }
        (self.near, self.fresh) = (near, fresh);
        self.fresh.clear();
        let Some(next) = self.frontier.pop() else { return false };
        if self.pool.len() >= width && next < self.pool[width - 1] {
            return false;
        }
        let node = node_of(next);
        InstructionSet::fetch(&links[node as usize * DEGREE..][..DEGREE]);
        self.open = Some(node);
        true
    }
}

/// What a worker walks with.
#[derive(Default)]
pub(super) struct Walker {
    walks: Vec<Walk>,
    near: Near,
    /// For each probe keys of the nodes found, nearest first.
    pub(super) found: Vec<Vec<u64>>,
}

impl Walker {
    /// Finds, for each of up to [`TILE`] probes, up to `width` near nodes of those that pass: those
    /// that a walk from the entries meets before it has nothing nearer to go to.
    pub(super) fn walk(
        &mut self,
        directions: &Directions<'_>,
        (links, entries): (&[u32], &Gathered),
        probes: &[Probe],
        width: usize,
        passes: impl Fn(usize, u32) -> bool,
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        watch.check()?;
        self.walks.resize_with(WALKS, Walk::default);
        self.found.resize_with(probes.len(), Vec::new);
        let Self { walks, near, found } = self;
        near.all(directions.set, probes, entries, 0);
        let count = entries.nodes.len();
        let begin = |walk: &mut Walk, probe: usize| {
            let near = &near.values[probe * count..][..count];
            walk.begin(probe, (&entries.nodes, near), directions, width, &passes);
        };
        let mut next = WALKS.min(probes.len());
        for (probe, walk) in walks[..next].iter_mut().enumerate() {
            begin(walk, probe);
        }
        let mut active = next;
        let mut rounds = 0;
        while active > 0 {
            rounds += 1;
            if rounds % ROUNDS == 0 {
                watch.check()?;
            }
            let mut at = 0;
            while at < active {
                let walk = &mut walks[at];
                if walk.turn(directions, links, probes, width, &passes) {
                    at += 1;
                    continue;
                }
                let found = &mut found[walk.probe];
                found.clear();
                found.append(&mut walk.pool);
                if next < probes.len() {
                    begin(walk, next);
                    next += 1;
                } else {
                    active -= 1;
                    walks.swap(at, active);
                }
            }
        }
        Ok(())
    }
}
