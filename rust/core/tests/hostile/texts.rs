//! Lists of tokens.

use whence_core::stop::{Asker, never};
use whence_core::text::index::Request;
use whence_core::text::{Index, Texts, Weighting};

use super::choices::Choices;
use super::fine;

/// Tokens, and where each text begins: numbers that rise to the number of tokens, or do not.
fn texts(choices: &mut Choices<'_>) -> (Vec<u32>, Vec<u64>) {
    let count = choices.below(12);
    let lengths: Vec<usize> = (0..count).map(|_| choices.below(9)).collect();
    let mut starts = vec![0];
    for length in lengths {
        starts.push(starts[starts.len() - 1] + length as u64);
    }
    let mut tokens: Vec<u32> = choices
        .noise(starts[starts.len() - 1] as usize)
        .into_iter()
        .map(|token| u32::from(token % 16).wrapping_sub(3))
        .collect();
    choices.spoil(&mut tokens);
    choices.spoil(&mut starts);
    (tokens, starts)
}

pub(super) fn search_texts(choices: &mut Choices<'_>) {
    let asker = &Asker::new(&never);
    let number = |choices: &mut Choices<'_>| match choices.below(4) {
        0 => f64::from_bits(choices.word()),
        1 => f64::NAN,
        _ => f64::from(choices.byte()) / 200.0,
    };
    let weighting = match choices.below(2) {
        0 => Weighting::TfIdf,
        _ => Weighting::Bm25 { k1: number(choices), b: number(choices) },
    };
    let Some(mut index) = fine(Index::new(weighting)) else { return };
    for _ in 0..choices.below(4) {
        let (tokens, starts) = texts(choices);
        let before = index.postings().len();
        let Some(more) = fine(Texts::new(&tokens, &starts)) else { continue };
        index = fine(index.appended(more, 1, asker)).unwrap();
        assert_eq!(index.postings().len(), before + more.len());
    }
    let documents = index.postings().len();
    let (tokens, starts) = texts(choices);
    let Some(queries) = fine(Texts::new(&tokens, &starts)) else { return };
    let mut eligible = vec![1u8; if choices.once_in(2) { documents } else { 0 }];
    choices.spoil(&mut eligible);
    let eligible: Vec<bool> = eligible.into_iter().map(|byte| byte != 0).collect();
    let k = choices.about(3) as usize;
    let found = fine(index.search(&Request { queries, k, eligible: &eligible }, 1, asker));
    let scores = fine(index.scores(queries, 1, asker)).unwrap();
    assert_eq!(scores.len(), queries.len() * documents);
    for (query, hits) in found.into_iter().flatten().enumerate() {
        assert!(hits.len() <= k.min(documents));
        for hit in hits {
            let score = scores[query * documents + hit.example as usize];
            assert!(hit.score == score as f32 && score.is_finite());
            assert!(eligible.get(hit.example as usize).is_none_or(|&eligible| eligible));
        }
    }
}
