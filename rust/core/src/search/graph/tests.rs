use super::*;
use crate::search::codes::Bits;
use crate::search::rotation::{Rotation, UNIT};
use crate::search::{self, Hit, Rows, Sides, ends};
use crate::stop::never;
use crate::store::Shard;

fn random(seed: u64, i: usize) -> f32 {
    (random::value(seed, i as u64) >> 40) as f32 / 8_388_608.0 - 1.0
}

/// Rows around centres, fewer of them the more rows there are.
fn clustered(count: usize, dim: usize, seed: u64) -> Vec<f32> {
    let value = |i: usize| {
        let centre = random::below(random::value(seed ^ 7, (i / dim) as u64), 40) as usize;
        random(seed ^ 9, centre * dim + i % dim) + 0.6 * random(seed, i)
    };
    (0..count * dim).map(value).collect()
}

fn norms_of(values: &[f32], dim: usize) -> Vec<f32> {
    values.chunks(dim).map(|row| row.iter().map(|x| x * x).sum::<f32>().sqrt()).collect()
}

fn rows_of(values: &[f32], dim: usize) -> Rows {
    let scales = vec![1.0; values.len() / dim];
    Rows::new(vec![Shard::in_memory(values.to_vec(), dim)], scales, dim).unwrap()
}

fn codes_of(values: &[f32], dim: usize, prefix: &[usize]) -> Arc<Codes> {
    let (rows, norms) = (rows_of(values, dim), norms_of(values, dim));
    let numbers: Vec<u64> = (0..norms.len() as u64).collect();
    let rotation = Rotation::new(dim, prefix, &[], 3).unwrap();
    let asker = Asker::new(&never);
    Arc::new(Codes::new(&rows, &numbers, &[1.0], &norms, rotation, Bits::Four, 1, &asker).unwrap())
}

fn graph_of(values: &[f32], dim: usize) -> Graph {
    let codes = codes_of(values, dim, &[]);
    Graph::new(codes, norms_of(values, dim), 5, 2, &Asker::new(&never)).unwrap()
}

fn request<'a>(rows: &'a Rows, queries: &'a [f32], k: usize) -> Request<'a> {
    Request {
        rows,
        numbers: &[],
        queries,
        count: queries.len() / rows.dim(),
        k,
        sides: Sides { largest: true, smallest: false },
        eligible: &[],
        excluded: &[],
        candidates: None,
    }
}

fn answers(graph: &Graph, request: &Request<'_>, width: usize) -> Vec<Vec<Hit>> {
    let found = graph.search(request, width, 2, &Asker::new(&never)).unwrap();
    found.into_iter().map(|answer| answer.ends.largest).collect()
}

/// The answers of the scan, of which some may be left out.
fn scanned(rows: &Rows, queries: &[f32], k: usize, out: impl Fn(u64) -> bool) -> Vec<Vec<Hit>> {
    let examples = rows.len() as usize;
    let left: Vec<u64> = (0..examples as u64).filter(|&example| out(example)).collect();
    let excluded = vec![left; queries.len() / rows.dim()];
    let request = search::Request {
        rows: &[],
        examples,
        queries,
        count: excluded.len(),
        k,
        sides: Sides { largest: true, smallest: false },
        excluded: &excluded,
        norms: &[],
        segments: &[],
    };
    let found = ends(rows, &request, 2, &Asker::new(&never)).unwrap();
    found.into_iter().map(|ends| ends.largest).collect()
}

/// The share of the true hits that was found; and every score found must be the true one.
fn recall(found: &[Vec<Hit>], truth: &[Vec<Hit>]) -> f64 {
    let (mut hits, mut all) = (0, 0);
    for (found, truth) in found.iter().zip(truth) {
        hits += truth.iter().filter(|hit| found.contains(hit)).count();
        all += truth.len();
    }
    hits as f64 / all as f64
}

/// By a search of its own: from the entries along the links.
fn all_reachable(graph: &Graph) -> bool {
    let Parts { links, entries, .. } = graph.parts(&Watch::none()).unwrap();
    let mut seen = vec![false; graph.len()];
    let mut stack = entries;
    while let Some(node) = stack.pop() {
        if !std::mem::replace(&mut seen[node as usize], true) {
            let links = &links[node as usize * DEGREE..][..DEGREE];
            stack.extend(links.iter().filter(|&&link| link != NONE));
        }
    }
    seen.into_iter().all(|seen| seen)
}

