"""Curves as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from comparisons.shared import Curve

OURS = (("#c0392b", "-"), ("#e08e79", "--"))
OTHERS = ("#1f4e79", "#2e7d32", "#8e6c00", "#6a3d9a", "#455a64")
MARKERS = "osD^vP"
MISSED = 1.0005
"""A recall that no library has, so that 1 has a place on a logarithmic axis."""


def draw(curves: Sequence[Curve], folder: Path) -> None:
    """Writes each picture as SVG into a folder, under its name in lower case with hyphens.

    A picture of growth has rows and milliseconds, both logarithmic; one of accuracy bytes and the
    linear datamodeling score; any other recall and queries a second.
    """
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "whence"  # the same bytes for the same curves
    folder.mkdir(parents=True, exist_ok=True)
    for picture in dict.fromkeys(curve.picture for curve in curves):
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        ours, found = iter(OURS), []
        others = iter(zip(OTHERS, MARKERS[1:], strict=True))
        for curve in (each for each in curves if each.picture == picture):
            found += curve.points
            across, up = zip(*curve.points, strict=True)
            axis = axes.plot(across, up, label=curve.name, linewidth=1.6)[0]
            if curve.name.startswith("whence"):
                colour, dashes = next(ours)
                axis.set(color=colour, linestyle=dashes, marker=MARKERS[0])
            else:
                colour, marker = next(others)
                axis.set(color=colour, marker=marker)
        if picture.startswith("Accuracy"):
            axes.set_xscale("log")
            axes.set_xlabel("bytes an example")
            axes.set_ylabel("linear datamodeling score")
            axes.set_ylim(0)
        elif picture.startswith("growth"):
            axes.set_yscale("log")
            axes.set_xscale("log")
            axes.set_xlabel("rows of 512")
            axes.set_ylabel("milliseconds a query, one thread")
        else:
            axes.set_yscale("log")
            # What is missed counts: from 0.99 to 0.999 is as far as from 0.9 to 0.99.
            axes.set_xscale("function", functions=(_place, lambda at: MISSED - 10.0**-at))
            axes.set_xticks([0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999])
            axes.set_xlim(min(x for x, _ in found) - 0.01, 1.0001)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlabel("recall@10")
            axes.set_ylabel("queries a second, one thread")
        axes.set_title(picture)
        axes.grid(which="both", color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False)
        name = picture.lower().replace(",", "").replace(" ", "-")
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


def _place(recall: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where a recall is on its axis."""
    return -np.log10(np.maximum(MISSED - recall, 1e-9))
