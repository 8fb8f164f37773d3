"""Similarity of texts: against the formulas in plain Python and numpy, and a full sort."""

import math
import pickle
import unicodedata
from itertools import groupby

import numpy as np
import pytest
from filled import fill, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import whence
from whence import errors
from whence.text import Baseline, Bm25, Embedding, TfIdf, words

TEXTS = [
    "The cat sat on the mat.",
    "A dog barked at the cat; the cat ran.",
    "",
    "Dogs and cats: the dog sat!",
    "Nothing in common",
    "the the the",
]


def corpus(documents, seed=0, terms=200):
    """Token ids, low ones often, of documents of 0 to 30 tokens."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 31, documents)
    return [(terms * random.random(length) ** 3).astype(int).tolist() for length in lengths]


def tf_idf(documents, query):
    """[documents] TF-IDF, in five lines."""
    holders = {t: sum(t in document for document in documents) for t in query}
    n = len(documents)
    idf = {t: math.log((n - df + 0.5) / (df + 0.5) + 1) for t, df in holders.items()}
    return [sum(idf[t] for t in query if t in document) for document in documents]


def bm25(documents, query, k1, b):
    """[documents] BM25, in numpy."""
    tf = np.array([[document.count(t) for t in query] for document in documents], float)
    tf = tf.reshape(len(documents), len(query))
    lengths = np.array([len(document) for document in documents], float)
    df = (tf > 0).sum(0)
    idf = np.log((len(documents) - df + 0.5) / (df + 0.5) + 1)
    level = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
    with np.errstate(invalid="ignore"):
        weight = np.where(tf > 0, idf * (k1 + 1) * tf / (tf + level[:, None]), 0)
    return weight.sum(1)


# What a word is.


def by_characters(text):
    """The words of a text, one character at a time."""
    text = unicodedata.normalize("NFKC", text).lower()
    runs = groupby(text, key=lambda character: unicodedata.category(character)[0] in "LMN")
    return ["".join(run) for inside, run in runs if inside]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.text(st.characters(max_codepoint=127))))
def test_words_are_runs_of_letters_marks_and_numbers(text):
    assert words(text) == by_characters(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't PANIC: it's 4_2!", ["don", "t", "panic", "it", "s", "4", "2"]),
        ("ﬁne ２０２４", ["fine", "2024"]),
        ("nai\u0308ve CAFÉ", ["naïve", "café"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("a\ud800b\u2028c\x00d", ["a", "b", "c", "d"]),
        ("… !?", []),
    ],
)
def test_words_of_some_texts(text, expected):
    assert words(text) == expected


# Scores.


@pytest.mark.parametrize("documents", [1, 2, 50])
def test_tf_idf_is_that_of_a_loop(documents):
    held, queries = corpus(documents), corpus(7, seed=1)
    found = TfIdf(held).scores(queries)
    assert found.shape == (7, documents)
    assert found.dtype == np.float64
    assert np.allclose(found, [tf_idf(held, query) for query in queries], rtol=1e-12, atol=0)
    assert documents == 1 or (found > 0).any()


@pytest.mark.parametrize("k1", [0.1, 1.5, 20])
def test_tf_idf_is_equation_28_for_any_k1(k1):
    held, queries = corpus(30), corpus(5, seed=1)

    def equation(query, document):
        present = [float(t in document) for t in query]
        weights = tf_idf_of_tokens(held, query)
        return sum(w * (k1 + 1) * e / (k1 + e) for w, e in zip(weights, present, strict=True))

    expected = [[equation(query, document) for document in held] for query in queries]
    assert np.allclose(TfIdf(held).scores(queries), expected, rtol=1e-12, atol=0)


def tf_idf_of_tokens(documents, query):
    """[tokens] the IDF of each of the query's tokens."""
    holders = np.array([sum(t in document for document in documents) for t in query], float)
    return np.log((len(documents) - holders + 0.5) / (holders + 0.5) + 1)


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0, 0), (1.2, 1), (3, 0), (1000, 0.5)])
def test_bm25_is_the_formula(k1, b):
    held, queries = corpus(60), corpus(9, seed=1)
    found = Bm25(held, k1=k1, b=b).scores(queries)
    expected = [bm25(held, query, k1, b) for query in queries]
    assert np.allclose(found, expected, rtol=1e-12, atol=0)
    assert (found > 0).any()


