"""Speed of building and asking an inverted index, beside scikit-learn and sparse products of scipy.

20,000 documents of about 100 words each, whose frequencies fall as those of a language do.
"""

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer

from whence.text import Bm25, TfIdf, words

DOCUMENTS, QUERIES, K = 20_000, 100, 10


def texts(count, seed):
    random = np.random.default_rng(seed)
    ranks = np.minimum(random.zipf(1.2, (count, 100)), 100_000).tolist()
    return [" ".join(f"w{rank}" for rank in each) for each in ranks]


@pytest.fixture(scope="module")
def data():
    return texts(DOCUMENTS, 0), texts(QUERIES, 1)


class Sparse:
    """The same scores as a product of sparse matrices."""

    def __init__(self, documents, *, counted):
        self.vectorizer = CountVectorizer(analyzer=words)
        held = self.vectorizer.fit_transform(documents).astype(np.float64)
        count, lengths = held.shape[0], np.asarray(held.sum(1)).ravel()
        holders = np.bincount(held.indices, minlength=held.shape[1])
        weights = np.log((count - holders + 0.5) / (holders + 0.5) + 1)[held.indices]
        if counted:
            level = 1.5 * (0.25 + 0.75 * lengths / lengths.mean())
            level = np.repeat(level, np.diff(held.indptr))
            weights = weights * 2.5 * held.data / (held.data + level)
        held.data = weights
        self.weights = held.T.tocsr()

    def search(self, queries, k):
        """[queries, k] the largest scores, in falling order."""
        scores = (self.vectorizer.transform(queries).astype(np.float64) @ self.weights).toarray()
        found = np.argpartition(-scores, k, axis=1)[:, :k]
        return -np.sort(-np.take_along_axis(scores, found, 1), axis=1)


KINDS = {"tf-idf": (TfIdf, False), "bm25": (Bm25, True)}


@pytest.mark.parametrize("who", ["ours", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_build(benchmark, data, kind, who):
    ours, counted = KINDS[kind]
    if who == "ours":
        assert len(benchmark(ours, data[0], threads=1)) == DOCUMENTS
    else:
        benchmark(Sparse, data[0], counted=counted)


@pytest.mark.parametrize("who", ["ours", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_search(benchmark, data, kind, who):
    ours, counted = KINDS[kind]
    index, sparse = ours(data[0], threads=1), Sparse(data[0], counted=counted)
    expected = sparse.search(data[1], K)
    assert np.allclose(index.search(data[1], K).helpful.scores, expected, rtol=1e-6)
    if who == "ours":
        benchmark(index.search, data[1], K, threads=1)
    else:
        benchmark(sparse.search, data[1], K)
