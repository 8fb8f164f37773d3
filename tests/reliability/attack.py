"""Files of an attacker, who makes every checksum fit: an error of ours or an answer, never worse.

Values in arrays and JSON files of every kind of sample are replaced by hostile ones, and all
checksums and lengths that vouch for them are made to fit again. What reads them may refuse them or
answer; it may not crash, hang, panic, raise anything but its own errors, or take more memory than
twice the bytes of the files and 64 MiB.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import damage
import numpy as np
import trial
from samples import SAMPLES, Sample

import whence
from whence.errors import MissingWritersWarning, WhenceError

NEVER = ("crashed", "hung", "panicked", "other exceptions", "too much memory")

BLOCK = 65_536

ROOM = 64 << 20
"""Bytes of memory that reading may take beside twice the files' own."""

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 127, 255, 65_536, 2**31 - 1, 2**31, 2**32, 2**53, 2**62,
    2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324, "", "0", "x", "\0",
    "../../../etc/passwd", "/etc/passwd", "a" * 100_000, "é" * 99, "\ud800", "<i8", "<f4", "|O",
    "float32", "float16", "int8", "int4", "int1", "str", "int64", "bool", "combined", "factored",
    [], {}, [[]], [0, 0], [[0, 0]], {"": {}}, [None] * 1000, {"a": [1]}, ["a", "a"],
)  # fmt: skip

NUMBERS = (0, 1, -1, 2, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63))
FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 3e38, 1e-45, 0.0)


# What an attacker changes


