//! For each term the documents that hold it, and how often: an inverted index as compressed sparse
//! rows.

use std::ops::Range;

use super::Texts;
use crate::error::Error;
use crate::memory::{copied, filled, joined};
use crate::order;
use crate::parallel::collect;
use crate::stop::{Asker, Watch};

/// Tokens of a job: 2 MiB of keys, some milliseconds of sorting.
const PART: u64 = 1 << 18;

/// The postings of documents. They are the same for any number of threads, and however many steps
/// the documents came in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Postings {
    lists: Lists,
    lengths: Vec<u32>,
}

/// Postings without the documents that hold no token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Lists {
    /// The distinct terms, in rising order.
    terms: Vec<u32>,
    /// Where the list of each term ends, and the next begins.
    ends: Vec<usize>,
    /// The documents of each list, in rising order.
    documents: Vec<u32>,
    /// How often the document holds the term.
    counts: Vec<u32>,
}

impl Postings {
    /// These and those of more documents, which are numbered on from here.
    ///
    /// O(postings + tokens · log tokens) time, and 16 bytes a posting while it is made, half of
    /// which stay.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are more than 2^32 - 1 documents; [`Error::Stopped`].
    pub fn appended(
        &self,
        texts: Texts<'_>,
        threads: usize,
        asker: &Asker<'_>,
    ) -> Result<Self, Error> {
        let documents = self.len() as u64 + texts.len() as u64;
        let Ok(_) = u32::try_from(documents) else {
            let must = format!("at most {} with those before", u32::MAX);
            return Err(Error::argument("documents", must, documents));
        };
        let jobs = texts.cut(PART);
        let parts = collect(jobs.len(), threads, asker, Vec::new, |keys, job, watch| {
            Lists::of(texts, jobs[job].clone(), self.len(), keys, watch)
        })?;
        let all: Vec<&Lists> = std::iter::once(&self.lists).chain(&parts).collect();
        let lists = Lists::joined(&all, asker)?;
        let mut lengths = copied(&self.lengths, &Watch::of(asker))?;
        lengths.extend(texts.lengths());
        Ok(Self { lists, lengths })
    }

    /// How many documents there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lengths.len()
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lengths.is_empty()
    }

    /// The number of tokens of each document.
    #[must_use]
    pub fn lengths(&self) -> &[u32] {
        &self.lengths
    }

    /// The documents that hold a term, in rising order, and how often they do; none if it is not
    /// known. O(log terms).
    #[must_use]
    pub fn of(&self, term: u32) -> (&[u32], &[u32]) {
        match self.lists.terms.binary_search(&term) {
            Ok(at) => self.lists.at(at),
            Err(_) => (&[], &[]),
        }
    }

    /// Bytes that are kept.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let Lists { terms, ends, documents, counts } = &self.lists;
        size_of_val(&self.lengths[..])
            + size_of_val(&terms[..])
            + size_of_val(&ends[..])
            + size_of_val(&documents[..])
            + size_of_val(&counts[..])
    }
}

impl Lists {
    /// Those of some texts, the first of all texts being document `first`; `keys` is scratch.
    fn of(
        texts: Texts<'_>,
        here: Range<usize>,
        first: usize,
        keys: &mut Vec<u64>,
        watch: &Watch<'_>,
    ) -> Result<Self, Error> {
        keys.clear();
        for text in here {
            let document = (first + text) as u64;
            keys.extend(texts.at(text).iter().map(|&token| u64::from(token) << 32 | document));
        }
        order::sort(keys, watch, Ord::cmp)?;
        let mut lists = Self::default();
        let mut steps = watch.steps();
        for same in keys.chunk_by(|a, b| a == b) {
            steps.add(5 + same.len())?;
            let (term, document) = ((same[0] >> 32) as u32, same[0] as u32);
            if lists.terms.last() != Some(&term) {
                lists.terms.push(term);
                lists.ends.push(lists.documents.len());
            }
            lists.documents.push(document);
            lists.counts.push(same.len() as u32);
            if let Some(end) = lists.ends.last_mut() {
                *end = lists.documents.len();
            }
        }
        Ok(lists)
    }

