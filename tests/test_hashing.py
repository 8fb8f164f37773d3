"""Codes and the index: against their laws, plain Python and a full sort."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whence import _core, errors
from whence.hashing import HashIndex, PStableHash, SignHash

MASK = 2**64 - 1


def normal(rows, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def bits_of(codes, hashes):
    """[rows, hashes] bools of packed sign codes."""
    return np.unpackbits(codes.view(np.uint8), axis=1, bitorder="little")[:, :hashes] == 1


def test_bits_are_packed_from_the_lowest_up():
    codes = SignHash(70, seed=1).codes(normal(20, 3))
    one_by_one = [[int(row[h // 64]) >> (h % 64) & 1 for h in range(70)] for row in codes]
    assert (bits_of(codes, 70) == np.array(one_by_one)).all()
    assert (SignHash(70, seed=1).project(normal(20, 3)) >= 0).tolist() == bits_of(
        codes, 70
    ).tolist()


# Laws. Each of 100,000 pairs is hashed by one function of its own; 3 sigma of a binomial.


def agreements(family, left, right, of):
    """[pairs] whether each pair agrees: pair i on hash i mod 100 of function i // 100."""
    same = []
    for seed in range(len(left) // 100):
        hashed = family(seed)
        here = slice(100 * seed, 100 * seed + 100)
        one, other = (of(hashed.codes(rows[here])) for rows in (left, right))
        same.append(np.diagonal(one == other, axis1=-2, axis2=-1))
    return np.concatenate(same, axis=-1)


def at_angle(rows, dim, angle, seed=0):
    """Pairs of random directions at an angle."""
    left, other = normal(rows, dim, seed), normal(rows, dim, seed + 1)
    left /= np.linalg.norm(left, axis=1, keepdims=True)
    other -= (other * left).sum(1, keepdims=True) * left
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    return left, (math.cos(angle) * left + math.sin(angle) * other).astype(np.float32)


@pytest.mark.parametrize("angle", [0.3, 1.0, 2.0])
def test_signs_agree_by_the_law_of_the_angle(angle):
    left, right = at_angle(100_000, 20, angle)

    def family(seed):
        return SignHash(100, seed=seed, threads=1)

    same = agreements(family, left, right, lambda codes: bits_of(codes, 100))
    assert same.shape == (100_000,)
    law = 1 - angle / math.pi
    assert abs(same.mean() - law) < 3 * math.sqrt(law * (1 - law) / same.size)
    assert SignHash().collision_probability(angle) == pytest.approx(law)


@pytest.mark.parametrize("pair", [([0], [1]), ([0, 3], [1, 7])])
def test_signs_of_rows_with_few_nonzeros_agree_by_the_law(pair):
    left, right = np.zeros((2, 16), np.float32)
    left[pair[0]] = 1
    right[pair[1]] = 1
    law = 0.5
    rows = np.stack([left, right])
    bits = [bits_of(SignHash(100, seed=seed, threads=1).codes(rows), 100) for seed in range(1000)]
    same = np.concatenate([one == other for one, other in bits])
    assert abs(same.mean() - law) < 3 * math.sqrt(law * (1 - law) / same.size)


@pytest.mark.parametrize("distance", [0.5, 1.0, 4.0])
def test_cells_are_shared_by_the_law_of_the_distance_at_every_level(distance):
    left, direction = at_angle(100_000, 6, math.pi / 2)
    right = (left + distance * direction).astype(np.float32)

    def family(seed):
        return PStableHash(100, width=0.7, levels=4, seed=seed, threads=1)

    same = agreements(family, left, right, lambda codes: np.stack([codes >> i for i in range(4)]))
    assert same.shape == (4, 100_000)
    for level in range(4):
        # The integral of the density of the projected distance times the room a cell leaves.
        width = 0.7 * 2**level
        at = (np.arange(200_000) + 0.5) / 200_000 * width
        density = 2 / (distance * math.sqrt(2 * math.pi)) * np.exp(-(at**2) / (2 * distance**2))
        law = float((density * (1 - at / width)).mean() * width)
        assert abs(same[level].mean() - law) < 3 * math.sqrt(law * (1 - law) / 100_000)
        assert family(0).collision_probability(distance, level) == pytest.approx(law, abs=1e-6)


def test_probabilities_at_the_ends():
    assert PStableHash().collision_probability(0) == 1
    assert PStableHash().collision_probability(1e12) == pytest.approx(0, abs=1e-9)
    assert SignHash().collision_probability(0) == 1
    assert SignHash().collision_probability(math.pi) == 0


# Codes.


def test_a_shift_is_the_code_of_the_wider_cell_for_negative_ones_too():
    family = PStableHash(40, width=0.3, levels=4, seed=2)
    rows = normal(500, 12)
    codes, positions = family.codes(rows), family.project(rows).astype(np.float64)
    assert (codes < 0).mean() > 0.2
    for level in range(4):
        assert ((codes >> level) == np.floor(positions / 2**level)).all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 20),
    hashes=st.integers(1, 150),
    levels=st.integers(1, 4),
    seed=st.integers(0, MASK),
)
def test_similarity_is_that_of_a_loop(rows, hashes, levels, seed):
    values = normal(rows, 3, seed % 1000)
    pairs = [(a, b) for a in range(rows) for b in range(rows)]
    cells = PStableHash(hashes, width=1.5, levels=levels, seed=seed)
    signs = SignHash(hashes, seed=seed)
    bits = bits_of(signs.codes(values), hashes)
    expected = [len({h for h in range(hashes) if bits[a, h] == bits[b, h]}) for a, b in pairs]
    found = signs.similarity(signs.codes(values), pairs)
    assert found == pytest.approx([count / hashes for count in expected])
    for level in range(levels):
        codes = cells.codes(values).tolist()
        sets = [{(h, cell // 2**level) for h, cell in enumerate(row)} for row in codes]
        found = cells.similarity(cells.codes(values), pairs, level)
        assert found == pytest.approx([len(sets[a] & sets[b]) / hashes for a, b in pairs])


@pytest.mark.parametrize("family", [SignHash(300, seed=5), PStableHash(7, width=0.5, seed=5)])
def test_a_row_has_one_code_whatever_comes_with_it(family):
    rows = normal(37, 300)
    codes = family.codes(rows)
    assert len(np.unique(codes, axis=0)) == 37
    for row in (0, 15, 16, 36):
        assert (family.codes(rows[row : row + 1]) == codes[row]).all()
    assert (family.codes(rows[:, ::-1].copy()[:, ::-1]) == codes).all()
    assert (type(family)(family.hashes, seed=6).codes(rows) != codes).any()
    assert (type(family)(family.hashes, seed=5, view=1).codes(rows) != codes).any()


def test_hashes_of_one_rotation_are_orthogonal():
    directions = SignHash(256, seed=1).project(np.eye(256, dtype=np.float32)).astype(np.float64)
    assert np.allclose(directions.T @ directions, 256 * np.eye(256), atol=1e-2)


def test_rows_of_zeros_have_the_code_of_all_bits():
    codes = SignHash(70).codes(np.zeros((2, 5), np.float32))
    assert codes.tolist() == [[2**64 - 1, 2**6 - 1]] * 2


# The index.


def exact(rows, queries, family):
    rows, queries = rows.astype(np.float64), queries.astype(np.float64)
    if isinstance(family, SignHash):
        return queries @ rows.T
    return -np.sqrt(((queries[:, None] - rows) ** 2).sum(-1))


FAMILIES = [SignHash(96, seed=1), PStableHash(24, width=2.0, seed=1)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("end", ["largest", "smallest"])
@pytest.mark.parametrize("dim", [1, 16, 77])
def test_all_rows_as_candidates_give_a_full_sort(family, end, dim):
    rows, queries = normal(300, dim), normal(5, dim, 1)
    rows[100:110] = rows[0]
    found = HashIndex(rows, family).search(queries, k=20, candidates=10**9, end=end)
    scores = exact(rows, queries, family)
    order = np.argsort(scores if end == "smallest" else -scores, axis=1, kind="stable")[:, :20]
    assert np.allclose(found.scores, np.take_along_axis(scores, order, 1), atol=1e-4)
    assert np.allclose(found.scores, np.take_along_axis(scores, found.positions, 1), atol=1e-4)
    assert found.rescored.tolist() == [300] * 5


@pytest.mark.parametrize("family", FAMILIES)
def test_of_equal_rows_the_earlier_come_first(family):
    rows = np.repeat(normal(3, 8), 5, axis=0)
    found = HashIndex(rows, family).search(rows[5:6], k=15, candidates=15)
    for start in (0, 5, 10):
        assert np.diff(found.positions[0, start : start + 5]).tolist() == [1] * 4
    if isinstance(family, PStableHash):
        assert found.positions[0, :5].tolist() == [5, 6, 7, 8, 9]
        assert found.scores[0, :5].tolist() == [0.0] * 5


def test_candidates_are_ranked_by_the_projections_of_the_query_with_the_signs_of_rows():
    rows, queries = normal(400, 32), normal(6, 32, 1)
    family = SignHash(128, seed=3)
    signs = np.where(bits_of(family.codes(rows), 128), 1.0, -1.0)
    estimates = family.project(queries).astype(np.float64) @ signs.T
    found = HashIndex(rows, family).search(queries, k=30, candidates=30)
    for positions, estimate in zip(found.positions, estimates, strict=True):
        assert set(positions) == set(np.argsort(-estimate)[:30])


def clustered(rows, dim, seed=0):
    """Unit rows around centres, as those of a sketch of gradients are."""
    centres = normal(40, dim, seed)
    values = centres[np.arange(rows) % 40] + 0.7 * normal(rows, dim, seed + 1)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_recall_is_above_that_of_hamming_distance_at_equal_candidates():
    rows, queries = clustered(4000, 128), clustered(200, 128, 7)
    truth = np.argsort(-exact(rows, queries, SignHash()), axis=1)[:, :10]
    family = SignHash(128)
    index = HashIndex(rows, family)
    bits, asked = bits_of(family.codes(rows), 128), bits_of(family.codes(queries), 128)
    hamming = np.argsort((asked[:, None] != bits).sum(-1), axis=1, kind="stable")

    def recall(positions):
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(positions, truth, strict=True)])

    for candidates in (20, 50, 100, 200):
        ours = recall(index.search(queries, 10, candidates=candidates).positions)
        assert ours > recall(hamming[:, :candidates]) + 0.01


def test_probing_one_bucket_a_table_rescores_the_rows_that_share_a_key():
    rows, queries = clustered(1000, 24), clustered(8, 24, 3)
    family = SignHash(24, seed=2)
    index = HashIndex(rows, family, band=6)
    assert index.tables == 4
    found = index.search(queries, 1, candidates=1000, probes=4)
    bits, asked = bits_of(family.codes(rows), 24), bits_of(family.codes(queries), 24)
    same = (bits.reshape(1000, 4, 6) == asked.reshape(8, 1, 4, 6)).all(-1).any(-1)
    assert same.sum(1).min() > 0
    assert same.sum(1).max() < 1000
    assert found.rescored.tolist() == same.sum(1).tolist()


@pytest.mark.parametrize(
    ("family", "band"), [(SignHash(64, seed=1), 8), (PStableHash(16, width=1.2, seed=1), 4)]
)
def test_more_probes_find_more(family, band):
    rows, queries = clustered(3000, 32), clustered(50, 32, 5)
    index = HashIndex(rows, family, band=band)
    truth = np.argsort(-exact(rows, queries, family), axis=1)[:, :1]
    sizes, recalls = [], []
    for probes in (8, 60, 400):
        found = index.search(queries, 1, candidates=3000, probes=probes)
        sizes.append(found.rescored.mean())
        recalls.append((found.positions == truth).mean())
    assert sizes[0] < sizes[1] < sizes[2] < 3000
    assert recalls[0] <= recalls[1] <= recalls[2]
    assert recalls[2] > 0.9


def test_buckets_that_hold_too_few_rows_are_passed_by():
    rows = normal(50, 8)
    found = HashIndex(rows, SignHash(64), band=64).search(
        normal(3, 8, 9), 40, candidates=45, probes=1
    )
    assert found.positions.shape == (3, 40)
    assert found.rescored.tolist() == [45] * 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("probes", [None, 20])
def test_threads_change_nothing(family, probes):
    rows, queries = normal(200, 33), normal(40, 33, 1)
    one, many = (HashIndex(rows, family, band=4, threads=threads) for threads in (1, 3))
    assert (one.codes == many.codes).all()
    assert (one.codes == family.codes(rows)).all()
    found = [index.search(queries, 5, candidates=30, probes=probes) for index in (one, many)]
    for name in ("positions", "scores", "rescored"):
        assert (getattr(found[0], name) == getattr(found[1], name)).all()


def test_one_row_and_any_k():
    index = HashIndex(np.ones((1, 3), np.float32), SignHash(5), band=2)
    for probes in (None, 3):
        found = index.search(np.ones((2, 3), np.float32), 2**62, candidates=2**62, probes=probes)
        assert found.positions.tolist() == [[0], [0]]
        assert found.scores.tolist() == [[3.0], [3.0]]


ROWS = normal(6, 4)
HUGE = np.float32(3e38)
INDEX = HashIndex(ROWS, SignHash(8), band=4)
CELLS = HashIndex(ROWS, PStableHash(8), band=4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: SignHash(0), errors.ArgumentError, "hashes must be from 1 to 4096, got 0"),
        (lambda: SignHash(2.0), errors.DtypeError, "hashes must be an integer"),
        (lambda: SignHash(seed=-1), errors.ArgumentError, "seed"),
        (lambda: SignHash(view=2**64), errors.ArgumentError, "view"),
        (lambda: SignHash(threads=0), errors.ArgumentError, "threads"),
        (lambda: PStableHash(width=0), errors.ArgumentError, "width must be a positive"),
        (lambda: PStableHash(width=math.nan), errors.ArgumentError, "width"),
        (lambda: PStableHash(levels=17), errors.ArgumentError, "levels must be from 1 to 16"),
        (lambda: SignHash().codes(ROWS.astype("f8")), errors.DtypeError, "rows must be a float32"),
        (lambda: SignHash().codes(ROWS[0]), errors.ShapeError, r"rows must be \[rows"),
        (lambda: SignHash().codes(ROWS[:0]), errors.ShapeError, "at least one of each"),
        (lambda: SignHash().codes(ROWS[:, :0]), errors.ShapeError, r"got \[6, 0\]"),
        (lambda: SignHash().codes(ROWS * np.nan), errors.NotFiniteError, "rows must be finite"),
        (lambda: SignHash().codes(np.full((6, 4), HUGE)), errors.NotFiniteError, "projections"),
        (lambda: PStableHash(width=1e-20).codes(ROWS), errors.ArgumentError, "width must be so"),
        (lambda: SignHash().similarity(ROWS, [[0, 1]]), errors.DtypeError, "codes must be a uint"),
        (
            lambda: SignHash(65).similarity(SignHash().codes(ROWS), [[0, 1]]),
            errors.ShapeError,
            r"codes must be \[rows, 2\], got \[6, 4\]",
        ),
        (
            lambda: SignHash().similarity(SignHash().codes(ROWS), [[0, 6]]),
            errors.ArgumentError,
            "from 0 to 5, got 6",
        ),
        (
            lambda: PStableHash().similarity(PStableHash().codes(ROWS), [[0, 1]], 1),
            errors.ArgumentError,
            "level must be from 0 to 0",
        ),
        (lambda: SignHash().collision_probability(4), errors.ArgumentError, "angle"),
        (lambda: PStableHash().collision_probability(-1), errors.ArgumentError, "distance"),
        (lambda: HashIndex(ROWS, "sign"), errors.DtypeError, "family must be a SignHash"),
        (lambda: HashIndex(ROWS, SignHash(8), band=9), errors.ArgumentError, "band must be from"),
        (lambda: HashIndex(ROWS, PStableHash(64), band=33), errors.ArgumentError, "1 to 32"),
        (lambda: INDEX.search(ROWS, 0), errors.ArgumentError, "k must be at least 1"),
        (lambda: INDEX.search(ROWS, 3, candidates=2), errors.ArgumentError, "at least k = 3"),
        (lambda: INDEX.search(ROWS, probes=0), errors.ArgumentError, "probes must be from 1"),
        (lambda: INDEX.search(ROWS, probes=2**20), errors.ArgumentError, "probes must be from 1"),
        (lambda: INDEX.search(ROWS, end="both"), errors.ArgumentError, "end must be one of"),
        (lambda: INDEX.search(ROWS[:, :2]), errors.ShapeError, r"\[rows, 4\], got \[6, 2\]"),
        (lambda: INDEX.search(ROWS[:0]), errors.ShapeError, "at least one row"),
        (lambda: INDEX.search(ROWS * np.nan), errors.NotFiniteError, "queries must be finite"),
        (lambda: HashIndex(ROWS).search(ROWS, probes=1), errors.ArgumentError, "without band"),
        (
            lambda: CELLS.search(ROWS, probes=1, end="smallest"),
            errors.ArgumentError,
            "probes must be none for the smallest",
        ),
    ],
)
def test_wrong_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


