//! Scores by TF-IDF and BM25, and the documents with the largest.
//!
//! A query's terms are added up in rising order, in f64, by one thread: a score has the same bits
//! for any number of threads. Hits are ranked by scores rounded to f32, so that sums that differ by
//! rounding are ties.

use std::sync::Mutex;

use super::Texts;
use super::postings::Postings;
use crate::error::Error;
use crate::memory::try_filled;
use crate::order;
use crate::parallel::{collect, share};
use crate::search::top::Sieve;
use crate::search::{Hit, Sides};
use crate::stop::{Asker, Watch};

/// The largest `k1`, above which a count of 1000 would still weigh less than half of what it could.
pub const MAX_K1: f64 = 1000.0;
/// Postings between two looks at the watch.
const STEP: usize = 1 << 16;
/// Scores that are looked at together.
const LANES: usize = 16;
/// The share of documents, one in so many, up to which those with a score are looked up one by one.
const FEW: usize = 8;

/// What a token of the query that a document holds adds to the document's score. N documents there
/// are, df of them hold the token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weighting {
    /// `IDF = ln((N - df + 0.5) / (df + 0.5) + 1)`, whatever the count.
    TfIdf,
    /// `IDF · (k1 + 1) · count / (count + k1 · (1 - b + b · length / mean length))`.
    Bm25 {
        /// How late the weight of a count levels off.
        k1: f64,
        /// How much the length of a document counts.
        b: f64,
    },
}

/// Documents and their postings.
#[derive(Clone, Debug, PartialEq)]
pub struct Index {
    postings: Postings,
    weighting: Weighting,
    /// What is added to the count of a term in the denominator, for each document; empty for
    /// weights that do not ask for it.
    levels: Vec<f64>,
}

/// What to search for.
pub struct Request<'a> {
    /// The queries.
    pub queries: Texts<'a>,
    /// How many hits to return; at most the documents there are.
    pub k: usize,
    /// `[documents]` whether each may be returned; empty for all.
    pub eligible: &'a [bool],
}

impl Index {
    /// An index of no document.
    ///
    /// # Errors
    /// [`Error::Argument`] if `k1` is not from 0 to [`MAX_K1`], or `b` not from 0 to 1.
    pub fn new(weighting: Weighting) -> Result<Self, Error> {
        if let Weighting::Bm25 { k1, b } = weighting {
            for (argument, value, high) in [("k1", k1, MAX_K1), ("b", b, 1.0)] {
                if !(0.0..=high).contains(&value) {
                    return Err(Error::argument(argument, format!("from 0 to {high}"), value));
                }
            }
        }
        Ok(Self { postings: Postings::default(), weighting, levels: Vec::new() })
    }

    /// This and more documents.
    ///
    /// # Errors
    /// As [`Postings::appended`].
    pub fn appended(
        &self,
        texts: Texts<'_>,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Self, Error> {
        let postings = self.postings.appended(texts, threads, asker)?;
        let levels = match self.weighting {
            Weighting::TfIdf => Vec::new(),
            Weighting::Bm25 { k1, b } => {
                let lengths = postings.lengths();
                let total: u64 = lengths.iter().map(|&length| u64::from(length)).sum();
                // Without a token there is no count that this would be added to.
                let mean = total.max(1) as f64 / lengths.len() as f64;
                lengths
                    .iter()
                    .map(|&length| k1 * (1.0 - b + b * f64::from(length) / mean))
                    .collect()
            }
        };
        Ok(Self { postings, weighting: self.weighting, levels })
    }

    /// The documents.
    #[must_use]
    pub fn postings(&self) -> &Postings {
        &self.postings
    }

