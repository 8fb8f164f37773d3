"""Scores by shared tokens: TF-IDF and BM25, from an inverted index."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays, _core
from whence._arrays import Ids
from whence.errors import ArgumentError, IdError
from whence.search import Hits, Side
from whence.store import Places, eligible
from whence.text.baseline import Baseline, ids_of
from whence.text.vocabulary import Encoded, Vocabulary


class _Lexical(Baseline):
    """An inverted index of documents."""

    def __init__(
        self,
        documents: Iterable[Any],
        ids: Any,
        bm25: tuple[float, float] | None,
        threads: int | None,
    ) -> None:
        self._vocabulary = Vocabulary()
        self._core = _core.InvertedIndex(bm25)
        self._numbered = ids is None
        self._ids: Ids = np.empty(0, np.int64)
        self._take(documents, ids, threads)

    def __repr__(self) -> str:
        return f"<whence {type(self).__name__} of {len(self)} documents>"

    @property
    def ids(self) -> Ids:
        """[documents] int64 or str."""
        return self._ids

    @property
    def bytes(self) -> int:
        """Bytes of the inverted index; ids and words are not counted."""
        return self._core.bytes

    def add(self, documents: Iterable[Any], ids: Any = None, *, threads: int | None = None) -> None:
        """Takes in more documents; the index is then that of all of them at once.

        No other thread may search meanwhile.

        Args:
            documents: As those before, and of their kind.
            ids: As those before; None if those are numbers of documents, which go on.
            threads: How many threads to use; None means all processors.

        Raises:
            WhenceError: As when it was built; nothing is added then.

        O(postings + tokens log tokens) time, and twice the memory of the index while it is made.
        """
        if ids is None and not self._numbered:
            raise IdError("ids must be given, as for the documents before, got None")
        self._take(documents, ids, threads)

    def _take(self, documents: Iterable[Any], ids: Any, threads: int | None) -> None:
        threads = _arrays.threads(threads)
        tokens, starts = self._vocabulary.learn(documents)
        count = len(starts) - 1
        if not count:
            raise ArgumentError("documents must have at least one, got none")
        found = ids_of(ids, count, len(self))
        if len(self):
            if found.dtype.kind != self._ids.dtype.kind:
                before, now = map(_arrays.kind_of_array, (self._ids, found))
                raise IdError(f"ids must be {before} as before, got {now}")
            found = _arrays.ids("ids", np.concatenate([self._ids, found]))
        self._core = self._core.appended(tokens, starts, threads)
        self._numbered = self._numbered and ids is None
        self._ids, self._places = found, Places(found)

    def search(
        self, queries: Any, k: int = 10, *, where: Any = None, threads: int | None = None
    ) -> Hits:
        """The k documents with the largest scores for each query.

        Scores are ranked as the hits show them, rounded to float32; of equal ones the earlier
        document comes first. Documents that share no token with the query have the score 0. What
        df and N count, and the mean length, are of all documents, whatever `where` leaves.

        Args:
            queries: One or more, in a list; each of the kind of the documents: str, a list of str
                tokens, or a list of token ids. Tokens that no document has count nothing.
            k: How many to return.
            where: Only documents that pass: [documents] bool, or a list of ids.
            threads: How many threads to use; None means all processors. Each query is answered by
                one; scores have the same bits for any number.

        Returns:
            Hits, min(k, eligible documents) wide; the harmful side has width 0, for a similarity
            has none. O(postings of the query's tokens + k log k) time a query, and 8 bytes a
            document for each thread.

        Raises:
            ArgumentError: If there is no query, k is below 1, no document is eligible, or a token
                id is out of range.
            DtypeError: If a query is not of the kind of the documents.
            ShapeError: If a query has more than one dimension.
            IdError: If an id of `where` is not there.
        """
        k = _arrays.integer("k", k, 1)
        threads = _arrays.threads(threads)
        tokens, starts = self._asked(queries)
        keep, left = None, len(self)
        if where is not None:
            keep = eligible(where, len(self), {}, {}, self._places.of)
            left = int(np.count_nonzero(keep))
        if not left:
            raise ArgumentError("where must leave a document, got none")
        positions, scores = self._core.search(tokens, starts, min(k, left), keep, threads)
        places, count = positions.astype(np.int64), len(positions)
        none = np.empty((count, 0), np.int64)
        return Hits(
            Side(self._ids[places], scores, places),
            Side(self._ids[none], np.empty((count, 0), np.float32), none),
            np.full(count, left, np.int64),
            self.method,
            self.unit,
            {},
            np.ones(count, np.bool_),
        )

    def scores(self, queries: Any, *, threads: int | None = None) -> NDArray[np.float64]:
        """[queries, documents] all scores.

        Args:
            queries: As in `search`.
            threads: As in `search`.

        Raises:
            WhenceError: As `search`, and if there is no memory for so many.
        """
        return self._core.scores(*self._asked(queries), _arrays.threads(threads))

    def _asked(self, queries: Any) -> Encoded:
        tokens, starts = self._vocabulary.encode(queries)
        if len(starts) == 1:
            raise ArgumentError("queries must have at least one, got none")
        return tokens, starts

    def _similar(self, scores: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Whether scores are of documents that share a token with the query."""
        return scores > 0


class TfIdf(_Lexical):
    """TF-IDF scores, as Grosse et al. filter candidates.

        score(Q, D) = sum over the tokens t of Q, with multiplicity, of [t in D] · IDF(t)
        IDF(t) = ln((N − df + 0.5) / (df + 0.5) + 1)

    for N documents, df of which hold t ("Studying Large Language Model Generalization with
    Influence Functions", arXiv 2308.03296, Eq. 28-29). Their factor (k1 + 1) e / (k1 + e) with
    e = [t in D] is e itself, for e is 0 or 1: no k1 remains. How often a document holds a token,
    and how long it is, does not count; a long document that holds everything is similar to
    everything.

    Args:
        documents: Any number of documents of one kind, read once and not kept: str, whose `words`
            are the tokens; lists of str tokens; or lists or arrays of token ids, 0 to 2**32 − 1.
        ids: [documents] int64 or str, distinct; None for the numbers of the documents.
        threads: How many threads to build with; None means all processors.

    Raises:
        ArgumentError: If there are no documents, or a token id is out of range.
        DtypeError: If documents are of no kind, or of several.
        IdError: If ids repeat, or are of no one kind.
        ShapeError: If ids are not one for each document, or a document has more than one dimension.

    O(tokens log tokens) time. 8 bytes for each distinct token of each document stay in memory;
    while it is built another 8, and 8 for each token.

    Examples:
        >>> from whence.text import TfIdf
        >>> index = TfIdf(["The cat sat.", "A dog barked.", "The dog sat!"])
        >>> index.search(["Which dog sat?"], k=2).helpful.ids
        array([[2, 0]])
    """

    method = (
        "TF-IDF of texts, a baseline without a model: what is most similar is taken for the most "
        "helpful"
    )
    unit = (
        "similarity, no loss: the sum of ln((N - df + 0.5) / (df + 0.5) + 1) over the query's "
        "tokens that the document holds"
    )

    def __init__(
        self, documents: Iterable[Any], ids: Any = None, *, threads: int | None = None
    ) -> None:
        super().__init__(documents, ids, None, threads)


class Bm25(_Lexical):
    """Okapi BM25 scores.

        score(Q, D) = sum over the tokens t of Q, with multiplicity, of
            IDF(t) · (k1 + 1) · tf / (tf + k1 · (1 − b + b · |D| / mean |D|))

    where D holds t tf times and has |D| tokens (Robertson and Zaragoza, "The Probabilistic
    Relevance Framework: BM25 and Beyond", Foundations and Trends in Information Retrieval 3(4),
    2009, section 3.4). IDF is that of `TfIdf`, which is never negative; theirs, without "+ 1", is
    for tokens that more than half of the documents hold. The factor k1 + 1 is the same for all
    documents, and some leave it out.

    Args:
        documents: As in `TfIdf`, with ids and threads.
        ids: See documents.
        k1: How late the weight of a count levels off: with 0 a count above 0 is as good as 1; at
            most 1000.
        b: How much long documents are held down: from 0, not at all, to 1.
        threads: See documents.

    Raises:
        WhenceError: As `TfIdf`, and if k1 or b is out of range.

    Time and memory as `TfIdf`, and 8 bytes a document.

    Examples:
        >>> from whence.text import Bm25
        >>> index = Bm25([[5, 7, 7], [5, 8], [9]], ids=["x", "y", "z"])
        >>> index.candidates([[7, 5]], k=10)
        [['x', 'y']]
    """

    unit = "similarity, no loss: the BM25 weights of the query's tokens, summed"

    def __init__(
        self,
        documents: Iterable[Any],
        ids: Any = None,
        k1: float = 1.5,
        b: float = 0.75,
        *,
        threads: int | None = None,
    ) -> None:
        self.k1 = _arrays.number("k1", k1)
        self.b = _arrays.number("b", b)
        self.method = (
            f"BM25 (k1 = {self.k1:g}, b = {self.b:g}) of texts, a baseline without a model: what "
            "is most similar is taken for the most helpful"
        )
        super().__init__(documents, ids, (self.k1, self.b), threads)