#[test]
fn a_walk_finds_what_the_scan_does() {
    let dim = 96;
    let (values, queries) = (clustered(6000, dim, 1), clustered(100, dim, 1 << 40));
    let rows = rows_of(&values, dim);
    let queries: Vec<f32> = queries
        .iter()
        .zip(values.iter().cycle().skip(77 * dim))
        .map(|(q, x)| 0.5 * q + x)
        .collect();
    let graph = graph_of(&values, dim);
    let truth = scanned(&rows, &queries, 10, |_| false);
    let narrow = recall(&answers(&graph, &request(&rows, &queries, 10), 20), &truth);
    let wide = recall(&answers(&graph, &request(&rows, &queries, 10), 200), &truth);
    assert!(narrow > 0.6 && wide > 0.99, "{narrow} {wide}");
}

#[test]
fn segments_with_scales_of_their_own_are_added_up() {
    // The first coordinates are far larger than the others, which decide where they agree.
    let dim = 200;
    let mut values = clustered(3000, dim, 2);
    for row in values.chunks_mut(dim) {
        for value in &mut row[..64] {
            *value *= 20.0;
        }
    }
    let rows = rows_of(&values, dim);
    let asker = Asker::new(&never);
    let codes = codes_of(&values, dim, &[UNIT]);
    assert_eq!(codes.segments().len(), 2);
    let graph = Graph::new(codes, norms_of(&values, dim), 5, 1, &asker).unwrap();
    let queries = &values[..50 * dim];
    let truth = scanned(&rows, queries, 5, |_| false);
    let found = recall(&answers(&graph, &request(&rows, queries, 5), 100), &truth);
    assert!(found > 0.9, "{found}");
}

#[test]
fn the_graph_is_the_same_for_any_number_of_threads_and_any_instructions() {
    let dim = 70;
    let values = clustered(3000, dim, 3);
    let codes = codes_of(&values, dim, &[]);
    let factors = walk::factors(&codes, &Watch::none()).unwrap();
    let asker = Asker::new(&never);
    let graph = graph_of(&values, dim);
    for threads in [1, 3, 8] {
        let norms = norms_of(&values, dim);
        let other = Graph::new(Arc::clone(&codes), norms, 5, threads, &asker).unwrap();
        assert_eq!(other.digest(&Watch::none()).unwrap(), graph.digest(&Watch::none()).unwrap());
        assert_eq!(other, graph);
    }
    for set in InstructionSet::available() {
        let directions = Directions { set, codes: &codes, factors: &factors };
        let links = build::build(&directions, &graph.entries, 5, 2, &asker).unwrap();
        assert!(links == graph.links, "{}", set.name());
    }
}

#[test]
fn answers_do_not_depend_on_threads_or_on_who_else_asks() {
    let dim = 64;
    let values = clustered(2000, dim, 4);
    let (rows, graph) = (rows_of(&values, dim), graph_of(&values, dim));
    let queries = &values[..70 * dim];
    let all = request(&rows, queries, 7);
    let asker = Asker::new(&never);
    let found = graph.search(&all, 12, 1, &asker).unwrap();
    for threads in [2, 5] {
        assert_eq!(graph.search(&all, 12, threads, &asker).unwrap(), found);
    }
    for (query, found) in queries.chunks(dim).zip(found) {
        let alone = graph.search(&request(&rows, query, 7), 12, 1, &asker).unwrap();
        assert_eq!(alone, [found]);
    }
}

#[test]
fn every_node_can_be_reached_whatever_the_rows() {
    let dim = 8;
    let far = |i: usize| {
        if (i / dim).is_multiple_of(50) { 1e4 * random(1, i) } else { random(2, i % dim) }
    };
    for count in [1, 2, 3, 40, 2500] {
        let sets: [Vec<f32>; 4] = [
            clustered(count, dim, 5),
            vec![0.0; count * dim],
            (0..count * dim).map(|i| random(6, i % dim)).collect(),
            (0..count * dim).map(far).collect(),
        ];
        for values in sets {
            let graph = graph_of(&values, dim);
            assert!(all_reachable(&graph));
            // Half of k more than there are: all come back, each once, with their true scores.
            let rows = rows_of(&values, dim);
            let query = [0.5; 8];
            let found = answers(&graph, &request(&rows, &query, count + 1), count);
            assert_eq!(found, scanned(&rows, &query, count + 1, |_| false));
        }
    }
}

#[test]
fn a_repair_reaches_what_lost_its_links() {
    let dim = 32;
    let values = clustered(1500, dim, 6);
    let graph = graph_of(&values, dim);
    let directions = directions(&graph.codes, &graph.factors);
    // Links only to nodes of the first half, only to the first node, and none at all.
    for kept in [750, 1, 0] {
        let mut links = graph.links.clone();
        for links in links.chunks_mut(DEGREE) {
            let left: Vec<u32> = links.iter().copied().filter(|&link| link < kept).collect();
            links.fill(NONE);
            links[..left.len()].copy_from_slice(&left);
        }
        build::repair(&directions, &mut links, &graph.entries, &Asker::new(&never)).unwrap();
        assert!(all_reachable(&Graph { links, ..graph.clone() }));
    }
}

