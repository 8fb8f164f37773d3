//! Links: the nearest nodes of each from leaves of near ones, pruned, in both directions, and what
//! no walk would come to linked to what it does.
//!
//! Nothing here depends on how the work is shared out: what is kept of candidates is the best by a
//! strict order, whichever way they come.

use std::ops::Range;
use std::sync::Mutex;

use super::walk::{
    Directions, Gathered, Near, Probe, TILE, Walker, keep, key, links_of, near_of, node_of,
};
use super::{DEGREE, NONE};
use crate::error::Error;
use crate::memory;
use crate::order;
use crate::parallel::{collect, share};
use crate::random;
use crate::stop::{Asker, Watch};

/// Nodes of a job.
const BLOCK: usize = 256;
/// The most nodes of a leaf, all pairs of which are compared.
pub(super) const LEAF: usize = 1024;
/// Leaves that a node comes into, at the first split and at those of parts that are still too large.
const LEAVES: [usize; 2] = [6, 2];
/// How many times smaller than a leaf the parts of a split are, on average.
const SMALLER: usize = 2;
/// How many times smaller than what is split its parts must be, for them to be split again.
const SHRINKING: usize = 4;
/// The most pivots of a split.
const PIVOTS: usize = 1024;
/// Candidates of a node, of which links are chosen.
const CANDIDATES: usize = 64;
/// The square of by how much nearer than the node a chosen candidate must be to one that it makes
/// superfluous.
const NEARER: f32 = 1.21;

