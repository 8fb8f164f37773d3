//! Saved indexes, in parts.

use std::sync::Arc;

use half::bf16;
use whence_core::kernels::Lines;
use whence_core::search::certified::{self, Answer, Request};
use whence_core::search::codes::{Bits, Codes, Segment};
use whence_core::search::graph::{Graph, Parts};
use whence_core::search::rotation::Rotation;
use whence_core::search::{Digest, Rows, Sides};
use whence_core::stop::{Asker, Watch, never};
use whence_core::store::Shard;

use super::choices::Choices;
use super::fine;

/// Rows in memory, and codes of them that may be spoilt.
struct Made {
    rows: Rows,
    codes: Arc<Codes>,
    norms: Vec<f32>,
}

fn norms_of(values: &[f32], examples: usize) -> Vec<f32> {
    let mut squares = vec![0.0; examples];
    for (row, values) in values.chunks_exact(values.len() / examples).enumerate() {
        squares[row] = values.iter().map(|value| value * value).sum();
    }
    squares.into_iter().map(f32::sqrt).collect()
}

/// A rotation of what `length` says, or not.
fn rotation(choices: &mut Choices<'_>, length: usize) -> Option<Rotation> {
    let mut prefix = if length > 64 && choices.once_in(2) { vec![64u64] } else { Vec::new() };
    choices.spoil(&mut prefix);
    let prefix: Vec<usize> = prefix.into_iter().map(|segment| segment as usize).collect();
    let mut directions: Vec<f64> = Vec::new();
    if choices.once_in(3) {
        directions = choices.values(2 * length).into_iter().map(f64::from).collect();
    }
    choices.spoil(&mut directions);
    let length = choices.about(length as u64) as usize;
    fine(Rotation::new(length, &prefix, &directions, choices.word()))
}

fn spoilt(choices: &mut Choices<'_>, segment: &Segment) -> Segment {
    let mut upper = segment.upper.to_vec();
    choices.spoil(&mut upper);
    let mut spoilt = Segment {
        width: choices.about(segment.width as u64) as usize,
        upper: Lines::joined(&[&upper], &Watch::none()).unwrap(),
        ..segment.clone()
    };
    choices.spoil(&mut spoilt.lower);
    choices.spoil(&mut spoilt.scales);
    for numbers in [&mut spoilt.upper_errors, &mut spoilt.errors, &mut spoilt.tails] {
        choices.spoil::<bf16>(numbers);
    }
    spoilt
}

/// Some that may follow `others`, or not.
fn made(choices: &mut Choices<'_>, examples: usize, others: Option<&Codes>) -> Option<Made> {
    let asker = &Asker::new(&never);
    let others = others.filter(|_| !choices.once_in(8));
    let dim = others.map_or_else(|| 1 + choices.below(150), |codes| codes.rotation().length());
    let mut values = choices.values(examples * dim);
    let mut norms = norms_of(&values, examples);
    choices.spoil(&mut norms);
    if choices.once_in(16) {
        let at = choices.below(values.len());
        values[at] = f32::from_bits(choices.word() as u32);
    }
    let rows = Rows::new(vec![Shard::in_memory(values, dim)], vec![1.0; examples], dim).unwrap();
    let map = match others {
        Some(codes) => codes.rotation().clone(),
        None => rotation(choices, dim)?,
    };
    let eight = others.map_or_else(|| choices.once_in(2), |codes| codes.bits() == Bits::Eight);
    let bits = if eight { Bits::Eight } else { Bits::Four };
    let codes = fine(Codes::new(&rows, &[], &[1.0], &norms, map, bits, 1, asker))?;
    if choices.once_in(3) {
        return Some(Made { rows, codes: Arc::new(codes), norms });
    }
    let map = if choices.once_in(8) { rotation(choices, dim)? } else { codes.rotation().clone() };
    let segments = codes.segments().iter().map(|segment| spoilt(choices, segment)).collect();
    let mut order = codes.order().to_vec();
    choices.spoil(&mut order);
    let mut reaches = codes.reaches().to_vec();
    choices.spoil(&mut reaches);
    let mut weights = vec![1.0];
    choices.spoil(&mut weights);
    let digest = Digest(choices.word());
    let codes = Codes::from_parts(map, weights, order, segments, reaches, digest, &Watch::none());
    Some(Made { rows, codes: Arc::new(fine(codes)?), norms })
}

