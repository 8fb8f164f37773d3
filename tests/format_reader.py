"""Reads and checks a store by the words of docs/format.md, without whence."""

import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np

BLOCK = 65_536
KINDS = {"float32": "<f4", "float16": "<f2", "int8": "|i1"}
BITS = {"int4": 4, "int2": 2, "int1": 1}
COLUMNS = {"bool": "|b1", "int64": "<i8", "float64": "<f8"}
KEYS = {
    "format",
    "version",
    "requires",
    "number",
    "sketch",
    "dtype",
    "reduction",
    "model",
    "ids",
    "columns",
    "checkpoints",
    "rows",
    "shards",
    "packs",
    "gone",
    "writer",
    "skipped",
}
ARRAY = r"[a-z0-9-]+\.npy"


def check(right, what):
    """An error, if something is not as the format says."""
    if not right:
        raise ValueError(what)


def header(kind, shape):
    """The 128 bytes before the values of an array."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.ljust(117).encode() + b"\n"


def checksums(content):
    """8 digits for each block."""
    parts = (content[at : at + BLOCK] for at in range(0, len(content), BLOCK))
    return "".join(f"{zlib.crc32(part):08x}" for part in parts)


class Files:
    """The files of a folder, and which of them were accounted for."""

    def __init__(self, folder):
        self.folder = Path(folder)
        names = (path.relative_to(folder) for path in self.folder.rglob("*") if not path.is_dir())
        self.left = {str(name).replace("\\", "/") for name in names}

    def read(self, name, length=None, sums=None):
        """The bytes of a file, of this length and these checksums if they are known."""
        path = self.folder / name
        check(path.is_file() and not path.is_symlink(), f"{name} is no file")
        content = path.read_bytes()
        check(length is None or (len(content), checksums(content)) == (length, sums), name)
        self.left.discard(name)
        return content

    def object(self, name, length=None, sums=None):
        """What a JSON file says."""
        content = self.read(name, length, sums)
        text, end, rest = content.partition(b"\n")
        check(end and rest == f"{zlib.crc32(text):08x}\n".encode(), f"{name} is damaged")
        check(text.isascii() and len(content) <= 64 << 20, name)
        return json.loads(text)

    def array(self, name, kind, shape, length, sums):
        """The values of an array."""
        content, start = self.read(name, length, sums), header(kind, shape)
        check(content.startswith(start), f"{name} has another header")
        return np.frombuffer(content[len(start) :], kind).reshape(shape)

    def texts(self, stem, count, files):
        """The texts of two arrays."""
        offsets = self.array(f"{stem}-offsets.npy", "<i8", (count + 1,), *files("-offsets.npy"))
        check(offsets[0] == 0 and (np.diff(offsets) >= 0).all(), f"{stem} has bad offsets")
        content = self.array(f"{stem}.npy", "|u1", (int(offsets[-1]),), *files(".npy")).tobytes()
        ends = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        return [content[start:end].decode("utf-8", "surrogatepass") for start, end in ends]


class Store:
    """A store of one writer.

    Attributes:
        manifest: What the newest manifest says.
        ids: In the order in which they come first.
        rows: checkpoint -> id -> float32 row.
        columns: name -> id -> value.
        left: Files that nothing has named.
    """

    def __init__(self, folder):
        self.files = files = Files(folder)
        numbers = sorted(int(name[9:-5]) for name in files.left if name.startswith("manifest-"))
        markers = [int(name[10:]) for name in files.left if name.startswith("committed-")]
        check(numbers and max(markers, default=0) <= numbers[-1], "the newest manifest is gone")
        older = [files.object(f"manifest-{number:08}.json") for number in numbers[:-1]]
        self.manifest = found = files.object(f"manifest-{numbers[-1]:08}.json")
        check(found["format"] == "whence store" and found["version"] == 1, "another format")
        check(found["requires"] == [], f"{found['requires']} must be understood")
        check(found["number"] == numbers[-1] and set(found) >= KEYS, "keys")
        for number in markers:
            check(files.read(f"committed-{number:08}") == b"", "a marker has no bytes")
        files.left.discard("lock")
        self.checkpoints = [each["name"] for each in found["checkpoints"]]
        if found["rows"] == "combined":
            self.checkpoints = ["combined"]
        self.ids, self.columns = [], {name: {} for name, _ in found["columns"] or []}
        self.rows = {name: {} for name in self.checkpoints}
        self.shards = [each for pack in found["packs"] for each in self._pack(pack)]
        self.shards += found["shards"]
        check(len({entry[0] for entry in self.shards}) == len(self.shards), "a shard twice")
        gone = {each["gone"]["name"] for each in older if each["gone"]}
        for name in gone - {(found["gone"] or {}).get("name")}:
            files.read(name)
        gone = self._gone()
        for entry in self.shards:
            self._shard(*entry, gone)
        check(not gone, f"{gone} are gone and were never there")
        for each in found["checkpoints"]:
            if each["map"]:
                self._map(each["map"])

    def _pack(self, pack):
        check(re.fullmatch(r"pack-[0-9]{8,18}\.json", pack["name"]), pack["name"])
        found = self.files.object(pack["name"], pack["length"], pack["checksums"])["shards"]
        check(len(found) == pack["shards"], "a pack of others")
        return found

    def _gone(self):
        said = self.manifest["gone"]
        if said is None:
            return set()
        check(re.fullmatch(r"gone-[0-9]{8,18}\.npy", said["name"]), said["name"])
        shape = said["rows"], 2
        found = self.files.array(said["name"], "<i8", shape, said["length"], said["checksums"])
        pairs = [tuple(pair) for pair in found.tolist()]
        check(pairs == sorted(set(pairs)) and pairs, "rows that are gone must rise")
        return set(pairs)

    def _shard(self, name, checkpoint, count, length, sums, gone):
        check(re.fullmatch(r"shard-[0-9]{8,18}", name) and count > 0, name)
        described = self.files.object(f"{name}/shard.json", length, sums)
        check((described["checkpoint"], described["rows"]) == (checkpoint, count), name)
        check(0 <= described.get("error", 0) <= 1, name)
        check(all(re.fullmatch(ARRAY, each) for each in described["files"]), name)

        def column(stem, kind):
            if kind == "str":
                return self.files.texts(
                    f"{name}/{stem}", count, lambda end: described["files"][stem + end]
                )
            where = f"{name}/{stem}.npy", COLUMNS[kind], (count,)
            return self.files.array(*where, *described["files"][f"{stem}.npy"]).tolist()

        rows, number = self._rows(name, count, described["files"]), int(name[6:])
        ids = column("ids", self.manifest["ids"])
        columns = self.manifest["columns"] or []
        beside = {each: column(f"column-{at}", kind) for at, (each, kind) in enumerate(columns)}
        at = self.checkpoints[checkpoint]
        for row, id_ in enumerate(ids):
            check(not isinstance(id_, str) or len(id_) <= 1024, "a long id")
            if (number, row) in gone:
                gone.remove((number, row))
                continue
            check(id_ not in self.rows[at], f"{id_!r} twice at {at}")
            if not any(id_ in known for known in self.rows.values()):
                self.ids.append(id_)
            first = all(id_ not in self.rows[each] for each in self.checkpoints[: checkpoint + 1])
            self.rows[at][id_] = rows[row]
            for each, values in beside.items():
                if first:
                    self.columns[each][id_] = values[row]

    def _rows(self, name, count, files):
        sketch, dtype = self.manifest["sketch"], self.manifest["dtype"]
        if sketch.get("layout") == "factored":
            dim = sum(each["left"] + each["right"] for each in sketch["segments"])
        else:
            dim = sketch["dim"] * len(sketch.get("layers", [""]))
        check(1 <= dim <= 1 << 20, "dim")
        bits = BITS.get(dtype)
        width = -(-dim * bits // 8) if bits else dim
        kind = KINDS.get(dtype, "|u1")
        values = self.files.array(f"{name}/rows.npy", kind, (count, width), *files["rows.npy"])
        if bits:
            codes = np.stack([values >> at & (1 << bits) - 1 for at in range(0, 8, bits)], axis=2)
            codes = codes.reshape(count, -1)
            check(not codes[:, dim:].any(), "the last byte is not filled with 0")
            values = 2 * codes[:, :dim].astype(np.int64) - ((1 << bits) - 1)
        scales = self.files.array(f"{name}/scales.npy", "<f4", (count,), *files["scales.npy"])
        check(np.isfinite(scales).all() and (scales >= 0).all(), "scales")
        return scales[:, None] * values.astype(np.float32)

    def _map(self, said):
        check(re.fullmatch(r"map-[0-9]{8,18}", said["name"]), said["name"])
        files = dict(said["files"])
        body = self.files.object(f"{said['name']}/map.json", *files.pop("map.json"))
        check({f"{name}.npy" for name in body["arrays"]} == set(files), "arrays of a map")
        for name, (kind, shape) in body["arrays"].items():
            check(kind in ("<f4", "<i8") and re.fullmatch(ARRAY, f"{name}.npy"), name)
            where = f"{said['name']}/{name}.npy"
            array = self.files.array(where, kind, shape, *files[f"{name}.npy"])
            check(np.isfinite(array).all(), name)

    @property
    def left(self):
        """Names of files that nothing accounts for."""
        return sorted(self.files.left)
