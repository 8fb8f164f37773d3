"""`whence.estimate` before the demo's recording, beside the recording itself.

Disk, RAM and the seconds of each stage are estimated in one fresh process and measured in another,
in turns; what is compared are the medians. RAM is the growth of the process's peak, once a first
recording has loaded the libraries. So is that of writing and searching many short rows, which the
demo has not. Seconds are compared with --full alone, in so many rounds, which needs a machine with
nothing else to do.
"""

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
import trial  # which finds filled.py
from filled import manifest
from torch.nn.functional import cross_entropy

import whence
from whence import demo
from whence.gradients import Recorder
from whence.store import Checkpoint, Writer

WITHIN = 0.2
MISS = f"off by more than {WITHIN:.0%}"
QUERIES = 10
SHORT_ROWS, SHORT_DIM = 300_000, 32
BATCH = 100  # examples that the demo records together
CHECKPOINTS = demo.EPOCHS // demo.EVERY

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
            [sys.executable, __file__, function.__name__, folder, str(seed)],
            env=os.environ | (environment or {}),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def run(rounds, seed):
    """Compares disk and RAM, and with rounds the medians of seconds too."""
    outcome = trial.Outcome("estimates", MISS)
    foretold, found = [in_a_process(estimated, seed)], [in_a_process(held, seed, MALLOC)]
    trial.say(foretold[0]["text"])
    for _ in range(rounds):
        foretold.append(in_a_process(estimated, seed))
        found.append(in_a_process(measured, seed) | found[0])
    of = slice(1, None) if rounds else slice(None)
    for name in found[-1]:
        if found[-1][name] is None:
            continue
        guess, value = (median(each[name] for each in side[of]) for side in (foretold, found))
        unit, word = (2**20, "MiB") if name == "disk" or name.startswith("RAM") else (1, "s")
        text = (
            f"{name:<17}{guess / unit:9.3f} {word:<4}estimated, {value / unit:9.3f} measured: "
            f"{guess / value:.2f}"
        )
        trial.say(text)
        outcome.count(f"of {name} {guess / value:.2f}")
        if abs(guess / value - 1) > WITHIN:
            outcome.miss(MISS, text)
    return outcome


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("estimated", "measured", "held"):
        torch.set_num_threads(1)  # as the demo does
        trial.say(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        trial.main(run, short=0, full=7)
