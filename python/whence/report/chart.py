"""Drawings as inline SVG, coloured by the style sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from whence.errors import ArgumentError
from whence.report.safe import Html, join, tag

SERIES = 5
"""How many curves have a colour and a dash of their own."""

_WIDTH, _HEIGHT = 560, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 46


def bar(score: float, largest: float, *, both_ways: bool = True) -> Html:
    """A bar to the right for a positive score, to the left of the middle for a negative one.

    Args:
        score: What it stands for; the number stands beside it, so readers aloud skip the bar.
        largest: The size that takes all of the room.
        both_ways: False where no score can be negative: bars then start at the left edge.
    """
    middle = 50 if both_ways else 0
    size = min(abs(score) / largest, 1.0) * (100 - middle) if largest > 0 else 0.0
    return tag(
        "svg",
        tag("rect", class_="track", x=0, y=2, width=100, height=2),
        tag(
            "rect",
            class_="minus" if score < 0 else "plus",
            x=f"{middle - size if score < 0 else middle:.2f}",
            y=0,
            width=f"{size:.2f}",
            height=6,
        ),
        tag("rect", class_="middle", x=max(middle - 0.5, 0), y=0, width=1, height=6),
        class_="bar",
        viewBox="0 0 100 6",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def curves(
    series: Mapping[str, NDArray[np.float64]],
    *,
    title: str,
    across: str,
    up: str,
    until: float = 1.0,
    guide: float | None = None,
) -> Html:
    """Curves of a share against a share, with a list of what each line is.

    Args:
        series: Name -> [points] heights from 0 to 1, at equal steps from 0 to 1 across; at most
            `SERIES`.
        title: What the drawing shows, for those who cannot see it.
        across: What the horizontal axis is.
        up: What the vertical axis is.
        until: Where the horizontal axis ends, at most 1.
        guide: Where a vertical line stands.

    Raises:
        ArgumentError: If there are more series than lines that can be told apart.
    """
    if len(series) > SERIES:
        raise ArgumentError(f"series must be at most {SERIES} curves, got {len(series)}")
    lines = [
        tag("polyline", class_=f"curve series-{number}", points=_points(heights, until))
        for number, heights in enumerate(series.values())
    ]
    if guide is not None:
        lines.insert(0, _line("guide", guide / until, 0, guide / until, 1))
    drawing = tag(
        "svg",
        tag("title", title),
        *_grid(until),
        *lines,
        tag("text", across, x=_LEFT + _inner()[0] / 2, y=_HEIGHT - 8, text_anchor="middle"),
        tag(
            "text",
            up,
            text_anchor="middle",
            transform=f"translate(13 {_TOP + _inner()[1] / 2:g}) rotate(-90)",
        ),
        class_="chart",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
    )
    return join((drawing, _keys(list(series))))


def _keys(names: Sequence[str]) -> Html:
    return tag(
        "ul",
        *(
            tag(
                "li",
                tag(
                    "svg",
                    tag("path", class_=f"curve series-{number}", d="M0 5H34"),
                    viewBox="0 0 34 10",
                    aria_hidden="true",
                ),
                name,
            )
            for number, name in enumerate(names)
        ),
        class_="keys",
    )


def _grid(until: float) -> list[Html]:
    """Lines and numbers at every fifth of both axes."""
    drawn = []
    for fifth in range(6):
        share = fifth / 5
        x, y = _place(share, share)
        drawn += [
            _line("grid" if fifth else "axis", 0, share, 1, share),
            _line("grid" if fifth else "axis", share, 0, share, 1),
            tag("text", f"{share:.0%}", x=_LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"),
            tag(
                "text",
                f"{share * until:.0%}",
                x=f"{x:.1f}",
                y=_HEIGHT - _BOTTOM + 17,
                text_anchor="end" if fifth == 5 else "middle",
            ),
        ]
    return drawn


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Html:
    (left, top), (right, bottom) = _place(x1, y1), _place(x2, y2)
    return tag(
        "line",
        class_=kind,
        x1=f"{left:.1f}",
        y1=f"{top:.1f}",
        x2=f"{right:.1f}",
        y2=f"{bottom:.1f}",
    )


def _points(heights: NDArray[np.float64], until: float) -> str:
    across = np.linspace(0, 1, len(heights))
    seen = across <= until
    places = (_place(x / until, y) for x, y in zip(across[seen], heights[seen], strict=True))
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _place(across: float, up: float) -> tuple[float, float]:
    """Where a point of the unit square is drawn."""
    width, height = _inner()
    return _LEFT + across * width, _TOP + (1 - up) * height


def _inner() -> tuple[int, int]:
    return _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