/// Asks for the nearest, in a way that fits or not.
fn ask(
    choices: &mut Choices<'_>,
    made: &Made,
    search: impl FnOnce(&Request<'_>) -> Option<Vec<Answer>>,
) {
    let (dim, examples) = (made.rows.dim(), made.codes.len());
    let count = choices.below(6);
    let mut queries = choices.values(count * dim);
    choices.spoil(&mut queries);
    let mut numbers: Vec<u64> = Vec::new();
    if choices.once_in(2) {
        numbers = (0..examples as u64).rev().collect();
        choices.spoil(&mut numbers);
    }
    let mut eligible = vec![1u8; if choices.once_in(3) { examples } else { 0 }];
    choices.spoil(&mut eligible);
    let eligible: Vec<bool> = eligible.into_iter().map(|byte| byte != 0).collect();
    let mut excluded: Vec<Vec<u64>> = Vec::new();
    if choices.once_in(4) {
        excluded = (0..count).map(|_| vec![choices.word(), 0, 5, 1, 1]).collect();
    }
    let request = Request {
        rows: &made.rows,
        numbers: &numbers,
        queries: &queries,
        count,
        k: choices.about(3) as usize,
        sides: Sides { largest: !choices.once_in(8), smallest: choices.once_in(4) },
        eligible: &eligible,
        excluded: &excluded,
        candidates: choices.once_in(3).then(|| choices.about(9) as usize),
    };
    let Some(found) = search(&request) else { return };
    assert_eq!(found.len(), count);
    for answer in found {
        for hits in [answer.ends.largest, answer.ends.smallest] {
            assert!(hits.len() <= request.k.min(examples));
            let mut all: Vec<u64> = hits.iter().map(|hit| hit.example).collect();
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), hits.len());
            for hit in hits {
                assert!(hit.score.is_finite() && hit.example < examples as u64);
                assert!(eligible.get(hit.example as usize).is_none_or(|&eligible| eligible));
            }
        }
    }
}

pub(super) fn search_codes(choices: &mut Choices<'_>) {
    let most = if choices.once_in(8) { 400 } else { 40 };
    let examples = 1 + choices.below(most);
    let Some(mut made) = made(choices, examples, None) else { return };
    if choices.once_in(4) {
        let count = 1 + choices.below(300);
        let more = self::made(choices, count, Some(&made.codes));
        if let Some(codes) =
            more.and_then(|more| fine(made.codes.appended(&more.codes, &Watch::none())))
        {
            made.codes = Arc::new(codes);
        }
    }
    let (threads, codes) = (1 + choices.below(2), Arc::clone(&made.codes));
    ask(choices, &made, |request| {
        fine(certified::search(&codes, request, threads, &Asker::new(&never)))
    });
}

pub(super) fn search_graph(choices: &mut Choices<'_>) {
    let asker = &Asker::new(&never);
    let most = if choices.once_in(200) { 1500 } else { 40 };
    let examples = 1 + choices.below(most);
    let Some(mut made) = made(choices, examples, None) else { return };
    let norms = made.norms.clone();
    let graph = fine(Graph::new(Arc::clone(&made.codes), norms, choices.word(), 1, asker));
    let Some(mut graph) = graph else { return };
    if !choices.once_in(3) {
        let Parts { mut norms, mut links, mut entries } = graph.parts(&Watch::none()).unwrap();
        choices.spoil(&mut norms);
        choices.spoil(&mut links);
        choices.spoil(&mut entries);
        let parts = Parts { norms, links, entries };
        let found = fine(Graph::from_parts(Arc::clone(&made.codes), parts, &Watch::none()));
        let Some(found) = found else { return };
        graph = found;
    }
    if choices.once_in(4) {
        let more = choices.below(examples) + 1;
        if let Some(more) = self::made(choices, more, Some(&made.codes))
            && let Some(grown) =
                fine(graph.grown(&more.codes, &more.norms, choices.word(), 1, asker))
        {
            made.codes = Arc::clone(grown.codes());
            graph = grown;
        }
    }
    assert!(graph.norm_spread().is_nan() || graph.norm_spread() >= 0.0);
    graph.digest(&Watch::none()).unwrap();
    let width = choices.about(20) as usize;
    ask(choices, &made, |request| fine(graph.search(request, width, 1, asker)));
}