#[test]
fn what_may_not_be_returned_is_not_and_the_rest_is_found() {
    let dim = 64;
    let values = clustered(3000, dim, 7);
    let (rows, graph) = (rows_of(&values, dim), graph_of(&values, dim));
    let queries = &values[..40 * dim];
    let eligible: Vec<bool> = (0..3000).map(|example| example % 3 != 0).collect();
    let excluded: Vec<Vec<u64>> = vec![(0..3000).step_by(5).collect(); 40];
    let mut asked = request(&rows, queries, 10);
    asked.eligible = &eligible;
    asked.excluded = &excluded;
    let out = |example: u64| [3, 5].iter().any(|&by| example.is_multiple_of(by));
    let found = answers(&graph, &asked, 60);
    assert!(found.iter().flatten().all(|hit| !out(hit.example)));
    let found = recall(&found, &scanned(&rows, queries, 10, out));
    assert!(found > 0.95, "{found}");
    asked.eligible = &[false; 3000];
    assert!(answers(&graph, &asked, 60).iter().all(Vec::is_empty));
}

#[test]
fn added_examples_are_found_like_the_others() {
    let dim = 64;
    let values = clustered(5000, dim, 8);
    let rows = rows_of(&values, dim);
    let asker = Asker::new(&never);
    let truth = scanned(&rows, &values[..60 * dim], 10, |_| false);
    let (first, rest) = values.split_at(3000 * dim);
    let before = graph_of(first, dim);
    let (more, norms) = (codes_of(rest, dim, &[]), norms_of(rest, dim));
    let graph = before.grown(&more, &norms, 5, 1, &asker).unwrap();
    for threads in [2, 3, 8] {
        assert_eq!(before.grown(&more, &norms, 5, threads, &asker).unwrap(), graph);
    }
    assert_eq!(graph.len(), 5000);
    assert!(all_reachable(&graph));
    let found = answers(&graph, &request(&rows, &values[..60 * dim], 10), 60);
    assert!(recall(&found, &truth) > 0.95);
    // The scan by the same codes, whose answer is proven.
    let numbers: Vec<u64> = (0..5000).collect();
    let mut proven = request(&rows, &values[..60 * dim], 10);
    proven.numbers = &numbers;
    let proven = search::certified::search(graph.codes(), &proven, 1, &asker).unwrap();
    let proven: Vec<Vec<Hit>> = proven.into_iter().map(|answer| answer.ends.largest).collect();
    assert_eq!(proven, truth);
    // More than there are: a graph anew.
    let small = graph_of(&values[..100 * dim], dim);
    let rest = &values[100 * dim..];
    let small = small.grown(&codes_of(rest, dim, &[]), &norms_of(rest, dim), 5, 2, &asker).unwrap();
    assert!(recall(&answers(&small, &request(&rows, &values[..60 * dim], 10), 60), &truth) > 0.95);
    // What was made otherwise, and norms that do not fit.
    let other = clustered(100, dim + 1, 14);
    let made = codes_of(&other, dim + 1, &[]);
    assert!(graph.grown(&made, &norms_of(&other, dim + 1), 5, 1, &asker).is_err());
    assert!(graph.grown(&more, &norms[1..], 5, 1, &asker).is_err());
}

#[test]
fn the_margin_says_how_far_the_rest_was_behind() {
    let dim = 64;
    let values = clustered(2000, dim, 9);
    let (rows, graph) = (rows_of(&values, dim), graph_of(&values, dim));
    let mut asked = request(&rows, &values[..20 * dim], 5);
    let asker = Asker::new(&never);
    for answer in graph.search(&asked, 50, 1, &asker).unwrap() {
        assert_eq!((answer.scored, answer.margins[0]), (50, f32::INFINITY));
    }
    asked.candidates = Some(8);
    for answer in graph.search(&asked, 50, 1, &asker).unwrap() {
        assert_eq!(answer.scored, 8);
        assert!(answer.margins[0].abs() < answer.ends.largest[0].score);
    }
}

