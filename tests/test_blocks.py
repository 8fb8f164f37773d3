"""Files that are written piece by piece, and checked block by block, at first touch."""

import os
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from filled import fill, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import whence
from whence import errors
from whence.store.files import (
    BLOCK,
    NewFile,
    Written,
    check_blocks,
    header,
    read,
    read_array,
    read_range,
    write,
    write_array,
)

SIZES = [0, 1, 100, 65_535, 65_536, 65_537, 131_071, 131_072, 200_000]


def content_of(size, seed=0):
    return np.random.default_rng(seed).bytes(size)


def by_zlib(content):
    """A file's checksums, by zlib."""
    parts = [content[at : at + 65_536] for at in range(0, len(content), 65_536)]
    return "".join(f"{zlib.crc32(part):08x}" for part in parts)


# --- written ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from(SIZES), max_size=5),
    head=st.sampled_from([0, 1, 128, 65_536]),
    kind=st.sampled_from([bytes, bytearray, memoryview]),
)
def test_a_file_has_its_pieces_in_order_and_the_checksums_of_its_blocks(
    tmp_path_factory, sizes, head, kind
):
    path = tmp_path_factory.mktemp("file") / "f"
    first, pieces = content_of(head, 99), [content_of(size, at) for at, size in enumerate(sizes)]
    file = NewFile(path, head)
    for piece in pieces:
        file.write(kind(piece))
    written = file.seal(first)
    file.sync()
    file.close()
    whole = first + b"".join(pieces)
    assert path.read_bytes() == whole
    assert written == Written(len(whole), by_zlib(whole))
    assert read(path, written) == whole


def test_arrays_of_any_type_are_written_as_bytes(tmp_path):
    values = np.arange(70_000, dtype="<f8").reshape(700, 100)
    file = NewFile(tmp_path / "f")
    file.write(memoryview(values))
    assert file.seal() == Written(560_000, by_zlib(values.tobytes()))
    file.close()


@pytest.mark.parametrize("most", [1, 1000, 65_535])
def test_what_the_system_takes_in_parts_is_written_whole(tmp_path, most):
    content, put = content_of(3 * most + 70_000 // (1 if most > 1 else 100)), os.write
    with mock.patch("os.write", lambda handle, view: put(handle, view[:most])):
        written = write(tmp_path / "f", content)
    assert (tmp_path / "f").read_bytes() == content
    assert written == Written(len(content), by_zlib(content))


@pytest.mark.parametrize("head", [b"", b"x", b"x" * 129])
def test_a_head_of_another_length_is_refused(tmp_path, head):
    file = NewFile(tmp_path / "f", 128)
    with pytest.raises(ValueError, match=f"head must be 128 bytes, got {len(head)}"):
        file.seal(head)
    file.close()


def test_a_new_file_is_none_that_is_there_through_a_link(tmp_path):
    (tmp_path / "theirs").write_text("x")
    (tmp_path / "f").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match=r".*"):
        NewFile(tmp_path / "f")
    assert (tmp_path / "theirs").read_text() == "x"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["<f2", "<f4", "<f8", "<i8", "|i1", "|u1", "|b1"]),
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
)
def test_arrays_are_what_numpy_writes(tmp_path_factory, kind, shape):
    folder = tmp_path_factory.mktemp("array")
    array = np.arange(np.prod(shape)).astype(kind).reshape(shape)
    written = write_array(folder / "ours.npy", array)
    np.save(folder / "theirs.npy", array)
    assert (folder / "ours.npy").read_bytes() == (folder / "theirs.npy").read_bytes()
    assert np.array_equal(np.load(folder / "ours.npy", allow_pickle=False), array)
    assert np.array_equal(read_array(folder / "ours.npy", written, kind, tuple(shape)), array)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("|O", (2,)), ("(,)i4, i4", (2,)), ("<f8", (-1, -2)), ("<f8", (2.0,)), (["<f8"], (2,))],
)
def test_arrays_of_no_known_type_or_shape_are_refused(tmp_path, kind, shape):
    written = write(tmp_path / "a.npy", header(kind, shape), bytes(16))  # its header says the same
    with pytest.raises(errors.StoreError, match=r"a\.npy must hold values of a known type"):
        read_array(tmp_path / "a.npy", written, kind, shape)


