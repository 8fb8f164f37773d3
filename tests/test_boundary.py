"""Hostile arguments at the compiled module: a named error each, never a panic or a crash."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from filled import fill, random_rows

from whence import _core
from whence.errors import StoreError, WhenceError

ORDINARY = (WhenceError, TypeError, ValueError, OverflowError)
"""What a caller can catch; a panic is none of these."""

BIG = 2**62


def totals(batch=2, dim=32):
    return np.zeros((batch, dim))


def f4(*shape):
    return np.ones(shape, np.float32)


SKETCH = _core.Sketch("chunked_sjlt", 32, 0)

FLAT = [
    ("w", [10], 0, f4(2, 11), totals(), 1),
    ("w", [10], 1, f4(2, 10), totals(), 1),
    ("w", [10], 2**64 - 1, f4(2, 10), totals(), 1),
    ("w", [10], -1, f4(2, 10), totals(), 1),
    ("w", [10], 0, f4(3, 10), totals(), 1),
    ("w", [BIG, BIG], 0, f4(2, 10), totals(), 1),
    ("w", [-1], 0, f4(2, 10), totals(), 1),
    ("w", [10], 0, f4(2, 10).astype("f8"), totals(), 1),
    ("w", [10], 0, f4(20), totals(), 1),
    ("w", [10], 0, f4(2, 20)[:, ::2], totals(), 1),
    ("w", [10], 0, f4(2, 10), totals(2, 31), 1),
    ("w", [10], 0, f4(2, 10), totals(2, 64)[:, ::2], 1),
    ("w", [10], 0, f4(2, 10), totals().astype("f4"), 1),
    ("w", [10], 0, None, totals(), 1),
    (None, [10], 0, f4(2, 10), totals(), 1),
    ("w", [10], 0, f4(2, 10), totals(), -1),
    ("w", [10], 0, f4(2, 10), totals(), 1, 1),
    ("w", [10], 0, f4(2, 10), totals(), 1, 2**64 - 8),
    ("w", [10], 0, f4(2, 10), totals(), 1, -1),
]


@pytest.mark.parametrize("arguments", FLAT)
def test_add_flat_refuses(arguments):
    with pytest.raises(ORDINARY):
        SKETCH.add_flat(*arguments)


def test_add_flat_refuses_a_totals_array_it_cannot_write():
    fixed = totals()
    fixed.flags.writeable = False
    with pytest.raises((*ORDINARY, RuntimeError)):
        SKETCH.add_flat("w", [10], 0, f4(2, 10), fixed, 1)


OUTER = [
    ("w", [5, 6], 0, f4(2, 3, 5), f4(2, 4, 6), totals(), 1),
    ("w", [5, 6], 0, f4(2, 3, 5), f4(3, 3, 6), totals(), 1),
    ("w", [5, 5], 0, f4(2, 3, 5), f4(2, 3, 6), totals(), 1),
    ("w", [5, 6], 1, f4(2, 3, 5), f4(2, 3, 6), totals(), 1),
    ("w", [5, 6], 2**64 - 1, f4(2, 3, 5), f4(2, 3, 6), totals(), 1),
    ("w", [5, 6], 0, f4(2, 3, 5), f4(2, 3, 6), totals(1), 1),
    ("w", [5, 6], 0, f4(2, 15), f4(2, 3, 6), totals(), 1),
    ("w", [5, 6], 0, f4(2, 3, 5), f4(2, 3, 6), totals(), 1, 1),
    ("w", [5, 6], 0, f4(2, 3, 5), f4(2, 3, 6), totals(), 1, 0, f4(5, 5)),
    ("w", [5, 6], 0, f4(2, 3, 5), f4(2, 3, 6), totals(), 1, 0, f4(5, 12)[:, ::2]),
]


@pytest.mark.parametrize("arguments", OUTER)
def test_add_outer_refuses(arguments):
    with pytest.raises(ORDINARY):
        SKETCH.add_outer(*arguments)


@pytest.mark.parametrize("view", [lambda a: a[::-1], lambda a: a[:, ::-1], lambda a: a[..., ::2]])
def test_add_outer_takes_any_strides(view):
    left, right = np.random.default_rng(0).normal(size=(2, 3, 4, 10)).astype(np.float32)
    found, expected = totals(3), totals(3)
    shape = [view(left).shape[2], view(right).shape[2]]
    SKETCH.add_outer("w", shape, 0, view(left), view(right), found, 1)
    SKETCH.add_outer("w", shape, 0, view(left).copy(), view(right).copy(), expected, 1)
    assert np.array_equal(found, expected)
    one = np.broadcast_to(left[:1], left.shape)
    SKETCH.add_outer("w", [10, 10], 0, one, right, totals(3), 1)


def i8(*values):
    return np.array(values, np.int64).reshape(2, -1)


LOOKUP = [
    ("w", [5, 6], i8(0, 5), f4(2, 1, 6), None, totals(), 1),
    ("w", [5, 6], i8(0, -1), f4(2, 1, 6), None, totals(), 1),
    ("w", [5, 6], i8(0, 2**62), f4(2, 1, 6), None, totals(), 1),
    ("w", [5, 6], i8(0, 1), f4(2, 1, 7), None, totals(1), 1),
    ("w", [0, 6], i8(0, 0), f4(2, 1, 6), None, totals(), 1),
    ("w", [5, 6], i8(0, 1, 2, 3), f4(2, 4, 3), None, totals(), 1),
    ("w", [5, 6], i8(0, 1, 2, 3), f4(2, 1, 6), None, totals(), 1),
    ("w", [5, 6], i8(0, 1).astype("i4"), f4(2, 1, 6), None, totals(), 1),
]


@pytest.mark.parametrize("arguments", LOOKUP)
def test_add_lookup_refuses(arguments):
    with pytest.raises(ORDINARY):
        SKETCH.add_lookup(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [("jl", 8, 0), ("sjlt", 8, 0, 3), ("sjlt", 9, 0, 2), ("sjlt", 8, 0, 0), (None, 8, 0)],
)
def test_a_sketch_of_no_possible_kind_is_refused(arguments):
    with pytest.raises(ORDINARY):
        _core.Sketch(*arguments)


@pytest.mark.parametrize("dim", [0, -1, BIG, 2**70, 1.5, None])
def test_a_sketch_of_no_possible_width_is_refused(dim):
    with pytest.raises(ORDINARY):
        _core.Sketch("chunked_sjlt", dim, 0)


@pytest.mark.parametrize(
    "rows",
    [f4(2, 0), np.full((2, 3), np.inf, "f4"), f4(2, 3).astype("f8"), f4(6), f4(4, 4)[:, ::2]],
)
@pytest.mark.parametrize("kind", ["f2", "f4"])
def test_encode_refuses(rows, kind):
    with pytest.raises(ORDINARY):
        _core.encode(rows, np.empty(rows.shape, kind))


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "stored",
    [f4(2, 4), f4(3, 3), f4(6), f4(2, 6)[:, ::2], f4(2, 3).astype("f8"), read_only(f4(2, 3)), None],
)
def test_encode_refuses_a_place_that_does_not_fit(stored):
    with pytest.raises((*ORDINARY, TypeError)):
        _core.encode(np.ones((2, 3), np.float32), stored)


def test_encode_leaves_nothing_of_what_was_there():
    rows, stored = np.zeros((2, 3), np.float32), np.full((2, 3), 7, np.float16)
    rows[1] = [0, 3, 4]
    assert _core.encode(rows, stored).tolist() == [0, 5]
    assert np.allclose(stored, [[0, 0, 0], [0, 0.6, 0.8]], atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "bits"),
    [
        (f4(2, 0), 4),
        (np.full((2, 3), np.nan, "f4"), 4),
        (np.full((2, 3), 3e38, "f4"), 8),
        (f4(2, 3).astype("f8"), 4),
        (f4(6), 4),
        (f4(4, 4)[:, ::2], 4),
        *((f4(2, 3), bits) for bits in (0, 3, 16, -1, BIG, 2**64, None)),
    ],
)
def test_quantise_refuses(rows, bits):
    with pytest.raises(ORDINARY):
        _core.quantise(rows, bits)


@pytest.fixture(scope="module")
def core_rows(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("m") / "s", random_rows(10)).core


def u8(*values):
    return np.array(values, np.uint64)


ENDS = [
    (u8(0, 1)[None], f4(1, 1, 15), 1, [], 1),
    (u8(0, 1)[None], f4(2, 1, 16), 1, [], 1),
    (u8(0, 10)[None], f4(1, 1, 16), 1, [], 1),
    (u8(0, 2**64 - 1)[None], f4(1, 1, 16), 1, [], 1),
    (u8(0, 1)[None], f4(1, 2, 16), 1, [[0]], 1),
    (u8(0, 1)[None], f4(1, 1, 16), -1, [], 1),
    (u8(0, 1)[None], np.full((1, 1, 16), np.nan, "f4"), 1, [], 1),
    (u8(0, 1)[None].astype("i8"), f4(1, 1, 16), 1, [], 1),
]


@pytest.mark.parametrize("arguments", ENDS)
def test_ends_refuses(core_rows, arguments):
    with pytest.raises(ORDINARY):
        core_rows.ends(*arguments)


def test_a_k_of_any_size_is_clamped(core_rows):
    (positions, _), _ = core_rows.ends(u8(0, 1)[None], f4(1, 1, 16), BIG, (True, True), [], None, 1)
    assert positions.shape == (1, 2)
    (positions, _), _ = core_rows.ends(
        u8(0, 1)[None], f4(1, 1, 16), 0, (True, True), [], None, 10**9
    )
    assert positions.shape == (1, 0)


def test_rows_that_are_not_there_are_refused(tmp_path, core_rows):
    scales = f4(1)
    for checksums in (None, u4(), u4(0)):
        for files in (
            [(tmp_path / "nowhere", 0, 1, checksums)],
            [(tmp_path, 0, 1, checksums)],
            [(tmp_path / "nowhere", 2**64 - 1, 2**64 - 1, checksums)],
            [],
        ):
            with pytest.raises(WhenceError):
                _core.Rows(files, 16, "float32", scales)
    with pytest.raises(ORDINARY):
        core_rows.read(u8(3, 10))
    for dim in (0, 2**46, 2**63):
        with pytest.raises(ORDINARY):
            _core.Rows([], dim, "float32", f4(0))
    rows = tmp_path / "rows"
    rows.write_bytes(bytes(8))
    for dim, dtype in ((16, "int3"), (17, "int4"), (2**63, "int1"), (2**62, "int4")):
        with pytest.raises(ORDINARY):
            _core.Rows([(rows, 0, 1, None)], dim, dtype, scales)
    for checksums in (u4(), u4(0, 0), u4(0)[:, None], np.zeros(1), "0" * 8):
        with pytest.raises(ORDINARY):
            _core.Rows([(rows, 0, 1, checksums)], 2, "float32", scales)
        with pytest.raises(ORDINARY):
            _core.check_file(rows, 8, checksums, 1)


@pytest.mark.parametrize("memory_map", [False, True])
def test_rows_whose_blocks_changed_are_not_read(tmp_path, memory_map):
    values = np.random.default_rng(0).standard_normal((600, 64)).astype(np.float32)
    sums = _core.block_checksums(values.view(np.uint8).reshape(-1))
    changed = values.copy()
    changed[300] += 1
    for name, content in (("rows", values), ("changed", changed)):
        (tmp_path / name).write_bytes(content.tobytes())
    numbers = np.arange(600, dtype=np.uint64)

    def rows(name):
        files = [(tmp_path / name, 0, 600, sums)]
        return _core.Rows(files, 64, "float32", f4(600), memory_map=memory_map)

    assert (rows("rows").read(numbers) == values).all()
    assert (rows("changed").read(numbers[:256]) == values[:256]).all()
    queries, sides = f4(1, 1, 64), (True, True)
    for wrong in (
        lambda: rows("changed").read(numbers[256:257]),
        lambda: rows("changed").gathered(numbers),
        lambda: rows("changed").norms(2),
        lambda: rows("changed").ends(None, queries, 1, sides, [], None, 2),
    ):
        with pytest.raises(StoreError, match=r"block 1 \(bytes 65536 to 131071\): its checksum"):
            wrong()


def test_files_of_another_length_or_kind_are_not_checked(tmp_path):
    rows = tmp_path / "rows"
    rows.write_bytes(bytes(8))
    (tmp_path / "link").symlink_to(rows)
    sums = _core.block_checksums(np.zeros(8, np.uint8))
    assert _core.check_file(rows, 8, sums, 2) == []
    assert _core.check_file(rows, 8, sums + 1, 1) == [0]
    for name, length in (("rows", 7), ("rows", 2**64 - 1), ("rows", -1), ("link", 8), ("", 8)):
        with pytest.raises(ORDINARY):
            _core.check_file(tmp_path / name, length, sums, 1)


def u4(*values):
    return np.array(values, np.uint32)


TEXTS = [
    (u4(1, 2, 3), u8(0, 1)),
    (u4(1, 2, 3), u8(0, 4)),
    (u4(1, 2, 3), u8(1, 3)),
    (u4(1, 2, 3), u8(0, 2, 1, 3)),
    (u4(1, 2, 3), u8(0, 2**64 - 1, 3)),
    (u4(1, 2, 3), u8()),
    (u4(1, 2, 3, 4)[::2], u8(0, 2)),
    (u4(1, 2, 3).astype("i8"), u8(0, 3)),
    (u4(1, 2, 3), u8(0, 3).astype("i8")),
    (u4(1, 2, 3)[None], u8(0, 3)),
]


@pytest.mark.parametrize("texts", TEXTS)
def test_an_inverted_index_refuses_texts(texts):
    index = _core.InvertedIndex((1.5, 0.75)).appended(u4(1, 2), u8(0, 1, 2), 1)
    for call in (
        lambda: index.appended(*texts, 1),
        lambda: index.search(*texts, 1, None, 1),
        lambda: index.scores(*texts, 1),
    ):
        with pytest.raises(ORDINARY):
            call()


def test_an_inverted_index_refuses_what_does_not_fit():
    for bm25 in [(-1, 0), (1, 2), (np.nan, 0), (1, np.inf), (1,), 1]:
        with pytest.raises(ORDINARY):
            _core.InvertedIndex(bm25)
    index = _core.InvertedIndex(None).appended(u4(1, 2**32 - 1), u8(0, 1, 2), 1)
    for keep in (np.ones(1, np.bool_), np.ones(4, np.bool_)[::2], np.ones(2)):
        with pytest.raises(ORDINARY):
            index.search(u4(1), u8(0, 1), 1, keep, 1)
    for k in (-1, 1.5, None):
        with pytest.raises(ORDINARY):
            index.search(u4(1), u8(0, 1), k, None, 1)
    assert index.search(u4(2**32 - 1), u8(0, 1), BIG, None, BIG)[0].tolist() == [[1, 0]]
    many = np.zeros(2**23, np.uint64)
    index = _core.InvertedIndex(None).appended(u4(), many, 1)
    with pytest.raises(ORDINARY, match="queries must be so few"):
        index.scores(u4(), many, 1)  # 2^49 bytes


def test_a_repeated_array_is_not_written_out(core_rows):
    wide = np.broadcast_to(f4(1, 1, 1), (1, 2**42, 1))
    with pytest.raises(ORDINARY):
        SKETCH.add_outer("w", [1, 5], 0, wide, f4(1, 3, 5), totals(1), 1)
    left = np.broadcast_to(np.arange(4, dtype=np.float32)[None, :, None], (3, 4, 7))
    right = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    found, expected = totals(3), totals(3)
    SKETCH.add_outer("w", [7, 5], 0, left, right, found, 1)
    SKETCH.add_outer("w", [7, 5], 0, left.copy(), right, expected, 1)
    assert np.array_equal(found, expected)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise on Windows")
def test_ctrl_c_ends_a_long_call():
    script = """
        import signal
        import numpy as np
        from whence._core import Sketch
        # A shell lets what it starts in the background ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sketch = Sketch("chunked_sjlt", 64, 0)
        totals, factor = np.zeros((1, 64)), np.ones((1, 8000, 1024), "f4")
        print("ready", flush=True)
        try:  # one sample of eight thousand million products, one at a time
            sketch.add_outer("w", [1024, 1024], 0, factor, factor, totals, 1)
        except KeyboardInterrupt:
            print("stopped", flush=True)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "WHENCE_INSTRUCTION_SET": "scalar"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "ready\n"
    try:
        child.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
    try:
        assert child.communicate(timeout=30)[0] == "stopped\n"
    finally:
        child.kill()


def test_a_forked_process_can_go_on(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    script = """
        import os, numpy as np, whence
        sketch = whence.Sketch(dim=64, threads=4)
        values = np.ones((4, 2_000_000), np.float32)
        first = sketch(values)
        child = os.fork()
        if child == 0:
            os._exit(0 if np.array_equal(sketch(values), first) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "0\n"