@settings(max_examples=60, deadline=None)
@given(
    held=st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=30),
    queries=st.lists(st.lists(st.integers(0, 11), max_size=5), min_size=1, max_size=4),
    k=st.integers(1, 40),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_hits_are_those_of_a_full_sort(held, queries, k, threads, data):
    keep = data.draw(st.lists(st.booleans(), min_size=len(held), max_size=len(held)))
    keep[0] = True
    left = np.flatnonzero(keep)
    for index, of in (
        (TfIdf(held, threads=threads), tf_idf),
        (Bm25(held, threads=threads), lambda *both: bm25(*both, 1.5, 0.75)),
    ):
        scores = index.scores(queries, threads=threads)
        assert np.allclose(scores, [of(held, query) for query in queries], rtol=1e-12, atol=0)
        order = np.argsort(-scores.astype(np.float32)[:, left], axis=1, kind="stable")[:, :k]
        hits = index.search(queries, k, where=np.array(keep), threads=threads)
        assert hits.helpful.positions.tolist() == left[order].tolist()
        expected = np.take_along_axis(scores, left[order], 1).astype(np.float32)
        assert hits.helpful.scores.tolist() == expected.tolist()
        assert hits.eligible.tolist() == [len(left)] * len(queries)


@pytest.mark.parametrize("make", [TfIdf, Bm25])
def test_any_number_of_threads_gives_the_same_bits(make):
    held, queries = corpus(20_000, terms=3000), corpus(40, seed=1, terms=3000)
    one = make(held, threads=1)
    found = one.search(queries, 50, threads=1)
    for threads in (2, 3, 8):
        index = make(held, threads=threads)
        other = index.search(queries, 50, threads=threads)
        assert np.array_equal(found.helpful.positions, other.helpful.positions)
        assert np.array_equal(found.helpful.scores, other.helpful.scores)
        assert np.array_equal(
            one.scores(queries[:3], threads=1), index.scores(queries[:3], threads=threads)
        )
    scores = one.scores(queries).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :50]
    assert np.array_equal(found.helpful.positions, order)


def test_a_query_alone_scores_as_among_others():
    held, queries = corpus(500), corpus(20, seed=1)
    index = Bm25(held)
    together = index.scores(queries)
    alone = np.concatenate([index.scores([query]) for query in queries])
    assert np.array_equal(alone, together)


# What comes in.


@pytest.mark.parametrize("make", [TfIdf, Bm25])
def test_texts_words_and_numbers_are_one(make):
    queries = ["the CAT, the dog", "zebra sat"]
    texts = make(TEXTS).scores(queries)
    split = make([words(text) for text in TEXTS]).scores([words(query) for query in queries])
    assert np.array_equal(texts, split)
    # Numbers in the order of appearance, as large as they get.
    number = {word: 7 * i for i, word in enumerate(dict.fromkeys(words(" ".join(TEXTS))))}
    number["zebra"] = 2**32 - 1
    lists = [[number[word] for word in words(text)] for text in TEXTS]
    asked = [[number[word] for word in words(query)] for query in queries]
    assert np.array_equal(make(lists).scores(asked), texts)
    for kind in (np.uint8, np.int64, np.uint32):
        if kind == np.uint8:
            asked = [[token for token in query if token < 256] for query in asked]
        arrays = make(np.array(each, kind) for each in lists)
        assert np.array_equal(arrays.scores([np.array(query, kind) for query in asked]), texts)
    assert np.array_equal(make(map(tuple, lists)).scores(map(tuple, asked)), texts)


def test_a_matrix_and_tensors_of_token_ids_are_documents():
    torch = pytest.importorskip("torch")
    matrix = np.random.default_rng(0).integers(0, 50, (20, 16))
    expected = TfIdf(matrix.tolist()).scores(matrix[:3].tolist())
    assert np.array_equal(TfIdf(matrix).scores(matrix[:3]), expected)
    tensor = torch.from_numpy(matrix)
    assert np.array_equal(TfIdf(tensor).scores(list(tensor[:3])), expected)