/// The links of all nodes.
pub(super) fn build(
    directions: &Directions<'_>,
    entries: &Gathered,
    seed: u64,
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Vec<u32>, Error> {
    let nodes = directions.codes.len();
    let watch = &Watch::of(asker);
    let leaves = leaves(directions, nodes, seed, threads, asker)?;
    let mut steps = watch.steps();
    let empty = || steps.add(10).map(|()| Mutex::new(Vec::new()));
    let near = std::iter::repeat_with(empty).take(nodes);
    let near = near.collect::<Result<Vec<Mutex<Vec<u64>>>, Error>>()?;
    share(
        leaves.len(),
        threads,
        asker,
        || Leaf::new(directions),
        |leaf, job, watch| leaf.search(&leaves[job], &near, 0, watch),
    )?;
    drop(leaves);
    let mut links = memory::filled(nodes * DEGREE, NONE, watch)?;
    choose(directions, &near, &mut links, threads, asker)?;
    drop(near);
    reverse(directions, &mut links, 0..nodes, threads, asker)?;
    repair(directions, &mut links, entries, asker)?;
    Ok(links)
}

/// Links the nodes from `links.len() / DEGREE` on to those before and among each other.
///
/// In batches: those of one do not depend on each other's order.
pub(super) fn extend(
    directions: &Directions<'_>,
    links: &mut Vec<u32>,
    entries: &Gathered,
    threads: usize,
    asker: &Asker<'_>,
) -> Result<(), Error> {
    let nodes = directions.codes.len();
    while links.len() < nodes * DEGREE {
        let first = links.len() / DEGREE;
        let last = nodes.min(first + LEAF);
        let near: Vec<Mutex<Vec<u64>>> = (first..last).map(|_| Mutex::new(Vec::new())).collect();
        share(
            near.len().div_ceil(TILE),
            threads,
            asker,
            || (Walker::default(), Probe::tile(directions.codes)),
            |(walker, probes), job, watch| {
                let near = &near[job * TILE..near.len().min((job + 1) * TILE)];
                let probes = &mut probes[..near.len()];
                for (slot, probe) in probes.iter_mut().enumerate() {
                    probe.set(directions, (first + job * TILE + slot) as u32);
                }
                let graph = (&links[..], entries);
                walker.walk(directions, graph, probes, CANDIDATES, |_, _| true, watch)?;
                for (near, found) in near.iter().zip(&walker.found) {
                    near.lock().map_err(Error::panicked)?.extend_from_slice(found);
                }
                Ok(())
            },
        )?;
        let batch: Vec<u32> = (first as u32..last as u32).collect();
        Leaf::new(directions).search(&batch, &near, first, &Watch::of(asker))?;
        links.resize(last * DEGREE, NONE);
        choose(directions, &near, &mut links[first * DEGREE..], threads, asker)?;
        reverse(directions, links, first..last, threads, asker)?;
    }
    Ok(())
}

/// Sets of at most [`LEAF`] nodes that are near each other; a node is in several.
fn leaves(
    directions: &Directions<'_>,
    nodes: usize,
    seed: u64,
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Vec<Vec<u32>>, Error> {
    let mut leaves = Vec::new();
    let mut open = vec![((0..nodes as u32).collect::<Vec<_>>(), LEAVES[0])];
    let mut splits = 0;
    while let Some((members, fanout)) = open.pop() {
        if members.len() <= LEAF {
            leaves.push(members);
            continue;
        }
        let key = random::parameter_key(seed, "leaves", &[splits]);
        splits += 1;
        let count = (members.len() / LEAF + 1) * fanout * SMALLER;
        let draw = |at| random::below(random::value(key, at), members.len() as u32) as usize;
        let mut pivots: Vec<u32> =
            (0..count.min(PIVOTS) as u64).map(|at| members[draw(at)]).collect();
        pivots.sort_unstable();
        pivots.dedup();
        for part in split(directions, &members, pivots, fanout, threads, asker)? {
            if part.len() > LEAF && SHRINKING * part.len() > members.len() {
                // To the pivots all of these are alike: any parts will do.
                leaves.extend(part.chunks(LEAF).map(<[u32]>::to_vec));
            } else if part.len() > 1 {
                open.push((part, LEAVES[1]));
            }
        }
    }
    Ok(leaves)
}

/// For each pivot the members that have it among their nearest `fanout`.
fn split(
    directions: &Directions<'_>,
    members: &[u32],
    pivots: Vec<u32>,
    fanout: usize,
    threads: usize,
    asker: &Asker<'_>,
) -> Result<Vec<Vec<u32>>, Error> {
    let count = pivots.len();
    let watch = &Watch::of(asker);
    let gathered = Gathered::new(directions, pivots, watch)?;
    let all = collect(
        members.len().div_ceil(BLOCK),
        threads,
        asker,
        || (Probe::tile(directions.codes), Near::default(), Vec::new()),
        |(probes, near, keys), job, watch| {
            let members = &members[job * BLOCK..members.len().min((job + 1) * BLOCK)];
            let mut nearest = Vec::with_capacity(members.len() * fanout);
            for members in members.chunks(TILE) {
                watch.check()?;
                for (probe, &member) in probes.iter_mut().zip(members) {
                    probe.set(directions, member);
                }
                near.all(directions.set, &probes[..members.len()], &gathered, 0);
                for (&member, near) in members.iter().zip(near.values.chunks(count)) {
                    keys.clear();
                    keys.extend(near.iter().zip(0..).map(|(&near, pivot)| key(near, pivot)));
                    keep(keys, fanout);
                    nearest.extend(keys.iter().map(|&key| (node_of(key), member)));
                }
            }
            Ok(nearest)
        },
    )?;
    let mut parts = vec![Vec::new(); count];
    let mut steps = watch.steps();
    for (pivot, member) in all.into_iter().flatten() {
        steps.add(5)?;
        parts[pivot as usize].push(member);
    }
    Ok(parts)
}

/// What a worker searches leaves with.
struct Leaf<'a> {
    directions: &'a Directions<'a>,
    probes: Vec<Probe>,
    near: Near,
    zeros: Vec<f32>,
    survivors: Vec<u32>,
    /// How near another must be to each member to matter, with the sign turned.
    bars: Vec<f32>,
    /// Keys of what has been near enough to each member.
    keys: Vec<Vec<u64>>,
}

impl<'a> Leaf<'a> {
    fn new(directions: &'a Directions<'a>) -> Self {
        Self {
            directions,
            probes: Probe::tile(directions.codes),
            near: Near::default(),
            zeros: vec![0.0; LEAF],
            survivors: Vec::new(),
            bars: Vec::new(),
            keys: vec![Vec::new(); LEAF],
        }
    }

    /// Compares all pairs of up to [`LEAF`] members, and keeps what is nearest to member `m` in
    /// `all[m - first]`.
    fn search(
        &mut self,
        members: &[u32],
        all: &[Mutex<Vec<u64>>],
        first: usize,
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        let set = self.directions.set;
        let gathered = Gathered::new(self.directions, members.to_vec(), watch)?;
        self.bars.clear();
        for &member in members {
            let known = all[member as usize - first].lock().map_err(Error::panicked)?;
            let last = known.get(CANDIDATES - 1);
            self.bars.push(last.map_or(f32::INFINITY, |&key| -near_of(key)));
        }
        for (index, tile) in members.chunks(TILE).enumerate() {
            watch.check()?;
            let from = index * TILE;
            for (probe, &member) in self.probes.iter_mut().zip(tile) {
                probe.set(self.directions, member);
            }
            self.near.all(set, &self.probes[..tile.len()], &gathered, from);
            for (slot, near) in self.near.values.chunks(members.len() - from).enumerate() {
                // Each pair once, for both of it.
                let (own, after) = (from + slot, from + slot + 1);
                let near = &near[slot + 1..];
                let (bar, zeros) = (-self.bars[own], &self.zeros[..near.len()]);
                self.survivors.clear();
                set.sift(near, zeros, bar, f32::NEG_INFINITY, &mut self.survivors);
                for &at in &self.survivors {
                    let at = at as usize;
                    let key = key(near[at], members[after + at]);
                    add(&mut self.keys[own], &mut self.bars[own], key);
                }
                self.survivors.clear();
                let bars = &self.bars[after..];
                set.sift(near, bars, 0.0, f32::NEG_INFINITY, &mut self.survivors);
                for &at in &self.survivors {
                    let at = at as usize;
                    let key = key(near[at], members[own]);
                    add(&mut self.keys[after + at], &mut self.bars[after + at], key);
                }
            }
        }
        for (&member, keys) in members.iter().zip(&mut self.keys) {
            let mut known = all[member as usize - first].lock().map_err(Error::panicked)?;
            known.append(keys);
            known.sort_by(|a, b| b.cmp(a)); // which makes use of the order of those known
            known.dedup();
            known.truncate(CANDIDATES);
        }
        Ok(())
    }
}

/// Adds a key, and once there are many keeps the best and tells how good others must be.
fn add(keys: &mut Vec<u64>, bar: &mut f32, key: u64) {
    keys.push(key);
    if keys.len() >= 2 * CANDIDATES {
        keep(keys, CANDIDATES);
        *bar = bar.min(-near_of(keys[CANDIDATES - 1]));
    }
}

/// Chooses links among candidates.
struct Chooser {
    probe: Probe,
    near: Near,
    left: Vec<u32>,
    distances: Vec<f32>,
}

/// Half the square of the distance of unit vectors.
fn distance(near: f32) -> f32 {
    (1.0 - near).max(0.0)
}

impl Chooser {
    fn new(directions: &Directions<'_>) -> Self {
        Self {
            probe: Probe::empty(directions.codes),
            near: Near::default(),
            left: Vec::new(),
            distances: Vec::new(),
        }
    }

    /// The nearest candidate always; each other only if none chosen is by far nearer to it than the
    /// node is: a walk would come to it through that one.
    fn choose(&mut self, directions: &Directions<'_>, keys: &[u64], links: &mut [u32]) {
        links.fill(NONE);
        self.left.clear();
        self.left.extend(keys.iter().map(|&key| node_of(key)));
        self.distances.clear();
        self.distances.extend(keys.iter().map(|&key| distance(near_of(key))));
        for link in links {
            let Some(&next) = self.left.first() else { break };
            *link = next;
            self.probe.set(directions, next);
            self.near.some(directions, &self.probe, &self.left);
            let mut kept = 0;
            for at in 1..self.left.len() {
                if distance(self.near.values[at]) * NEARER > self.distances[at] {
                    self.left[kept] = self.left[at];
                    self.distances[kept] = self.distances[at];
                    kept += 1;
                }
            }
            self.left.truncate(kept);
            self.distances.truncate(kept);
        }
    }
}

/// The links of each node among its candidates.
fn choose(
    directions: &Directions<'_>,
    near: &[Mutex<Vec<u64>>],
    links: &mut [u32],
    threads: usize,
    asker: &Asker<'_>,
) -> Result<(), Error> {
    let target: Vec<_> = links.chunks_mut(BLOCK * DEGREE).map(Mutex::new).collect();
    share(
        target.len(),
        threads,
        asker,
        || Chooser::new(directions),
        |chooser, job, watch| {
            let mut links = target[job].lock().map_err(Error::panicked)?;
            for (links, near) in links.chunks_mut(DEGREE).zip(&near[job * BLOCK..]) {
                watch.check()?;
                let near = near.lock().map_err(Error::panicked)?;
                chooser.choose(directions, &near, links);
            }
            Ok(())
        },
    )?;
    Ok(())
}

/// Links what some nodes link to back to them, choosing anew where links get too many.
fn reverse(
    directions: &Directions<'_>,
    links: &mut [u32],
    from: Range<usize>,
    threads: usize,
    asker: &Asker<'_>,
) -> Result<(), Error> {
    let watch = &Watch::of(asker);
    let mut pairs: Vec<u64> = Vec::new();
    let mut steps = watch.steps();
    for node in from.start as u32..from.end as u32 {
        steps.add(DEGREE)?;
        let pair = |&link: &u32| u64::from(link) << 32 | u64::from(node);
        pairs.extend(links_of(links, node).iter().map(pair));
    }
    order::sort(&mut pairs, watch, Ord::cmp)?;
    let mut groups = Vec::new();
    for group in pairs.chunk_by(|a, b| a >> 32 == b >> 32) {
        steps.add(DEGREE)?;
        groups.push(group);
    }
    let states = {
        let links = &*links;
        share(
            groups.len().div_ceil(BLOCK),
            threads,
            asker,
            || {
                let chooser = Chooser::new(directions);
                (chooser, Probe::empty(directions.codes), Near::default(), Vec::new())
            },
            |(chooser, probe, near, chosen), job, watch| {
                let (mut others, mut keys) = (Vec::new(), Vec::new());
                for group in groups[job * BLOCK..].iter().take(BLOCK) {
                    watch.check()?;
                    let node = (group[0] >> 32) as u32;
                    others.clear();
                    others.extend_from_slice(links_of(links, node));
                    others.extend(group.iter().map(|&pair| pair as u32));
                    others.sort_unstable();
                    others.dedup();
                    probe.set(directions, node);
                    near.some(directions, probe, &others);
                    keys.clear();
                    keys.extend(others.iter().zip(&near.values).map(|(&to, &near)| key(near, to)));
                    keys.sort_unstable_by(|a, b| b.cmp(a));
                    let mut links = [NONE; DEGREE];
                    if keys.len() > DEGREE {
                        chooser.choose(directions, &keys, &mut links);
                    } else {
                        for (link, &key) in links.iter_mut().zip(&keys) {
                            *link = node_of(key);
                        }
                    }
                    chosen.push((node, links));
                }
                Ok(())
            },
        )?
    };
    for (node, chosen) in states.into_iter().flat_map(|(.., chosen)| chosen) {
        steps.add(DEGREE)?;
        links[node as usize * DEGREE..][..DEGREE].copy_from_slice(&chosen);
    }
    Ok(())
}

/// The nodes that walks can come to, and from where they do first.
pub(super) struct Reached {
    /// The node from which each was reached first; entries from themselves, others from none.
    parents: Vec<u32>,
    /// All that were reached, in this order.
    order: Vec<u32>,
    /// How many of those have had their links followed.
    followed: usize,
}

impl Reached {
    pub(super) fn new(links: &[u32], entries: &[u32], watch: &Watch<'_>) -> Result<Self, Error> {
        let parents = vec![NONE; links.len() / DEGREE];
        let mut reached = Self { parents, order: Vec::new(), followed: 0 };
        for &entry in entries {
            reached.reach(entry, entry);
        }
        reached.follow(links, watch)?;
        Ok(reached)
    }

    /// Whether every node was reached.
    pub(super) fn is_all(&self) -> bool {
        self.order.len() == self.parents.len()
    }

    fn reach(&mut self, node: u32, from: u32) {
        let parent = &mut self.parents[node as usize];
        if *parent == NONE {
            *parent = from;
            self.order.push(node);
        }
    }

    fn follow(&mut self, links: &[u32], watch: &Watch<'_>) -> Result<(), Error> {
        let mut steps = watch.steps();
        while let Some(&node) = self.order.get(self.followed) {
            steps.add(5 * DEGREE)?;
            self.followed += 1;
            for &link in links_of(links, node) {
                self.reach(link, node);
            }
        }
        Ok(())
    }

    /// Links a node that was reached to one that was not, in the place of no link that another was
    /// reached by; `false` if it has no such place.
    fn attach(
        &mut self,
        links: &mut [u32],
        from: u32,
        to: u32,
        watch: &Watch<'_>,
    ) -> Result<bool, Error> {
        if self.parents[from as usize] == NONE {
            return Ok(false);
        }
        let own = &mut links[from as usize * DEGREE..][..DEGREE];
        let free = |&link: &u32| link == NONE || self.parents[link as usize] != from;
        // The first that there is not, or the farthest.
        let place =
            own.iter().position(|&link| link == NONE).or_else(|| own.iter().rposition(free));
        let Some(place) = place else { return Ok(false) };
        own[place] = to;
        self.reach(to, from);
        self.follow(links, watch)?;
        Ok(true)
    }

    /// The same, of the first of some nodes that has a place.
    fn attach_to_any(
        &mut self,
        links: &mut [u32],
        from: impl IntoIterator<Item = u32>,
        to: u32,
        watch: &Watch<'_>,
    ) -> Result<bool, Error> {
        for from in from {
            if self.attach(links, from, to, watch)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Links every node that no walk could come to to a near one that it could come to.
pub(super) fn repair(
    directions: &Directions<'_>,
    links: &mut [u32],
    entries: &Gathered,
    asker: &Asker<'_>,
) -> Result<(), Error> {
    let watch = &Watch::of(asker);
    let mut reached = Reached::new(links, &entries.nodes, watch)?;
    let mut walker = Walker::default();
    let probes = &mut [Probe::empty(directions.codes)];
    // Nodes before this, in the order they were reached, have no place left, for good.
    let mut full = 0;
    let mut steps = watch.steps();
    for node in 0..reached.parents.len() as u32 {
        steps.add(1)?;
        if reached.parents[node as usize] != NONE {
            continue;
        }
        let own = links_of(links, node).to_vec();
        if reached.attach_to_any(links, own, node, watch)? {
            continue;
        }
        probes[0].set(directions, node);
        let graph = (&links[..], entries);
        walker.walk(directions, graph, probes, CANDIDATES, |_, _| true, watch)?;
        let found = walker.found[0].iter().map(|&key| node_of(key));
        if reached.attach_to_any(links, found, node, watch)? {
            continue;
        }
        while full < reached.order.len()
            && !reached.attach(links, reached.order[full], node, watch)?
        {
            full += 1;
        }
    }
    Ok(())
}
