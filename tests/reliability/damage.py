"""Damaged files: an error that names the file, or the answers of the files as they were.

Single bytes are flipped, files cut short, and whole files lost, emptied, exchanged or replaced, in
every kind of file. After each, all that is in the files is read by a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
import trial
from samples import SAMPLES, Sample, digest, examples

import whence
from whence.errors import MissingWritersWarning, StoreError, WhenceError

HANG = 10.0
"""Seconds after which a reader hangs."""

READERS = 2

PAGE = 4096

MASTERS = "masters"
"""The folder of samples as they were made."""

NEVER = (
    "crashed",
    "hung",
    "panicked",
    "silent",
    "other exceptions",
    "unnamed",
    "unverified",
    "wrongly mended",
)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a sample.

    Attributes:
        sample: The sample's name.
        kind: The name of a function below.
        file: The file it is done to.
        other: Another file that it is done with.
        at: A byte of the file.
        value: That is put there.
    """

    sample: str
    kind: str
    file: str
    other: str = ""
    at: int = 0
    value: int = 0

    def __str__(self) -> str:
        other = f" and {self.other}" if self.other else ""
        return f"{self.kind} of {self.sample}/{self.file}{other} at {self.at}, {self.value}"


# Single bytes, and truncations


def flip(file: Path, _: Path, fault: Fault) -> None:
    content = bytearray(file.read_bytes())
    content[fault.at] = fault.value
    file.write_bytes(content)


def truncate(file: Path, _: Path, fault: Fault) -> None:
    os.truncate(file, fault.at)


# Structure


def remove(file: Path, _: Path, fault: Fault) -> None:
    file.unlink()


def empty(file: Path, _: Path, fault: Fault) -> None:
    os.truncate(file, 0)


def append(file: Path, _: Path, fault: Fault) -> None:
    with file.open("ab") as opened:
        opened.write(bytes([fault.value]) * (1 + fault.at))


def zero_a_page(file: Path, _: Path, fault: Fault) -> None:
    content = bytearray(file.read_bytes())
    first = fault.at // PAGE * PAGE
    content[first : first + PAGE] = bytes(len(content[first : first + PAGE]))
    file.write_bytes(content)


def replace(file: Path, other: Path, fault: Fault) -> None:
    shutil.copyfile(other, file)


def exchange(file: Path, other: Path, fault: Fault) -> None:
    between = file.with_name("between")
    file.rename(between)
    other.rename(file)
    between.rename(other)


def exchange_folders(file: Path, other: Path, fault: Fault) -> None:
    exchange(file.parent, other.parent, fault)


def remove_folder(file: Path, _: Path, fault: Fault) -> None:
    shutil.rmtree(file.parent)


def duplicate_folder(file: Path, _: Path, fault: Fault) -> None:
    folder = file.parent
    name = re.sub(r"\d{8}$", lambda number: f"{int(number[0]) + 77:08}", folder.name)
    shutil.copytree(folder, folder.with_name(name if name != folder.name else f"{name} copy"))


def make_a_folder(file: Path, _: Path, fault: Fault) -> None:
    file.unlink()
    file.mkdir()


def make_a_link(file: Path, _: Path, fault: Fault) -> None:
    kept = file.with_name("kept")
    file.rename(kept)
    file.symlink_to(kept)


def make_a_pipe(file: Path, _: Path, fault: Fault) -> None:
    file.unlink()
    os.mkfifo(file)


STRUCTURAL = (
    remove,
    empty,
    append,
    zero_a_page,
    replace,
    exchange,
    exchange_folders,
    remove_folder,
    duplicate_folder,
    make_a_folder,
    make_a_link,
    make_a_pipe,
)

FAULTS: dict[str, Callable[[Path, Path, Fault], None]] = {
    each.__name__: each for each in (flip, truncate, *STRUCTURAL)
}


# What becomes of it


def outcome_of(fault: Fault, sample: Sample, folder: Path, sound: Sound) -> tuple[str, str]:
    """One of `NEVER`, or what else became of a fault; and how."""
    try:
        found = digest(sample.read(folder))
        what = "same answers"
    except (WhenceError, MissingWritersWarning) as error:
        what, text = "errors", str(error)
        if "internal error" in text:
            return "panicked", text
        if not any(name in text for name in named(fault)):
            return "unnamed", text
    except BaseException as error:
        kind = type(error).__name__
        return ("panicked" if "Panic" in kind else "other exceptions"), f"{kind}: {error}"
    if what == "same answers" and found != sound.answers:
        return "silent", "another answer"
    if sample.store is None or not is_committed(fault, sample, folder):
        return what, ""
    try:
        verification = whence.verify(folder / sample.store)
        if verification.is_sound and not verification.missing_writers:
            return "unverified", f"{what}, and verify finds nothing"
    except StoreError:
        pass
    except BaseException as error:
        return "other exceptions", f"of verify: {type(error).__name__}: {error}"
    try:
        wrong = wrongly_mended(folder / sample.store, sound.examples)
    except BaseException as error:
        wrong = f"{type(error).__name__}: {error}"
    return ("wrongly mended", wrong) if wrong else (what, "")