    /// Bytes that are kept.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.postings.bytes() + size_of_val(&self.levels[..])
    }

    /// The eligible documents with the largest scores for each query, of equal ones the lower.
    ///
    /// Documents that share no token with the query have the score 0, and come last. O(postings of
    /// the query's tokens + k log k) time a query, and 8 bytes a document for each thread.
    ///
    /// # Errors
    /// [`Error::Shape`] if `eligible` is of another length; [`Error::Stopped`].
    pub fn search(
        &self,
        request: &Request<'_>,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Vec<Vec<Hit>>, Error> {
        let (documents, eligible) = (self.postings.len(), request.eligible);
        if !eligible.is_empty() && eligible.len() != documents {
            let got = format!("{} values", eligible.len());
            return Err(Error::shape("eligible", format!("[{documents}]"), got));
        }
        let k = request.k.min(documents); // the caller's number never sizes an allocation
        collect(
            request.queries.len(),
            threads,
            asker,
            || (vec![0.0; documents], Vec::new()),
            |(scores, tokens), query, watch| {
                self.add(request.queries.at(query), tokens, scores, watch)?;
                self.best(tokens, scores, k, eligible, watch)
            },
        )
    }

    /// `[queries, documents]` all scores.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no memory for so many; [`Error::Stopped`].
    pub fn scores(
        &self,
        queries: Texts<'_>,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Vec<f64>, Error> {
        let documents = self.postings.len();
        let total = queries.len().checked_mul(documents);
        let room = total.map(|total| try_filled(total, 0.0, &Watch::of(asker)));
        let Some(mut all) = room.transpose()?.flatten() else {
            let must = format!("so few that scores of {documents} documents fit in memory");
            return Err(Error::argument("queries", must, queries.len()));
        };
        let rows: Vec<_> = all.chunks_exact_mut(documents.max(1)).map(Mutex::new).collect();
        share(rows.len(), threads, asker, Vec::new, |tokens, query, watch| {
            let mut scores = rows[query].lock().map_err(Error::panicked)?;
            self.add(queries.at(query), tokens, &mut scores, watch)
        })?;
        drop(rows);
        Ok(all)
    }

    /// Adds the scores for a query; leaves its tokens in rising order in `tokens`.
    fn add(
        &self,
        query: &[u32],
        tokens: &mut Vec<u32>,
        scores: &mut [f64],
        watch: &Watch<'_>,
    ) -> Result<(), Error> {
        tokens.clear();
        tokens.extend_from_slice(query);
        order::sort(tokens, watch, Ord::cmp)?;
        for same in tokens.chunk_by(|a, b| a == b) {
            let (documents, counts) = self.postings.of(same[0]);
            let weight = same.len() as f64 * self.idf(documents.len());
            for (documents, counts) in documents.chunks(STEP).zip(counts.chunks(STEP)) {
                watch.check()?;
                match self.weighting {
                    Weighting::TfIdf => {
                        for &document in documents {
                            scores[document as usize] += weight;
                        }
                    }
                    Weighting::Bm25 { k1, .. } => {
                        let weight = weight * (k1 + 1.0);
                        for (&document, &count) in documents.iter().zip(counts) {
                            let (document, count) = (document as usize, f64::from(count));
                            scores[document] += weight * count / (count + self.levels[document]);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// `ln((N - df + 0.5) / (df + 0.5) + 1)`: above 0, for df is at most N.
    fn idf(&self, holders: usize) -> f64 {
        let (all, holders) = (self.postings.len() as f64, holders as f64);
        ((all - holders + 0.5) / (holders + 0.5)).ln_1p()
    }

    /// The best of the scores that `add` made, which are zeros afterwards.
    fn best(
        &self,
        tokens: &[u32],
        scores: &mut [f64],
        k: usize,
        eligible: &[bool],
        watch: &Watch<'_>,
    ) -> Result<Vec<Hit>, Error> {
        let mut sieve = Sieve::new(Sides { largest: true, smallest: false });
        // A score that is not above the floor is none of the best; 0 stands for no token shared.
        let mut floor = 0.0;
        let mut sift = |document: usize, score: f64, floor: &mut f64| {
            if score > *floor && eligible.get(document).is_none_or(|&eligible| eligible) {
                sieve.add(Hit { example: document as u64, score: score as f32 }, k);
                // What rounds to the threshold lies above the f32 before it.
                *floor = floor.max(f64::from(sieve.above.next_down()));
            }
        };
        let lists = tokens.chunk_by(|a, b| a == b).map(|same| self.postings.of(same[0]).0);
        if lists.clone().map(<[u32]>::len).sum::<usize>() <= scores.len() / FEW {
            for documents in lists.flat_map(|documents| documents.chunks(STEP)) {
                watch.check()?;
                for &document in documents {
                    let score = std::mem::take(&mut scores[document as usize]);
                    sift(document as usize, score, &mut floor);
                }
            }
        } else {
            for (step, scores) in scores.chunks_mut(STEP).enumerate() {
                watch.check()?;
                for (at, few) in scores.chunks(LANES).enumerate() {
                    // Counted, and not the first looked for: that can be done for all at once.
                    if few.iter().filter(|&&score| score > floor).count() > 0 {
                        for (lane, &score) in few.iter().enumerate() {
                            sift(step * STEP + at * LANES + lane, score, &mut floor);
                        }
                    }
                }
                scores.fill(0.0);
            }
        }
        let mut hits = sieve.finish(k, watch)?.largest;
        if hits.len() < k {
            // All that have a score are there. Those without follow in their order.
            let mut found: Vec<u64> = hits.iter().map(|hit| hit.example).collect();
            order::sort(&mut found, watch, Ord::cmp)?;
            let mut found = found.into_iter().peekable();
            let others = (0..scores.len())
                .filter(|&document| found.next_if_eq(&(document as u64)).is_none())
                .filter(|&document| eligible.get(document).is_none_or(|&eligible| eligible))
                .map(|document| Hit { example: document as u64, score: 0.0 });
            let missing = k - hits.len();
            hits.extend(others.take(missing));
        }
        Ok(hits)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::texts::flat;
    use super::*;
    use crate::stop::never;

    fn index_of(documents: &[Vec<u32>], weighting: Weighting) -> Index {
        let (tokens, starts) = flat(documents);
        let texts = Texts::new(&tokens, &starts).unwrap();
        Index::new(weighting).unwrap().appended(texts, 2, &Asker::new(&never)).unwrap()
    }

    /// The formulas, token by token.
    fn score(documents: &[Vec<u32>], at: usize, query: &[u32], weighting: Weighting) -> f64 {
        let (all, document) = (documents.len() as f64, &documents[at]);
        let mean = documents.iter().map(Vec::len).sum::<usize>() as f64 / all;
        let of = |token: &u32| {
            let count = document.iter().filter(|&other| other == token).count() as f64;
            if count == 0.0 {
                return 0.0;
            }
            let holders = documents.iter().filter(|each| each.contains(token)).count() as f64;
            let idf = ((all - holders + 0.5) / (holders + 0.5) + 1.0).ln();
            idf * match weighting {
                Weighting::TfIdf => 1.0,
                Weighting::Bm25 { k1, b } => {
                    let length = document.len() as f64 / mean;
                    count * (k1 + 1.0) / (count + k1 * (1.0 - b + b * length))
                }
            }
        };
        query.iter().map(of).sum()
    }

    const WEIGHTINGS: [Weighting; 4] = [
        Weighting::TfIdf,
        Weighting::Bm25 { k1: 1.5, b: 0.75 },
        Weighting::Bm25 { k1: 0.0, b: 0.0 },
        Weighting::Bm25 { k1: MAX_K1, b: 1.0 },
    ];

    proptest! {
        #[test]
        fn hits_are_those_of_a_full_sort_of_the_formulas(
            documents in prop::collection::vec(prop::collection::vec(0u32..12, 0..6), 1..40),
            queries in prop::collection::vec(prop::collection::vec(0u32..14, 0..6), 0..5),
            mask in prop::collection::vec(any::<bool>(), 40), masked in any::<bool>(),
            k in 0usize..50, threads in 1usize..4,
        ) {
            let asker = Asker::new(&never);
            let (tokens, starts) = flat(&queries);
            let texts = Texts::new(&tokens, &starts).unwrap();
            let eligible = if masked { &mask[..documents.len()] } else { &[] };
            for weighting in WEIGHTINGS {
                let index = index_of(&documents, weighting);
                let request = Request { queries: texts, k, eligible };
                let found = index.search(&request, threads, &asker).unwrap();
                prop_assert_eq!(found.len(), queries.len());
                let all = index.scores(texts, threads, &asker).unwrap();
                prop_assert_eq!(&all, &index.scores(texts, 1, &asker).unwrap());
                for (query, (hits, scores)) in
                    queries.iter().zip(found.iter().zip(all.chunks(documents.len())))
                {
                    for (at, &found) in scores.iter().enumerate() {
                        let expected = score(&documents, at, query, weighting);
                        prop_assert!((found - expected).abs() <= 1e-12 * expected);
                    }
                    let mut expected: Vec<Hit> = scores
                        .iter()
                        .enumerate()
                        .filter(|(at, _)| !masked || mask[*at])
                        .map(|(at, &score)| Hit { example: at as u64, score: score as f32 })
                        .collect();
                    expected.sort_by(|a, b| b.score.total_cmp(&a.score));
                    expected.truncate(k);
                    prop_assert_eq!(hits, &expected);
                }
            }
        }
    }

    #[test]
    fn few_and_many_holders_are_collected_alike() {
        // Token 0 is everywhere, the others in one document of 100 each.
        let documents: Vec<Vec<u32>> = (0..1000).map(|at| vec![0, 1 + at % 100]).collect();
        let asker = Asker::new(&never);
        for weighting in WEIGHTINGS {
            let index = index_of(&documents, weighting);
            let tokens = [7, 0, 7, 5, 7, 7];
            let texts = Texts::new(&tokens, &[0, 1, 3, 6]).unwrap();
            let request = Request { queries: texts, k: 15, eligible: &[] };
            let found = index.search(&request, 1, &asker).unwrap();
            for (query, hits) in found.iter().enumerate() {
                let held: &[u64] = if query == 2 { &[6, 4] } else { &[6] };
                let places = held.iter().flat_map(|first| (0..10).map(move |at| first + 100 * at));
                let places: Vec<u64> = places.take(15).collect();
                let others = (0..).filter(|at| !places.contains(at)).take(15 - places.len());
                let expected: Vec<u64> = places.iter().copied().chain(others).collect();
                let found: Vec<u64> = hits.iter().map(|hit| hit.example).collect();
                assert_eq!(found, expected);
                assert_eq!(hits[12].score == 0.0, query == 0);
            }
        }
    }

    #[test]
    fn what_cannot_be_asked_is_an_error() {
        for (k1, b) in [(-0.1, 0.5), (MAX_K1 + 1.0, 0.5), (f64::NAN, 0.5), (1.0, 1.1), (1.0, -1.0)]
        {
            assert!(Index::new(Weighting::Bm25 { k1, b }).is_err());
        }
        let index = index_of(&[vec![1], vec![2]], Weighting::TfIdf);
        let texts = Texts::new(&[1], &[0, 1]).unwrap();
        let asker = Asker::new(&never);
        for length in [1, 3] {
            let eligible = &[true; 3][..length];
            let request = Request { queries: texts, k: 1, eligible };
            assert!(index.search(&request, 1, &asker).is_err());
        }
        let empty = Index::new(Weighting::TfIdf).unwrap();
        let request = Request { queries: texts, k: 1, eligible: &[] };
        assert_eq!(empty.search(&request, 1, &asker).unwrap(), [vec![]]);
        assert!(empty.scores(texts, 1, &asker).unwrap().is_empty());
    }
}