    /// The lists of all parts; the documents of a part come after those of the parts before it.
    fn joined(parts: &[&Self], asker: &Asker<'_>) -> Result<Self, Error> {
        let watch = &Watch::of(asker);
        let terms: Vec<&[u32]> = parts.iter().map(|part| &part.terms[..]).collect();
        let mut terms = joined(&terms, watch)?;
        order::sort(&mut terms, watch, Ord::cmp)?;
        order::dedup(&mut terms, watch)?;
        terms.shrink_to_fit();
        let mut sizes = vec![0usize; terms.len()];
        for part in parts {
            part.visit(&terms, watch, |place, documents, _| sizes[place] += documents.len())?;
        }
        // Where the next posting of each term goes: in the end, where its list ends.
        let mut ends = sizes;
        let mut total = 0;
        for end in &mut ends {
            total += std::mem::replace(end, total);
        }
        let (mut documents, mut counts) = (filled(total, 0, watch)?, filled(total, 0, watch)?);
        for part in parts {
            part.visit(&terms, watch, |place, more, their| {
                let next = ends[place]..ends[place] + more.len();
                documents[next.clone()].copy_from_slice(more);
                counts[next.clone()].copy_from_slice(their);
                ends[place] = next.end;
            })?;
        }
        Ok(Self { terms, ends, documents, counts })
    }

    /// Calls with each list, and the place of its term among all terms.
    fn visit(
        &self,
        all: &[u32],
        watch: &Watch<'_>,
        mut call: impl FnMut(usize, &[u32], &[u32]),
    ) -> Result<(), Error> {
        let mut place = 0;
        let mut steps = watch.steps();
        for (at, term) in self.terms.iter().enumerate() {
            place += all[place..].partition_point(|other| other < term);
            let (documents, counts) = self.at(at);
            steps.add(100 + documents.len())?;
            call(place, documents, counts);
        }
        Ok(())
    }

    /// A list, by the place of its term.
    fn at(&self, place: usize) -> (&[u32], &[u32]) {
        let start = place.checked_sub(1).map_or(0, |before| self.ends[before]);
        let here = start..self.ends[place];
        (&self.documents[here.clone()], &self.counts[here])
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::super::texts::flat;
    use super::*;
    use crate::stop::never;

    fn appended(postings: &Postings, documents: &[Vec<u32>], threads: usize) -> Postings {
        let (tokens, starts) = flat(documents);
        let texts = Texts::new(&tokens, &starts).unwrap();
        postings.appended(texts, threads, &Asker::new(&never)).unwrap()
    }

    proptest! {
        #[test]
        fn are_those_of_a_map(
            documents in prop::collection::vec(prop::collection::vec(0u32..9, 0..8), 0..30),
            cut in 0usize..30, high in any::<u32>(),
        ) {
            // Terms may be any numbers.
            let documents: Vec<Vec<u32>> = documents
                .iter()
                .map(|document| document.iter().map(|&token| high.wrapping_add(token)).collect())
                .collect();
            let mut expected: BTreeMap<u32, BTreeMap<u32, u32>> = BTreeMap::new();
            for (number, document) in (0..).zip(&documents) {
                for &token in document {
                    *expected.entry(token).or_default().entry(number).or_default() += 1;
                }
            }
            let postings = appended(&Postings::default(), &documents, 1);
            for token in 0..10 {
                let term = high.wrapping_add(token);
                let (documents, counts) = postings.of(term);
                let found = documents.iter().copied().zip(counts.iter().copied());
                let expected = expected.get(&term).cloned().unwrap_or_default();
                prop_assert!(found.eq(expected));
            }
            let lengths: Vec<u32> = documents.iter().map(|each| each.len() as u32).collect();
            prop_assert_eq!(postings.lengths(), lengths);
            let (before, after) = documents.split_at(cut.min(documents.len()));
            let steps = appended(&appended(&Postings::default(), before, 1), after, 2);
            prop_assert_eq!(steps, postings);
        }
    }

    #[test]
    fn parts_are_joined_in_order_for_any_number_of_threads() {
        // 3 jobs.
        let documents: Vec<Vec<u32>> = (0..1000u32)
            .map(|i| (0..700).map(|j| i.wrapping_mul(j * j + 7) >> 3).collect())
            .collect();
        let postings = appended(&Postings::default(), &documents, 1);
        assert_eq!(appended(&Postings::default(), &documents, 3), postings);
        let total: u64 = postings.lists.counts.iter().map(|&count| u64::from(count)).sum();
        assert_eq!(total, 700_000);
        for term in [0, 1, 30, 8000] {
            let (holders, counts) = postings.of(term);
            let expected = (0u32..).zip(&documents).filter_map(|(number, document)| {
                let count = document.iter().filter(|&&token| token == term).count() as u32;
                (count > 0).then_some((number, count))
            });
            assert!(holders.iter().copied().zip(counts.iter().copied()).eq(expected));
        }
    }

    #[test]
    fn can_be_stopped() {
        let yes = || true;
        let asker = Asker::new(&yes);
        std::thread::sleep(std::time::Duration::from_millis(60));
        let texts = Texts::new(&[1], &[0, 1]).unwrap();
        assert!(matches!(Postings::default().appended(texts, 1, &asker), Err(Error::Stopped)));
    }
}