@pytest.mark.parametrize("shape", [(0,), (2**40,), (2**62, 2**20), (1, 1, 1)])
def test_a_header_is_as_long_for_any_shape(shape):
    assert len(header("<f4", shape)) == 128


@pytest.mark.parametrize(
    "body",
    [
        (-1, ""),
        (1.0, "00000000"),
        (True, "00000000"),
        (None, ""),
        (1, None),
        (1, ""),
        (0, "00000000"),
        (65_536, "00000000" * 2),
        (65_537, "00000000"),
        (1, "0000000g"),
        (1, "0000000A"),
        (1, " 0000000"),
        (1, "0000000\u0660"),
        (1, "00000000", 1),
        (1,),
        7,
        "ab",
    ],
)
def test_what_cannot_be_known_of_a_file_is_refused(body):
    with pytest.raises((ValueError, TypeError)):
        Written.of(body)


def test_checksums_are_numbers_again(tmp_path):
    content = content_of(200_000)
    blocks = write(tmp_path / "f", content).blocks
    assert blocks.dtype == np.uint32
    assert blocks.tolist() == [
        zlib.crc32(content[at : at + 65_536]) for at in range(0, 200_000, 65_536)
    ]


# --- read ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200_000), st.integers(0, 200_000))
def test_any_part_of_a_file_is_read(tmp_path_factory, one, other):
    path, content = tmp_path_factory.mktemp("file") / "f", content_of(200_000)
    written = write(path, content)
    start, stop = sorted((one, other))
    assert read_range(path, written, start, stop) == content[start:stop]


def test_a_part_is_read_if_its_own_blocks_are_whole(tmp_path):
    content = content_of(200_000)
    written = write(tmp_path / "f", content)
    damaged = bytearray(content)
    damaged[70_000] ^= 1
    (tmp_path / "f").write_bytes(damaged)
    assert read_range(tmp_path / "f", written, 131_072, 200_000) == content[131_072:]
    assert read_range(tmp_path / "f", written, 10, 65_536) == content[10:65_536]
    for start, stop in ((65_536, 65_537), (131_071, 131_072), (0, 65_537), (131_071, 140_000)):
        with pytest.raises(
            errors.StoreError, match=r"f is damaged: block 1 \(bytes 65536 to 131071"
        ):
            read_range(tmp_path / "f", written, start, stop)


@pytest.mark.parametrize(
    ("at", "match"),
    [
        (0, r"block 0 \(bytes 0 to 65535\)"),
        (65_536, r"block 1 \(bytes 65536 to 131071\)"),
        (199_999, r"block 3 \(bytes 196608 to 199999\)"),
    ],
)
def test_the_block_that_is_damaged_is_named_and_its_bytes(tmp_path, at, match):
    content = bytearray(content_of(200_000))
    written = write(tmp_path / "f", content)
    content[at] ^= 128
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(errors.StoreError, match=match):
        read(tmp_path / "f", written)


def test_blocks_behind_the_first_are_numbered_from_there():
    content = content_of(70_000)
    sums = Written(70_000, by_zlib(content)).blocks
    check_blocks(Path("f"), content, sums, 5)
    sums[1] ^= 1
    with pytest.raises(errors.StoreError, match=r"block 6 \(bytes 393216 to 397679\)"):
        check_blocks(Path("f"), content, sums, 5)


@pytest.mark.parametrize("change", [-1, 1, -65_536])
def test_a_file_of_another_length_is_refused(tmp_path, change):
    content = content_of(131_072)
    written = write(tmp_path / "f", content)
    (tmp_path / "f").write_bytes((content + b"\0")[: 131_072 + change])
    match = f"it must be 131072 bytes long, got {131_072 + change}"
    with pytest.raises(errors.StoreError, match=match):
        read(tmp_path / "f", written)
    with pytest.raises(errors.StoreError, match=match):
        read_range(tmp_path / "f", written, 0, 1)