def wrongly_mended(path: Path, before: dict[tuple[str, object], str]) -> str:
    """What is wrong after `repair`: of rows it left, or of those it says are lost; "" if nothing.

    Args:
        path: The store.
        before: The examples that were there.
    """
    try:
        done = whence.repair(path)
    except StoreError:
        return ""  # it says that it cannot
    verification = whence.verify(path)
    if not verification.is_sound and not done.unmended:
        return f"it is not sound: {verification}"
    with suppress(MissingWritersWarning):
        left = examples(path)
        lost = before.keys() - left.keys()
        if left.keys() - before.keys():
            return f"{len(left.keys() - before.keys())} rows are there that were not"
        if any(before[key] != value for key, value in left.items()):
            return "a row that is left is another"
        if set(done.lost) - lost or len(lost) != len(set(done.lost)) + done.unnamed:
            return f"{len(lost)} rows are lost, and {len(done.lost)} + {done.unnamed} said to be"
    return ""


@dataclass(frozen=True)
class Sound:
    """What is read of an undamaged sample.

    Attributes:
        answers: A digest of all.
        examples: Of a store's rows.
    """

    answers: str
    examples: dict[tuple[str, object], str]


def named(fault: Fault) -> set[str]:
    """Words one of which an error must have."""
    names = {Path(name).name for name in (fault.file, fault.other) if name}
    alone = {"manifest.json", "factors.json"}  # of an index or factors, which have only that one
    of_writers = "writer-" in f"{fault.file} {fault.other}"  # a manifest of another's folder
    if "folder" in fault.kind or names & alone or of_writers:
        names |= {Path(name).parent.name for name in (fault.file, fault.other) if name}
        names |= {"writers " + name.split("-")[1] + "/" for name in names if "writer-" in name}
    return names


def is_committed(fault: Fault, sample: Sample, folder: Path) -> bool:
    """Whether the fault is one of bytes that a commit has confirmed.

    The manifest before the newest is kept for `repair` alone: a store without it is whole.
    """
    if fault.kind == "duplicate_folder":
        return False
    file = folder / fault.file
    manifests = file.parent.glob("manifest-*.json")
    if fault.kind == "remove" and file.name.startswith("manifest-"):
        return all(other.name < file.name for other in manifests)
    return any(
        name
        and Path(name).is_relative_to(sample.store)
        and not Path(name).name.startswith(("lock", "committed-"))
        for name in (fault.file, fault.other if fault.kind.startswith("exchange") else "")
    )


def kind_of(fault: Fault) -> str:
    """Of three."""
    return {"flip": "flips", "truncate": "truncations"}.get(fault.kind, "structural")


def reader(scratch: Path, pipe: Connection) -> None:
    """Reads one damaged sample after another, each in a copy that is then mended."""
    copies = Path(tempfile.mkdtemp(dir=scratch))
    shutil.copytree(scratch / MASTERS, copies, dirs_exist_ok=True)
    samples = {sample.name: sample for sample in SAMPLES}
    sound = {
        name: Sound(
            digest(sample.read(copies / name)),
            examples(copies / name / sample.store) if sample.store else {},
        )
        for name, sample in samples.items()
    }
    warnings.simplefilter("error", MissingWritersWarning)
    pipe.send("ready")
    while (fault := pipe.recv()) is not None:
        sample = samples[fault.sample]
        copy, master = copies / sample.name, scratch / MASTERS / sample.name
        FAULTS[fault.kind](copy / fault.file, copy / fault.other, fault)
        pipe.send(outcome_of(fault, sample, copy, sound[sample.name]))
        shutil.rmtree(copy)
        shutil.copytree(master, copy)