@pytest.mark.parametrize("make", [TfIdf, Bm25])
def test_adding_is_the_same_as_building_at_once(make):
    once = make(TEXTS)
    steps = make(TEXTS[:2])
    steps.add(iter(TEXTS[2:3]))
    steps.add(TEXTS[3:], threads=2)
    queries = ["the cat and the dog", "nothing", ""]
    assert np.array_equal(steps.scores(queries), once.scores(queries))
    assert steps.ids.tolist() == once.ids.tolist() == list(range(6))
    assert steps.bytes == once.bytes
    hits = steps.search(["nothing"], 1)
    assert hits.helpful.ids.tolist() == [[4]]


def test_what_cannot_be_added_changes_nothing():
    index = Bm25(TEXTS[:2], ids=["a", "b"])
    before = index.scores(["cat dog"])
    for more, ids in (
        (["new"], None),
        (["new"], ["a"]),
        (["new"], [3]),
        (["new"], ["c", "d"]),
        (["new", [1, 2]], ["c", "d"]),
        ([], []),
    ):
        with pytest.raises(errors.ArgumentError):
            index.add(more, ids)
        assert len(index) == 2
        assert np.array_equal(index.scores(["cat dog"]), before)
    index.add(["new"], ["c"])
    assert index.search(["new"], 1).helpful.ids.tolist() == [["c"]]


@pytest.mark.parametrize("make", [TfIdf, Bm25])
def test_what_is_not_there_scores_nothing(make):
    index = make(TEXTS)
    assert not index.scores(["", "zebra xylophone", "!"]).any()
    assert index.scores(["zebra cat"]).tolist() == index.scores(["cat"]).tolist()
    hits = index.search(["", "zebra", "sat"], k=10)
    assert hits.helpful.positions[:2].tolist() == [list(range(6))] * 2
    assert not hits.helpful.scores[:2].any()
    assert sorted(hits.helpful.positions[2, :2].tolist()) == [0, 3]
    assert hits.helpful.positions[2, 2:].tolist() == [1, 2, 4, 5]
    assert index.candidates(["", "zebra", "nothing"]) == [[], [], [4]]
    assert not make(["", ""]).scores(["cat", ""]).any()
    assert not make([[], []]).scores([[1], []]).any()


# Filters.


def test_where_leaves_out_and_counts_as_before():
    index = Bm25(TEXTS, ids=list("abcdef"))
    every = index.search(["the cat"], 6).helpful
    some = index.search(["the cat"], 6, where=["f", "b", "c"])
    assert some.helpful.ids.tolist() == [[i for i in every.ids[0].tolist() if i in "bcf"]]
    assert set(some.helpful.scores[0].tolist()) <= set(every.scores[0].tolist())
    assert some.eligible.tolist() == [3]
    masked = index.search(["the cat"], 6, where=np.isin(list("abcdef"), ["f", "b", "c"]))
    assert masked.helpful.ids.tolist() == some.helpful.ids.tolist()
    assert index.candidates(["the cat"], where=["c", "e", "f"]) == [["f"]]


def test_candidates_are_the_first_hits_and_filter_a_search(tmp_path):
    held, queries = corpus(300), corpus(4, seed=1)
    ids = [f"id{i}" for i in range(300)]
    index = TfIdf(held, ids)
    lists = index.candidates(queries, k=25)
    for ranked, scores in zip(lists, index.scores(queries), strict=True):
        order = np.argsort(-scores.astype(np.float32), kind="stable")[:25]
        assert ranked == [ids[at] for at in order if scores[at] > 0]
    store = fill(tmp_path / "s", random_rows(300), ids=ids)
    hits = store.search(random_rows(1, seed=1), k=100, where=lists[0])
    assert sorted(hits.helpful.ids[0].tolist()) == sorted(lists[0])


def test_hits_say_what_they_are():
    hits = Bm25(TEXTS, k1=2, b=0.5).search(["cat", "dog"], 3)
    assert isinstance(hits, whence.Hits)
    assert hits.harmful.ids.shape == hits.harmful.scores.shape == (2, 0)
    assert list(hits.sides) == ["helpful"]
    assert hits.exact.all()
    printed = str(hits)
    assert "BM25 (k1 = 2, b = 0.5) of texts, a baseline without a model" in printed
    assert "similarity, no loss" in printed
    assert np.array_equal(pickle.loads(pickle.dumps(hits)).helpful.ids, hits.helpful.ids)
    assert "TF-IDF" in str(TfIdf(TEXTS).search(["cat"], 1))


