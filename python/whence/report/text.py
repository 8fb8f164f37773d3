"""Hits for a terminal."""

from __future__ import annotations

import unicodedata

from whence._plain import counted, line
from whence.report.safe import signed, value
from whence.search import Hits, Side

QUERIES_SHOWN = 10
"""The most queries that text and notebook fragment show; `to_html` and `to_pandas` have all."""

RANKS_SHOWN = 10
"""The most ranks that text and notebook fragment show of each query."""

_CELL = 32  # characters; an id or label can be a whole sentence


def text(hits: Hits) -> str:
    """A table for each query, below lines that say what sign, method and unit are.

    One line per rank, helpful beside harmful. ASCII but for ids and columns; no control characters.
    """
    shown = counted(hits.width, "example", "examples")
    ends = "at each end" if len(hits.sides) > 1 else f"at the {next(iter(hits.sides))} end"
    lines = [
        f"{counted(len(hits), 'query', 'queries')}, {shown} {ends}",
        f"sign    {hits.sign}",
        f"method  {line(hits.method)}",
        f"unit    {line(hits.unit)}",
        f"search  {hits.certainty}",
    ]
    for query in range(min(len(hits), QUERIES_SHOWN)):
        lines += ["", f"query {query}, of {hits.eligible[query]:,} eligible examples"]
        lines += aligned(_rows(hits, query))
    lines += left_out(hits)
    return "\n".join(lines)


def left_out(hits: Hits) -> list[str]:
    """What the short forms do not show, in words; nothing if they show all."""
    queries = len(hits) - QUERIES_SHOWN
    ranks = hits.width - RANKS_SHOWN
    lines = []
    if ranks > 0:
        lines.append(f"and {counted(ranks, 'more rank', 'more ranks')} of each query")
    if queries > 0:
        lines.append(f"and {counted(queries, 'more query', 'more queries')}")
    return lines


def aligned(rows: list[list[str]]) -> list[str]:
    """The rows as lines with columns one below the other; numbers to the right."""
    widths = [max(map(_cells, column)) for column in zip(*rows, strict=True)]
    numeric = [all(_is_number(cell) for cell in column) for column in zip(*rows[1:], strict=True)]
    lines = []
    for row in rows:
        cells = []
        for cell, width, right in zip(row, widths, numeric, strict=True):
            gap = " " * (width - _cells(cell))
            cells.append(gap + cell if right else cell + gap)
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _rows(hits: Hits, query: int) -> list[list[str]]:
    names = [line(name, _CELL) for name in hits.columns]
    rows = [["rank"]]
    for name in hits.sides:
        rows[0] += [name, "score", *names]
    for rank in range(min(hits.width, RANKS_SHOWN)):
        cells = [str(rank)]
        for side in hits.sides.values():
            cells += _cell(hits, side, query, rank)
        rows.append(cells)
    return rows


def _cell(hits: Hits, side: Side, query: int, rank: int) -> list[str]:
    position = side.positions[query, rank]
    return [
        line(value(side.ids[query, rank]), _CELL),
        signed(float(side.scores[query, rank])),
        *(line(value(column[position]), _CELL) for column in hits.columns.values()),
    ]


def _cells(text: str) -> int:
    """How many cells of a terminal the text takes: wide ones two, accents and joiners none."""
    return sum(
        0
        if unicodedata.category(letter) in ("Mn", "Me", "Cf")
        else 2
        if unicodedata.east_asian_width(letter) in "WF"
        else 1
        for letter in text
    )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