ORDINARY = (errors.WhenceError, TypeError, ValueError, OverflowError)
BIG = 2**62
HASH = _core.Hash("sign", 4, 8, 0)
PAIR = np.array([[0, 1]], np.uint64)


@pytest.mark.parametrize(
    "call",
    [
        lambda: _core.Hash("other", 4, 8, 0),
        lambda: _core.Hash("sign", BIG, 8, 0),
        lambda: _core.Hash("sign", 4, BIG, 0),
        lambda: _core.Hash("p_stable", 2**20, 4096, 0),
        lambda: _core.Hash("p_stable", 4, 4, 0, 0, math.inf),
        lambda: _core.Hash("p_stable", 4, 4, 0, 0, 1.0, BIG),
        lambda: HASH.codes(ROWS[:, :3].copy(), 1),
        lambda: HASH.codes(np.asfortranarray(ROWS), 1),
        lambda: _core.HashIndex(HASH, ROWS, 4, 1).search(
            ROWS, np.asfortranarray(ROWS), 1, 1, None, False, 1
        ),
        lambda: _core.HashIndex(HASH, ROWS, 0, 1),
        lambda: _core.HashIndex(HASH, ROWS, BIG, 1),
        lambda: _core.HashIndex(HASH, ROWS, 4, 1).search(ROWS[:2], ROWS, 1, 1, None, False, 1),
        lambda: _core.HashIndex(HASH, ROWS, 4, 1).search(ROWS, ROWS, 1, 1, BIG, False, 1),
        lambda: _core.HashIndex(HASH, ROWS, None, 1).search(ROWS, ROWS, 1, 1, 1, False, 1),
        lambda: _core.code_similarities(HASH.codes(ROWS, 1), 8, 0, PAIR + np.uint64(BIG)),
        lambda: _core.code_similarities(HASH.codes(ROWS, 1), BIG, 0, PAIR),
        lambda: _core.code_similarities(HASH.codes(ROWS, 1), 8, BIG, PAIR),
        lambda: _core.code_similarities(ROWS, 8, 0, PAIR),
        lambda: _core.code_similarities(HASH.codes(ROWS, 1), 8, 0, PAIR[:, :1]),
        lambda: _core.graph_by_codes([], 1, 1, 1, 1, 0, 1),
        lambda: _core.graph_by_codes([np.zeros((3, 2), np.int32)], 1, BIG, 1, 1, 0, 1),
        lambda: _core.graph_by_codes([np.zeros((3, 2), np.int32)], BIG, 1, 1, 1, 0, 1),
        lambda: _core.graph_by_codes([np.zeros((3, 2), np.int32)], 1, 1, BIG, 1, 0, 1),
        lambda: _core.graph_by_codes([np.zeros((3, 0), np.int32)], 1, 1, 1, 1, 0, 1),
        lambda: _core.graph_within_batches(ROWS, [[0, 1]], 1, 1.0, 1),
        lambda: _core.graph_within_batches(ROWS, [[0] * 6], 1, 1.0, 1),
        lambda: _core.graph_within_batches(ROWS, [list(range(6))], 1, math.nan, 1),
        lambda: _core.duplicate_groups(HASH, ROWS, BIG, 0.5, 1, 0, 1),
        lambda: _core.duplicate_groups(HASH, ROWS, 4, math.nan, 1, 0, 1),
        lambda: _core.duplicate_groups(HASH, ROWS, 4, 0.5, BIG, 0, 1),
        lambda: _core.shuffled(np.arange(4).astype(np.float64), 0, "x"),
    ],
)
def test_the_compiled_module_checks_again(call):
    with pytest.raises(ORDINARY):
        call()