# Embeddings.


def vectors(count, width=12, seed=0):
    """Vectors whose norms span many decades."""
    random = np.random.default_rng(seed)
    scale = 10.0 ** random.uniform(-36, 36, (count, 1))
    return (random.normal(size=(count, width)) * scale).astype(np.float32)


def cosines(queries, rows):
    queries, rows = (
        each.astype(np.longdouble) / np.linalg.norm(each.astype(np.longdouble), axis=1)[:, None]
        for each in (queries, rows)
    )
    return (queries @ rows.T).astype(np.float64)


@pytest.mark.parametrize("count", [1, 40, 5000])
def test_embeddings_are_ranked_by_cosine(count):
    rows, queries = vectors(count), vectors(6, seed=1)
    index = Embedding(rows)
    expected = cosines(queries, rows)
    scores = index.scores(queries)
    assert scores.dtype == np.float64
    assert np.allclose(scores, expected, atol=1e-6)
    hits = index.search(queries, k=20)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :20]
    assert np.array_equal(hits.helpful.positions, order)
    assert np.array_equal(hits.helpful.scores, np.take_along_axis(scores, order, 1))
    assert hits.harmful.ids.shape == (6, 0)
    assert hits.method == Embedding.method
    assert "cosine" in str(hits)
    for threads in (1, 3):
        other = Embedding(rows, threads=threads)
        assert np.array_equal(other.scores(queries, threads=threads), scores)


def test_embeddings_are_filtered_and_named():
    rows = vectors(30)
    ids = [f"id{i}" for i in range(30)]
    index = Embedding(rows, ids)
    order = np.argsort(-cosines(rows[:2], rows), axis=1, kind="stable")
    assert index.candidates(rows[:2], k=7) == [[ids[i] for i in row[:7]] for row in order]
    assert index.candidates(rows[:1], where=ids[20:25])[0] == [
        ids[i] for i in order[0] if 20 <= i < 25
    ]
    assert len(index) == 30
    assert index.ids.tolist() == ids


def test_all_baselines_are_asked_alike():
    for index, query in (
        (TfIdf(TEXTS), TEXTS[0]),
        (Embedding(np.eye(6, dtype="f4")), np.eye(6)[0]),
    ):
        assert isinstance(index, Baseline)
        query = [query] if isinstance(query, str) else query[None].astype(np.float32)
        hits = index.search(query, 2, where=[0, 1], threads=1)
        assert hits.helpful.ids[0, 0] == 0
        assert index.scores(query).shape == (1, 6)
        assert index.candidates(query, 1) == [[0]]


# Wrong inputs.