# --- stores -------------------------------------------------------------------------------------

DIM = 256
ROW_BYTES = {"float32": 1024, "float16": 512, "int8": 256, "int4": 128, "int2": 64, "int1": 32}


def damaged(path, block, byte=1000):
    """Flips a bit in a block of the store's rows."""
    file = path / "shard-00000001" / "rows.npy"
    content = bytearray(file.read_bytes())
    content[block * 65_536 + byte] ^= 4
    file.write_bytes(content)


def of_three_blocks(path, dtype):
    """A store whose rows lie in three blocks; [rows, 2] the first and last block of each row."""
    size = ROW_BYTES[dtype]
    count = 140_000 // size
    store = fill(path, random_rows(count, DIM), dtype=dtype)
    starts = 128 + np.arange(count) * size
    return store, np.stack([starts // 65_536, (starts + size - 1) // 65_536], axis=1)


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("dtype", ROW_BYTES)
def test_rows_in_whole_blocks_are_read_and_others_refused(tmp_path, dtype, block, memory_map):
    store, blocks = of_three_blocks(tmp_path / "s", dtype)
    rows = store.rows()
    damaged(tmp_path / "s", block)
    store = whence.open(tmp_path / "s", memory_map=memory_map)
    touched = (blocks == block).any(axis=1)
    assert 0 < touched.sum() < len(touched)
    whole = np.flatnonzero(~touched)
    assert np.array_equal(store.rows(whole), rows[whole])
    edges = np.flatnonzero(touched)[[0, -1]]  # of which some lie in two blocks
    for id_ in edges.tolist():
        with pytest.raises(
            errors.StoreError, match=rf"rows\.npy is damaged: block {block} \(bytes"
        ):
            store.rows(np.array([id_]))


@pytest.mark.parametrize("memory_map", [False, True])
def test_a_search_does_not_rank_damaged_rows(tmp_path, memory_map):
    of_three_blocks(tmp_path / "s", "float16")
    damaged(tmp_path / "s", 2)
    store = whence.open(tmp_path / "s", memory_map=memory_map)
    for _ in range(2):
        with pytest.raises(errors.StoreError, match=r"rows\.npy is damaged: block 2"):
            store.search(random_rows(1, DIM))


@pytest.mark.parametrize("memory_map", [False, True])
def test_damage_that_comes_after_a_store_is_opened_is_found_at_first_touch(tmp_path, memory_map):
    _, blocks = of_three_blocks(tmp_path / "s", "int8")
    store = whence.open(tmp_path / "s", memory_map=memory_map)
    assert len(store.rows(np.array([0]))) == 1
    damaged(tmp_path / "s", 1)
    inside = np.flatnonzero(blocks[:, 0] == 1)[1:2]
    with pytest.raises(errors.StoreError, match="block 1"):
        store.rows(inside)


@pytest.mark.parametrize("name", ["scales.npy", "ids.npy", "column-0.npy", "column-0-offsets.npy"])
@pytest.mark.parametrize("block", [0, 1])
def test_damage_beside_the_rows_is_found_when_it_is_read(tmp_path, name, block):
    count = 17_000
    texts = np.array([f"{number:06}" for number in range(count)])
    fill(tmp_path / "s", random_rows(count, 2), dtype="int1", text=texts)
    file = tmp_path / "s" / "shard-00000001" / name
    content = bytearray(file.read_bytes())
    content[block * 65_536 + 200] ^= 1
    file.write_bytes(content)
    store = whence.open(tmp_path / "s")
    with pytest.raises(errors.StoreError, match=rf"{name} is damaged: block {block} \(bytes"):
        _ = store.ids, store.scales, store.columns["text"]


def test_the_block_of_python_and_of_the_core_is_that_of_the_format():
    assert BLOCK == 65_536