def change_array(content: bytes, generator: np.random.Generator) -> bytes:
    """Other values in an array, another header, or more or fewer bytes."""
    changed = bytearray(content)
    values = changed[128:]
    kind = generator.integers(7)
    if kind <= 1 and len(changed):
        for at in generator.integers(len(changed), size=int(generator.integers(1, 40))):
            changed[at] = int(generator.integers(256))
    elif kind == 2 and len(values) >= 8:
        at = 128 + 8 * int(generator.integers(len(values) // 8))
        changed[at : at + 8] = int(generator.choice(NUMBERS)).to_bytes(8, "little", signed=True)
    elif kind == 3 and len(values) >= 4:
        at = 128 + 4 * int(generator.integers(len(values) // 4))
        changed[at : at + 4] = np.float32(generator.choice(FLOATS)).tobytes()
    elif kind == 4:
        found = re.search(rb"\((\d+)", changed[:128])
        if found:
            size = str(int(generator.choice([0, 1, 2**31, 2**40, 2**62]))).encode()
            head = changed[: found.start(1)] + size + changed[found.end(1) : 128]
            changed[:128] = head.rstrip(b"\n").ljust(127)[:127] + b"\n"
    elif kind == 5:
        del changed[int(generator.integers(len(changed) + 1)) :]
    else:
        changed += bytes(int(generator.integers(1, 5000)))
    return bytes(changed)


def change_json(body: Any, generator: np.random.Generator) -> Any:
    """Another value, a key more or fewer, or an entry twice, somewhere in it."""
    places = list(places_in(body))
    if not places:
        return body
    holder, key = places[int(generator.integers(len(places)))]
    kind = generator.integers(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.append(holder[key])
    elif kind == 2:
        other, its = places[int(generator.integers(len(places)))]
        with suppress(KeyError, IndexError):
            holder[key] = json.loads(json.dumps(other[its]))
    elif kind == 3:
        holder[key] = nested(int(generator.choice([10, 400])))
    else:
        holder[key] = HOSTILE[int(generator.integers(len(HOSTILE)))]
    return body


def nested(depth: int) -> list[Any]:
    """Lists in lists."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def places_in(body: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a value: what holds it, and its key there."""
    keys: Any = list(body) if isinstance(body, dict) else range(len(body))
    if not isinstance(body, (dict, list)):
        return
    for key in keys:
        yield body, key
        if isinstance(body[key], (dict, list)):
            yield from places_in(body[key])


# How the checksums are made to fit


def sums(content: bytes) -> str:
    """The checksums of a file's blocks, as files name them."""
    parts = range(0, len(content), BLOCK)
    return "".join(f"{zlib.crc32(content[at : at + BLOCK]):08x}" for at in parts)


def load(path: Path) -> Any:
    return json.loads(path.read_bytes().splitlines()[0])


def store_json(path: Path, body: Any) -> None:
    text = json.dumps(body).encode()
    path.write_bytes(text + f"\n{zlib.crc32(text):08x}\n".encode())


def vouch(folder: Path) -> None:
    """Makes all lengths and checksums in a folder fit, the innermost first."""
    for path in sorted(folder.rglob("*.json"), key=lambda each: -len(each.parts)):
        if path.name.startswith(("manifest-", "pack-")):
            continue
        with suppress(ValueError, LookupError, TypeError, AttributeError):
            body = load(path)
            files = body["files"] if isinstance(body, dict) and "files" in body else {}
            for name, known in list(files.items()):
                held = path.with_name(name if name.endswith((".npy", ".json")) else f"{name}.npy")
                if held.is_file() and isinstance(known, list) and len(known) >= 2:
                    content = held.read_bytes()
                    known[:2] = [len(content), sums(content)]
            store_json(path, body)
    for prefix in ("pack-", "manifest-"):
        for path in folder.rglob(f"{prefix}*.json"):
            with suppress(ValueError, LookupError, TypeError, AttributeError):
                body = load(path)
                vouch_for(path.parent, body)
                store_json(path, body)


def vouch_for(folder: Path, body: Any) -> None:
    """What a manifest or a pack says of files: as they are."""

    def of(name: Any) -> list[Any] | None:
        if isinstance(name, str) and "/" not in name and len(name) < 99:
            for held in (folder / name, folder / name / "shard.json"):
                if held.is_file():
                    content = held.read_bytes()
                    return [len(content), sums(content)]
        return None

    for entry in body.get("shards") or []:
        if isinstance(entry, list) and len(entry) >= 5 and (known := of(entry[0])):
            entry[3:5] = known
    for named in [*(body.get("packs") or []), body.get("gone")]:
        if isinstance(named, dict) and (known := of(named.get("name"))):
            named["length"], named["checksums"] = known
    for checkpoint in body.get("checkpoints") or []:
        held = checkpoint.get("map") if isinstance(checkpoint, dict) else None
        for name, known in (held or {}).get("files", {}).items():
            path = folder / held["name"] / name
            if path.is_file():
                known[:2] = [path.stat().st_size, sums(path.read_bytes())]


def attack(folder: Path, generator: np.random.Generator) -> str:
    """Changes one to three files of a sample; says which."""
    there = [each for each in sorted(folder.rglob("*")) if each.is_file()]
    files = [each for each in there if each.suffix in (".npy", ".json")] or there
    done = []
    for _ in range(int(generator.integers(1, 4))):
        path = files[int(generator.integers(len(files)))]
        if path.suffix != ".json":
            path.write_bytes(change_array(path.read_bytes(), generator))
        else:
            with suppress(ValueError, IndexError):
                store_json(path, change_json(load(path), generator))
        done.append(path.relative_to(folder).as_posix())
    vouch(folder)
    return ", ".join(done)


# What becomes of it


def outcome_of(sample: Sample, folder: Path) -> tuple[str, str]:
    """What became of a sample that was attacked; and how."""
    size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
    before = reset_peak()
    what = "answers"
    calls: list[Callable[[], Any]] = [lambda: sample.read(folder)]
    if sample.store is not None:
        calls += [lambda: whence.verify(folder / sample.store, progress=False)]
        calls += [lambda: whence.repair(folder / sample.store, progress=False)]
    for call in calls:
        try:
            call()
        except (WhenceError, MissingWritersWarning) as error:
            what = "errors"
            if "internal error" in str(error):
                return "panicked", str(error)
        except MemoryError:
            return "too much memory", "MemoryError"
        except BaseException as error:
            kind = type(error).__name__
            return (
                "panicked" if "Panic" in kind else "other exceptions"
            ), f"{kind}: {error!s:.300}"
    taken = peak() - before
    if taken > 2 * size + ROOM:
        return "too much memory", f"{taken:,} bytes for files of {size:,}"
    return what, ""


def status(name: str) -> int:
    """A figure of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", text)[1])  # type: ignore[index]


def reset_peak() -> int:
    """What this process holds now, from which its peak is counted."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    return status("VmHWM")


def server(scratch: Path, pipe: Connection) -> None:
    """Attacks one sample after another, each in a copy that is then mended."""
    copies = Path(tempfile.mkdtemp(dir=scratch))
    for sample in SAMPLES:
        shutil.copytree(scratch / damage.MASTERS / sample.name, copies / sample.name)
        sample.read(copies / sample.name)  # what is imported and allocated once is no attack's
        if sample.store is not None:
            whence.verify(copies / sample.name / sample.store, progress=False)
    warnings.simplefilter("ignore")
    pipe.send("ready")
    while (seed := pipe.recv()) is not None:
        generator = np.random.default_rng(seed)
        sample = SAMPLES[int(generator.integers(len(SAMPLES)))]
        copy = copies / sample.name
        files = attack(copy, generator)
        what, how = outcome_of(sample, copy)
        pipe.send((what, f"input {seed}, {sample.name}, {files}: {how}"))
        shutil.rmtree(copy)
        shutil.copytree(scratch / damage.MASTERS / sample.name, copy)


class Attacked(damage.Reader):
    """A process that reads what was attacked."""

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=server, args=(self._scratch, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()


def run(count: int, seed: int) -> trial.Outcome:
    """As many inputs."""
    outcome = trial.Outcome("attack", *NEVER)
    with trial.scratch() as scratch:
        (scratch / damage.MASTERS).mkdir()
        for sample in SAMPLES:
            sample.make(scratch / damage.MASTERS / sample.name)
        waiting: SimpleQueue[int] = SimpleQueue()
        for number in range(count):
            waiting.put(seed * 10**9 + number)

        def work() -> None:
            process = Attacked(scratch)
            with suppress(Empty):
                while True:
                    asked = waiting.get_nowait()
                    what, how = process.read(asked)  # type: ignore[arg-type]
                    outcome.count("inputs")
                    if what in outcome.missed:
                        outcome.miss(what, how if "input" in how else f"input {asked}: {how}")
                    else:
                        outcome.count(what)
            process.close()

        with ThreadPoolExecutor(damage.READERS) as pool:
            for done in [pool.submit(work) for _ in range(damage.READERS)]:
                done.result()
    return outcome


if __name__ == "__main__":
    trial.main(run, short=300, full=20_000)