@pytest.mark.parametrize(
    ("documents", "error", "says"),
    [
        ([], errors.ArgumentError, "documents must have at least one"),
        ("a text", errors.DtypeError, "documents must be a list"),
        (b"bytes", errors.DtypeError, "documents must be a list"),
        ({"a": 1}, errors.DtypeError, "documents must be a list"),
        ({"a", "b"}, errors.DtypeError, "documents must be a list"),
        (5, errors.DtypeError, "documents must be a list"),
        (np.array(5), errors.ShapeError, "documents must be a list"),
        ([b"bytes"], errors.DtypeError, r"documents\[0\] must be a str"),
        (["a", None], errors.DtypeError, r"documents\[1\] must be a str"),
        ([1, 2], errors.DtypeError, r"documents\[0\] must be a str"),
        (["a", ["b"]], errors.DtypeError, r"documents\[1\] must be a str as .* a list of str"),
        ([["a"], [1]], errors.DtypeError, r"documents\[1\] must be a list of str tokens as"),
        ([[1], "a"], errors.DtypeError, r"documents\[1\] must be a list of token ids as"),
        ([[1, "a"]], errors.DtypeError, r"documents\[0\] .* got a list of int and str"),
        ([[True]], errors.DtypeError, r"documents\[0\] .* got a list of bool"),
        ([[1.0]], errors.DtypeError, r"documents\[0\] .* got a list of float"),
        ([np.array([1.5])], errors.DtypeError, r"documents\[0\] .* got a list of float"),
        ([np.array([True])], errors.DtypeError, r"documents\[0\] .* got a list of bool"),
        ([np.ones((2, 2), int)], errors.ShapeError, r"documents\[0\] must have one dimension"),
        ([[3], [-1]], errors.ArgumentError, r"documents\[1\] must hold token ids .* got -1"),
        ([[2**32]], errors.ArgumentError, r"must hold token ids .* got 4294967296"),
        ([[10**30]], errors.ArgumentError, "must hold token ids"),
        ([np.array([-1])], errors.ArgumentError, "must hold token ids .* got -1"),
        ([np.array([2**32])], errors.ArgumentError, "must hold token ids .* got 4294967296"),
    ],
)
def test_wrong_documents_are_named(documents, error, says):
    for make in (TfIdf, Bm25):
        with pytest.raises(error, match=says):
            make(documents)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"ids": [1]}, errors.ShapeError, "ids must be one for each of 6"),
        ({"ids": [1] * 6}, errors.IdError, "ids must be distinct"),
        ({"ids": [1, "a", 2, 3, 4, 5]}, errors.IdError, "ids must be all integers"),
        ({"k1": -1}, errors.ArgumentError, "k1 must be from 0 to 1000, got -1"),
        ({"k1": 1001}, errors.ArgumentError, "k1 must be from 0 to 1000, got 1001"),
        ({"k1": math.nan}, errors.ArgumentError, "k1 must be"),
        ({"k1": "1"}, errors.DtypeError, "k1 must be a number"),
        ({"b": 1.5}, errors.ArgumentError, "b must be from 0 to 1, got 1.5"),
        ({"b": math.inf}, errors.ArgumentError, "b must be"),
        ({"threads": 0}, errors.ArgumentError, "threads must be at least 1"),
    ],
)
def test_wrong_settings_are_named(arguments, error, says):
    with pytest.raises(error, match=says):
        Bm25(TEXTS, **arguments)


@pytest.mark.parametrize(
    ("queries", "arguments", "error", "says"),
    [
        ("cat", {}, errors.DtypeError, "queries must be a list"),
        ([], {}, errors.ArgumentError, "queries must have at least one"),
        ([["cat"]], {}, errors.DtypeError, r"queries\[0\] must be a str as"),
        (["cat", [3]], {}, errors.DtypeError, r"queries\[1\] must be a str as"),
        (["cat"], {"k": 0}, errors.ArgumentError, "k must be at least 1"),
        (["cat"], {"k": 1.0}, errors.DtypeError, "k must be an integer"),
        (["cat"], {"threads": 0}, errors.ArgumentError, "threads must be at least 1"),
        (["cat"], {"where": []}, errors.ArgumentError, "where must leave a document"),
        (["cat"], {"where": [9]}, errors.IdError, "where must be in the store, got 9"),
        (["cat"], {"where": ["a"]}, errors.IdError, "where must be int64"),
        (["cat"], {"where": [True]}, errors.DtypeError, "where must be"),
        (["cat"], {"where": {"label": 1}}, errors.ArgumentError, "where must name columns"),
    ],
)
def test_wrong_questions_are_named(queries, arguments, error, says):
    with pytest.raises(error, match=says):
        TfIdf(TEXTS).search(queries, **arguments)


def test_wrong_vectors_are_named():
    ones = np.ones((3, 2), np.float32)
    zero = ones * [[1], [0], [1]]
    for wrong, error, says in (
        (ones.astype("f8"), errors.DtypeError, "must be a float32 array"),
        (ones * np.float32("nan"), errors.NotFiniteError, "must be finite"),
        (zero.astype("f4"), errors.ArgumentError, "must have norms above 0, got zeros in row 1"),
        (ones[:0], errors.ShapeError, "at least one"),
        (ones[0], errors.ShapeError, "must be"),
    ):
        with pytest.raises(error, match=f"vectors.*{says}"):
            Embedding(wrong)
        with pytest.raises(error, match=f"queries.*{says}"):
            Embedding(ones).search(wrong)
    with pytest.raises(errors.ShapeError, match=r"queries must be \[rows, 2\]"):
        Embedding(ones).scores(np.ones((1, 3), np.float32))
    with pytest.raises(errors.ShapeError, match="ids must be one for each of 3"):
        Embedding(ones, ids=[1, 2])
    with pytest.raises(errors.IdError, match="where must be in the store"):
        Embedding(ones).search(ones, where=[7])