#[test]
fn no_examples_and_no_queries_give_no_answers() {
    let rows = rows_of(&[], 4);
    let asker = Asker::new(&never);
    let graph = graph_of(&[], 4);
    assert!(graph.is_empty() && graph.norm_spread() == 1.0);
    assert_eq!(answers(&graph, &request(&rows, &[1.0; 4], 3), 10), [[]]);
    let back = Graph::from_parts(
        Arc::clone(graph.codes()),
        graph.parts(&Watch::none()).unwrap(),
        &Watch::none(),
    )
    .unwrap();
    assert_eq!(back, graph);
    let values = clustered(50, 4, 10);
    let norms = norms_of(&values, 4);
    let grown = graph.grown(&codes_of(&values, 4, &[]), &norms, 5, 1, &asker).unwrap();
    assert!(all_reachable(&grown));
    assert!(answers(&grown, &request(&rows_of(&values, 4), &[], 3), 10).is_empty());
}

#[test]
fn the_spread_of_norms_is_the_largest_over_the_middle() {
    let values = [1.0, 0.0, 0.0, 2.0, 3.0, 0.0, 0.0, 30.0, 0.0, 2.0];
    assert_eq!(graph_of(&values, 2).norm_spread(), 15.0);
    assert_eq!(graph_of(&[0.0; 6], 2).norm_spread(), 1.0);
    assert_eq!(graph_of(&[0.0, 0.0, 0.0, 0.0, 3.0, 4.0], 2).norm_spread(), f32::INFINITY);
}

#[test]
fn what_is_asked_for_and_cannot_be_is_an_error() {
    let dim = 4;
    let values = clustered(100, dim, 11);
    let (rows, graph) = (rows_of(&values, dim), graph_of(&values, dim));
    let asker = Asker::new(&never);
    let query = [1.0; 4];
    let mut asked = request(&rows, &query, 3);
    // Numbers that would size an allocation do not.
    assert!(
        graph
            .search(
                &Request { k: usize::MAX, ..request(&rows, &query, 0) },
                usize::MAX,
                usize::MAX,
                &asker
            )
            .is_ok()
    );
    asked.sides = Sides::BOTH;
    assert!(graph.search(&asked, 10, 1, &asker).is_err());
    assert!(graph.search(&request(&rows, &[f32::NAN; 4], 3), 10, 1, &asker).is_err());
    assert!(graph.search(&request(&rows, &[f32::MAX; 4], 3), 10, 1, &asker).is_err());
    for norms in [vec![1.0; 99], vec![f32::NAN; 100], vec![-1.0; 100]] {
        assert!(Graph::new(Arc::clone(graph.codes()), norms, 0, 1, &asker).is_err());
    }
    let yes = || true;
    let (many, dim) = (clustered(20_000, 8, 12), 8);
    let codes = codes_of(&many, dim, &[]);
    let stopped = Graph::new(codes, norms_of(&many, dim), 0, 2, &Asker::new(&yes));
    assert!(matches!(stopped, Err(Error::Stopped)));
}

#[test]
fn parts_that_a_walk_could_not_rely_on_are_refused() {
    let dim = 8;
    let values = clustered(300, dim, 13);
    let graph = graph_of(&values, dim);
    let with = |change: &dyn Fn(&mut Parts)| {
        let mut parts = graph.parts(&Watch::none()).unwrap();
        change(&mut parts);
        Graph::from_parts(Arc::clone(graph.codes()), parts, &Watch::none())
    };
    assert_eq!(with(&|_| ()).unwrap(), graph);
    assert!(with(&|parts| parts.norms.truncate(299)).is_err());
    assert!(with(&|parts| parts.norms[5] = f32::INFINITY).is_err());
    assert!(with(&|parts| parts.links.truncate(299 * DEGREE)).is_err());
    assert!(with(&|parts| parts.links.clear()).is_err());
    assert!(with(&|parts| parts.links[0] = 300).is_err());
    assert!(with(&|parts| parts.links[0] = NONE - 1).is_err());
    assert!(with(&|parts| parts.links[0] = 0).is_err());
    assert!(with(&|parts| parts.links[1] = parts.links[0]).is_err());
    assert!(with(&|parts| parts.links[0] = NONE).is_err());
    assert!(with(&|parts| parts.links.fill(NONE)).is_err());
    assert!(with(&|parts| parts.entries.clear()).is_err());
    assert!(with(&|parts| parts.entries[0] = 300).is_err());
    assert!(with(&|parts| parts.entries.reverse()).is_err());
    // Whatever single number is wrong: refused, or a graph that can be searched.
    let rows = rows_of(&values, dim);
    let query = [1.0; 8];
    for at in 0..400 {
        let place = random::below(random::value(1, at), (300 * DEGREE) as u32) as usize;
        let link = random::value(2, at) as u32 >> (at % 32);
        if let Ok(graph) = with(&|parts| parts.links[place] = link) {
            assert_eq!(answers(&graph, &request(&rows, &query, 300), 300)[0].len(), 300);
        }
    }
}