class Reader:
    """A process that reads, and is replaced when it dies or hangs."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._begin()

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=reader, args=(self._scratch, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def read(self, fault: Fault) -> tuple[str, str]:
        """See `outcome_of`."""
        try:
            self._pipe.send(fault)
            if self._pipe.poll(HANG):
                return self._pipe.recv()
            found = "hung", f"for {HANG} s"
        except (EOFError, OSError):
            self._process.join()
            found = "crashed", f"exit status {self._process.exitcode}"
        self._process.kill()
        self._process.join()
        self._begin()
        return found

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


# Which faults


def faults(masters: Path, count: int, generator: np.random.Generator) -> list[Fault]:
    """As many, nine in ten of them flips; of every kind of file in turn."""
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for sample in SAMPLES:
        for path in sorted((masters / sample.name).rglob("*")):
            if path.is_file():
                name = path.relative_to(masters / sample.name).as_posix()
                kinds[sample.name, re.sub(r"\d{8}", "#", name)].append(name)
    files = list(kinds.items())
    trial.say(f"damage: {len(files)} kinds of files")

    def draw(number: int, kind: str) -> Fault | None:
        (sample, _), names = files[number % len(files)]
        name = str(generator.choice(names))
        return drawn(masters / sample, sample, kind, name, generator)

    found: list[Fault] = []
    for kind, wanted in (("flip", count * 9 // 10), ("truncate", count // 20)):
        found += filled(lambda number, kind=kind: draw(number, kind), wanted, generator)
    found += filled(
        lambda number: draw(
            number // len(STRUCTURAL), STRUCTURAL[number % len(STRUCTURAL)].__name__
        ),
        count - len(found),
        generator,
    )
    return found


def filled(
    draw: Callable[[int], Fault | None], count: int, generator: np.random.Generator
) -> Iterator[Fault]:
    """Draws by number from a random one on, until there are so many."""
    number = int(generator.integers(2**31))
    while count:
        fault = draw(number)
        number += 1
        if fault is not None:
            count -= 1
            yield fault


def drawn(
    folder: Path, sample: str, kind: str, name: str, generator: np.random.Generator
) -> Fault | None:
    """A fault of a kind in a file; None where it would change nothing."""
    content = (folder / name).read_bytes()
    length = len(content)
    others = [
        path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()
    ]
    inside = "/" in name
    if "folder" in kind and kind != "make_a_folder" and not inside:
        return None
    if kind in ("flip", "truncate", "empty", "zero_a_page") and not length:
        return None
    at = place(length, generator) if length else 0
    if kind == "flip":
        bit = content[at] ^ 1 << int(generator.integers(8))
        byte = (content[at] + int(generator.integers(1, 256))) % 256
        return Fault(sample, kind, name, at=at, value=int(generator.choice([bit, byte])))
    if kind == "append":
        return Fault(sample, kind, name, at=int(generator.choice([0, 63, 4095])), value=at % 3)
    if kind == "zero_a_page":
        first = at // PAGE * PAGE
        return Fault(sample, kind, name, at=at) if any(content[first : first + PAGE]) else None
    if kind in ("replace", "exchange"):
        same = [other for other in others if Path(other).name == Path(name).name != other]
        other = str(generator.choice(same if same and generator.random() < 0.7 else others))
        if (folder / other).read_bytes() == content:
            return None
        return Fault(sample, kind, name, other)
    if kind == "exchange_folders":
        beside = [
            other
            for other in others
            if Path(other).name == Path(name).name
            and Path(other).parent.parent == Path(name).parent.parent
            and Path(other).parent != Path(name).parent
        ]
        return Fault(sample, kind, name, str(generator.choice(beside))) if beside else None
    return Fault(sample, kind, name, at=at)


def place(length: int, generator: np.random.Generator) -> int:
    """A byte of a file: in the header, at the end or anywhere."""
    where = generator.random()
    if where < 0.3:
        return int(generator.integers(min(length, 128)))
    if where < 0.4:
        return int(generator.integers(max(0, length - 16), length))
    return int(generator.integers(length))


def run(count: int, seed: int) -> trial.Outcome:
    """As many faults."""
    outcome = trial.Outcome("damage", *NEVER)
    with trial.scratch() as scratch:
        (scratch / MASTERS).mkdir()
        for sample in SAMPLES:
            sample.make(scratch / MASTERS / sample.name)
        drawn_faults = faults(scratch / MASTERS, count, np.random.default_rng(seed))
        waiting: SimpleQueue[Fault] = SimpleQueue()
        for fault in drawn_faults:
            waiting.put(fault)

        def work() -> None:
            process = Reader(scratch)
            with suppress(Empty):
                while True:
                    fault = waiting.get_nowait()
                    what, how = process.read(fault)
                    if what == "hung":  # or the machine stood still: that does not happen twice
                        outcome.count("tried again after 10 s")
                        what, how = process.read(fault)
                    outcome.count(kind_of(fault))
                    if what in outcome.missed:
                        outcome.miss(what, f"{fault}: {how}")
                    else:
                        outcome.count(what)
            process.close()

        with ThreadPoolExecutor(READERS) as pool:
            for done in [pool.submit(work) for _ in range(READERS)]:
                done.result()
    return outcome


if __name__ == "__main__":
    trial.main(run, short=400, full=10_000)