def test_k_of_any_size_allocates_nothing():
    index = _core.HashIndex(HASH, ROWS, 4, 1)
    assert index.search(ROWS, ROWS, BIG, BIG, 3, False, BIG)[0].shape == (6, 6)
    graph = _core.graph_by_codes([np.zeros((3, 2), np.int32)], 1, 1, 9, BIG, 0, BIG)
    assert len(graph[1]) == 6
    (_, found, _), _ = _core.graph_within_batches(ROWS, [list(range(6))], BIG, math.inf, BIG)
    assert len(found) == 30


# The randomness that docs/randomness.md defines.


def mix(z):
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def value(key, counter):
    return mix((key + (counter + 1) * 0x9E3779B97F4A7C15) & MASK)


def key_of(seed, name, shape):
    name = name.encode()
    words = [seed, *(int.from_bytes(name[i : i + 8], "little") for i in range(0, len(name), 8))]
    state = 0
    for word in [*words, len(name), *shape, len(shape)]:
        state = mix(((state ^ word) + 0x9E3779B97F4A7C15) & MASK)
    return state


def test_sign_projections_are_those_of_the_page():
    row, seed, view, length = normal(1, 7), 11, 3, 256
    key = key_of(seed, "hash.sign", [7, view])
    values = np.zeros(length)
    values[:7] = row
    hadamard = np.array([[1.0]])
    while len(hadamard) < length:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    expected = []
    for rotation in range(2):
        turned = values
        for step in range(3):
            at = [(3 * rotation + step) * length + i for i in range(length)]
            signs = [-1 if value(key, i // 64) >> (i % 64) & 1 else 1 for i in at]
            turned = hadamard @ (turned * signs)
        expected.extend(turned / length)
    found = SignHash(300, seed=seed, view=view).project(row)[0]
    assert np.allclose(found, expected[:300], atol=1e-4)


def test_p_stable_projections_are_those_of_the_page():
    from statistics import NormalDist

    row, seed, view = normal(1, 5), 11, 3
    key = key_of(seed, "hash.p_stable", [5, view])
    family = PStableHash(9, width=0.5, levels=3, seed=seed, view=view)
    for h, found in enumerate(family.project(row)[0]):
        normals = [
            NormalDist().inv_cdf(((value(key, h * 5 + c) >> 32) + 0.5) / 2**32) for c in range(5)
        ]
        offset = (value(key, 2**63 + h) >> 11) / 2**53 * 0.5 * 4
        assert found == pytest.approx((np.dot(normals, row[0]) + offset) / 0.5, abs=1e-4)


def test_shuffles_are_those_of_the_page():
    key = key_of(5, "hash.batches", [])
    expected = list(range(30))
    for step in range(30):
        other = step + (value(key, step) * (30 - step) >> 64)
        expected[step], expected[other] = expected[other], expected[step]
    assert _core.shuffled(np.arange(30), 5, "hash.batches").tolist() == expected
