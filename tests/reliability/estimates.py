"""`whence.estimate` before the demo's recording, beside the recording itself.

    python tests/reliability/estimates.py [--full] [--seed N]

Disk, RAM and the seconds of each stage are estimated in one fresh process and measured in another,
in turns; what is compared are the medians. RAM is the growth of the process's peak, once a first
recording has loaded the libraries. So is that of writing and searching many short rows, which the
demo has not. Seconds are compared with --full alone, which needs a machine with nothing else to do.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.functional import cross_entropy

sys.path.append(str(Path(__file__).parents[1]))

from filled import manifest

import whence
from whence import demo
from whence.gradients import Recorder
from whence.store import Checkpoint, Writer

WITHIN = 0.2
QUERIES = 10
SHORT_ROWS, SHORT_DIM = 300_000, 32
BATCH = 100  # examples that the demo records together
CHECKPOINTS = demo.EPOCHS // demo.EVERY
ROUNDS = 7  # with --full

# With these freed memory goes back to the system at once, so that the peak is of what is held.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def estimated(folder, seed):
    """What is foretold, by an untrained network and one batch."""
    digits = demo.flipped_digits(seed)
    images, labels = digits.pixels(digits.train), torch.from_numpy(digits.labels)
    truth = digits.truth[digits.train]
    model = demo.network()
    found = whence.estimate(
        model,
        CHECKPOINTS * demo.TRAIN,
        demo.DIM,
        checkpoints=CHECKPOINTS,
        closure=lambda x, y: cross_entropy(model(x), y),
        batch=(images[:BATCH], labels[:BATCH]),
        ids=digits.train[:BATCH],
        columns={"label": labels[:BATCH], "shows": truth[:BATCH]},
        queries=QUERIES,
        path=folder / "store",
        weight_gradients=False,
    )
    short = whence.estimate(
        torch.nn.Linear(8, 8), SHORT_ROWS, SHORT_DIM, ids=keys(0, 1), queries=QUERIES
    )
    return {
        "disk": found.disk,
        "RAM": found.ram,
        "RAM of writing": short["write"].ram,
        "RAM of searching": short["search"].ram,
        **{stage.name: stage.seconds for stage in found.stages},
        "text": str(found),
    }


def measured(folder, seed):
    """The demo's training and recording; then a search."""
    digits = demo.flipped_digits(seed)
    images, labels = digits.pixels(digits.train), torch.from_numpy(digits.labels)
    model = demo.network()

    def step(places):
        model.zero_grad()
        cross_entropy(model(images[places]), labels[places]).backward()

    batches = list(torch.arange(demo.TRAIN).split(BATCH))
    with patch.object(demo, "EPOCHS", demo.EVERY):  # loads what is loaded when it is first used
        demo.train_and_record(digits, folder / "first", seed)
    plain = seconds_of(lambda: [step(places) for _ in range(CHECKPOINTS) for places in batches])
    clock = {"recorder": 0.0, "writer": 0.0}
    # The losses of all digits at once are no part of recording, and hold more than it does.
    losses = patch.object(demo, "_losses", lambda *_: np.zeros(demo.TRAIN))
    with losses, timed(clock), peak() as grown:
        demo.train_and_record(digits, folder / "store", seed)
    queries = np.random.default_rng(0).standard_normal((CHECKPOINTS, QUERIES, demo.DIM), np.float32)
    searches = [
        seconds_of(lambda: whence.open(folder / "store").search(queries, k=10)) for _ in range(5)
    ]
    return {
        "disk": sum(file.stat().st_size for file in (folder / "store").rglob("*.*")),
        "RAM": grown(),
        "train": plain,
        "sketch": clock["recorder"] - clock["writer"] - plain,
        "write": clock["writer"],
        "search": median(searches),
    }


def keys(first, count):
    return np.array([f"document-{number:08}" for number in range(first, first + count)])


