"""Times whence beside its peers, in one run, after checking that they give the same answer.

    python benches/compare.py record
    python benches/compare.py search --json search.json --pictures docs/pictures
    python benches/compare.py sketch
    python benches/compare.py attribution
    python benches/compare.py store

All on one thread, unless a row says otherwise. Ours and the peers take turns, A B A B, so that a
machine that slows down for a while slows down all; a row is the median of each, and their ratio,
ours ÷ peer. Peers that are not installed are skipped; `pip install -e ".[bench]"` installs them.
"""

from __future__ import annotations

import os

# Read once, when a library is loaded: so before the imports that load one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["TQDM_DISABLE"] = "1"  # the peers' progress bars would stand between our lines

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from comparisons import (
    attribution,  # noqa: F401 (each registers itself)
    pictures,
    record,  # noqa: F401
    search,  # noqa: F401
    sketch,  # noqa: F401
    store,  # noqa: F401
)
from comparisons.shared import BENCHES, Curve, Row


def table(rows: Sequence[Row]) -> str:
    """Rows for a terminal, one a line and its spread below it."""
    lines = []
    for row in rows:
        ratio = "" if row.ratio is None else _figure(row.ratio, 3)
        other = "none" if row.peer is None else _figure(row.peer, 4)
        goal = ""
        if row.goal is not None:
            sign = "<=" if row.lower_is_better else ">="
            what = "" if row.measure == "ratio" else f"{row.measure} "
            goal = f"goal {what}{sign} {row.goal:g}: {'met' if row.met else 'NOT MET'}"
        lines.append(f"{row.name}")
        lines.append(f"    {ratio:>7}  {_figure(row.ours, 4)} ÷ {other} {row.unit}  {goal}")
        if row.spread:
            lines.append(f"             {row.spread}")
    return "\n".join(lines)


def _figure(value: float, digits: int) -> str:
    """A number to so many digits, and whole from a thousand on, without powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:#.{digits}g}".rstrip(".")


def write_table(path: Path, name: str, rows: Sequence[Row]) -> None:
    """Puts the rows of a bench, as a Markdown table, between its marks in a README."""
    marks = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    text = path.read_text(encoding="utf-8")
    before, mark, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (mark and end):
        sys.exit(f"{path} must hold {marks[0].strip()} and {marks[1]}, got a file without them")
    lines = ["| what | ours | peer | ratio | goal |", "|---|---|---|---|---|"]
    for row in rows:
        ours = f"{_figure(row.ours, 3)} {row.unit}"
        other = "–" if row.peer is None else f"{_figure(row.peer, 3)} {row.unit}"
        ratio = "–" if row.ratio is None else _figure(row.ratio, 3)
        goal = "–"
        if row.goal is not None:
            sign = "≤" if row.lower_is_better else "≥"
            what = "" if row.measure == "ratio" else f"{row.measure} "
            goal = f"{what}{sign} {row.goal:,g}, {'met' if row.met else '**missed**'}"
        lines.append(f"| {row.name} | {ours} | {other} | {ratio} | {goal} |")
    table = "\n".join(lines)
    path.write_text(f"{before}{mark}{table}\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[*BENCHES, "all"], help="what to compare")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--readme", type=Path, help="also write tables of them into this file")
    parser.add_argument("--pictures", type=Path, help="also draw curves into this folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[Row]] = {}
    curves: list[Curve] = []
    for name in BENCHES if options.name == "all" else [options.name]:
        with tempfile.TemporaryDirectory() as folder:
            for row in BENCHES[name](Path(folder)):
                if isinstance(row, Curve):
                    curves.append(row)
                    continue
                print(table([row]), flush=True)
                rows.setdefault(name, []).append(row)
        if options.readme:
            write_table(options.readme, name, rows[name])
    if options.json:
        found = [
            row.as_json() for row in [*(row for each in rows.values() for row in each), *curves]
        ]
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.pictures:
        pictures.draw(curves, options.pictures)


if __name__ == "__main__":
    main()
