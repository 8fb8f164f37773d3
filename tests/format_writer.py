"""Writes a store by the words of docs/format.md, without whence."""

import json
import zlib

import numpy as np
from format_reader import BITS, KINDS, checksums, header


def object_bytes(body):
    """A JSON file."""
    text = json.dumps(body).encode()
    return text + f"\n{zlib.crc32(text):08x}\n".encode()


def array_bytes(array):
    """An array's file."""
    array = np.ascontiguousarray(array)
    return header(array.dtype.str, array.shape) + array.tobytes()


def put(path, content):
    """Writes a file; its length and checksums."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return [len(content), checksums(content)]


def files_of(stem, values):
    """name -> content of the files of ids."""
    values = list(values)
    if not isinstance(values[0], str):
        array = np.array(values)
        return {f"{stem}.npy": array_bytes(array)}
    texts = [value.encode("utf-8", "surrogatepass") for value in values]
    offsets = np.cumsum([0, *map(len, texts)])
    content = np.frombuffer(b"".join(texts), np.uint8)
    return {f"{stem}.npy": array_bytes(content), f"{stem}-offsets.npy": array_bytes(offsets)}


def packed(codes, bits):
    """[rows, dim] codes into bytes, the first into the lowest bits."""
    count, each = len(codes), 8 // bits
    padded = np.zeros((count, -(-codes.shape[1] // each) * each), np.uint8)
    padded[:, : codes.shape[1]] = codes
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (padded.reshape(count, -1, each) << shifts).sum(axis=2, dtype=np.uint8)


def stored_bytes(values, dtype):
    """The rows' file of stored values: unit rows, or levels."""
    if dtype in BITS:
        top = (1 << BITS[dtype]) - 1
        return array_bytes(packed((values + top).astype(np.int64) // 2, BITS[dtype]))
    return array_bytes(np.asarray(values, KINDS[dtype]))


def shard(folder, number, values, scales, ids, *, dtype="float32", others=()):
    """Writes a shard of checkpoint 0; its entry. `others`: name -> the file's bytes instead."""
    name, scales = f"shard-{number:08}", np.asarray(scales, "<f4")
    files = {"rows.npy": stored_bytes(values, dtype), "scales.npy": array_bytes(scales)}
    files |= files_of("ids", ids) | dict(others)
    said = {each: put(folder / name / each, it) for each, it in files.items() if it is not None}
    body = {"checkpoint": 0, "rows": len(scales), "files": said}
    return [name, 0, len(scales), *put(folder / name / "shard.json", object_bytes(body))]


def manifest(folder, number, shards, dim, **other):
    """Writes a manifest and its marker."""
    checkpoint = {"name": "0", "learning_rate": None, "weights": "fixed", "first": None}
    checkpoint |= {"last": None, "weight": None, "map": None}
    body = {"format": "whence store", "version": 1, "requires": [], "number": number}
    body["sketch"] = {"kind": "chunked_sjlt", "dim": dim, "seed": 0, "hash_version": 1}
    body |= {"dtype": "float32", "reduction": "mean", "model": {"digest": "", "parameters": []}}
    body |= {"ids": "int64", "columns": [], "checkpoints": [checkpoint], "rows": "per_checkpoint"}
    body |= {"shards": shards, "packs": [], "gone": None, "writer": None, "skipped": []}
    put(folder / f"manifest-{number:08}.json", object_bytes(body | other))
    put(folder / f"committed-{number:08}", b"")