def held(folder, seed):
    """Disk and RAM of the demo's recording, and the RAM of many short rows."""
    demos = measured(folder, seed)
    step, path = 1000, folder / "short"
    rows = np.random.default_rng(seed).standard_normal((step, SHORT_DIM), np.float32)
    ids = [keys(first, step) for first in range(0, SHORT_ROWS, step)]
    writer = Writer(path, manifest(SHORT_DIM, "float16"))
    writer.set_checkpoint(Checkpoint("0"))
    with peak() as writing:
        for each in ids:
            writer.append(each, rows, {})
        writer.close()
    writing = writing()
    del writer
    with peak() as searching:
        whence.open(path).search(rows[:QUERIES], k=10)
    return {
        "disk": demos["disk"],
        "RAM": demos["RAM"],
        "RAM of writing": writing,
        "RAM of searching": searching(),
    }


def seconds_of(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def timed(clock):
    """Adds up the seconds in batches and checkpoints of a recorder, and in its writer."""
    inside = dict.fromkeys(clock, False)

    @contextmanager
    def running(name):
        if inside[name]:  # one method calls another
            yield
            return
        inside[name], began = True, time.perf_counter()
        try:
            yield
        finally:
            inside[name] = False
            clock[name] += time.perf_counter() - began

    def called(name, method):
        @wraps(method)
        def replaced(*args, **kwargs):
            with running(name):
                return method(*args, **kwargs)

        return replaced

    batch = Recorder.batch

    @contextmanager
    def recorded(*args, **kwargs):
        with running("recorder"), batch(*args, **kwargs) as found:
            yield found

    with (
        patch.object(Recorder, "batch", recorded),
        patch.object(Recorder, "checkpoint", called("recorder", Recorder.checkpoint)),
        patch.object(Recorder, "__exit__", called("recorder", Recorder.__exit__)),
        patch.object(Writer, "append", called("writer", Writer.append)),
        patch.object(Writer, "commit", called("writer", Writer.commit)),
        patch.object(Writer, "set_checkpoint", called("writer", Writer.set_checkpoint)),
    ):
        yield


@contextmanager
def peak():
    """The bytes by which the peak of this process grows; None where it cannot be set back."""
    status, back = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(name):
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines[name].split()[0])

    if not back.exists():
        yield lambda: None
        return
    back.write_text("5")
    before = kilobytes("VmRSS")
    yield lambda: 1024 * (kilobytes("VmHWM") - before)


def in_a_process(function, seed, environment=None):
    """What one of the functions above finds in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, "--child", function.__name__, folder, "--seed", str(seed)],
            env=os.environ | (environment or {}),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def run(rounds, seed=0):
    """Name -> (estimated, measured), and the estimate's own text.

    Args:
        rounds: How often seconds are measured, of which medians are taken; 0 for not at all.
        seed: Of the demo.
    """
    foretold, found = [in_a_process(estimated, seed)], [in_a_process(held, seed, MALLOC)]
    text = foretold[0]["text"]
    for _ in range(rounds):
        foretold.append(in_a_process(estimated, seed))
        found.append(in_a_process(measured, seed) | found[0])
    names = [name for name, value in found[-1].items() if value is not None]
    rounds_of = slice(1, None) if rounds else slice(None)
    return {
        name: tuple(median(each[name] for each in side[rounds_of]) for side in (foretold, found))
        for name in names
    }, text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="seconds too")
    parser.add_argument("--seed", type=int, default=0, help="of the demo (%(default)s)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        function, folder = asked.child
        torch.set_num_threads(1)  # as the demo does
        print(json.dumps(globals()[function](Path(folder), asked.seed)))
        return
    pairs, text = run(ROUNDS if asked.full else 0, asked.seed)
    print(text)
    for name, (foretold, found) in pairs.items():
        unit, word = (2**20, "MiB") if name == "disk" or name.startswith("RAM") else (1, "s")
        print(
            f"{name:<17}{foretold / unit:9.3f} {word:<4}estimated, {found / unit:9.3f} measured: "
            f"{foretold / found:.2f}"
        )
    worst = max(abs(foretold / found - 1) for foretold, found in pairs.values())
    reached = worst <= WITHIN
    print(
        f"estimates: {', '.join(pairs)} within {worst:.1%} of what was measured, at most "
        f"{WITHIN:.0%} - {'reached' if reached else 'MISSED'}"
    )
    sys.exit(not reached)


if __name__ == "__main__":
    main()
