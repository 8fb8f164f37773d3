"""What makes gradients into preconditioned rows, and what it gives to those that record them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from whence.gradients.coordinates import Coordinates
from whence.gradients.divided import Divided
from whence.sketch import Sketch

LAYOUT = "preconditioned"
"""What a manifest calls rows of coordinates."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """The map of one checkpoint, and what a store says of it.

    Attributes:
        name: Of the checkpoint.
        digest: Of the weights that it was fitted at.
        weight: Of the checkpoint in a combined score.
        map: To its rows.
        identity: What the map was made of and how, as JSON has it.
    """

    name: str
    digest: str
    weight: float
    map: Coordinates | Divided
    identity: dict[str, Any]


class Preconditioner(Protocol):
    """What makes gradients into preconditioned rows.

    `whence.fit_factors` returns one, and `whence.moments_of`.
    """

    def check(self, model: Mapping[str, Any], reduction: str) -> None:
        """Nothing, if it is of a model, as a manifest describes it, and of a loss of a reduction.

        Raises:
            MismatchError: If it is of others.
        """

    def prepared(
        self, dim: int | None, sketch: str | Sketch | None, seed: int | None, *, turned: bool
    ) -> tuple[list[Prepared], dict[str, Any]]:
        """The map of each checkpoint, and what a manifest says of them all.

        Args:
            dim: Width of a row; None for one that suits the data; 0 for coordinates as they are.
            sketch: A random map of the coordinates; None for the basis learnt from the data.
            seed: Of the random map.
            turned: Whether a learnt basis is turned, so that all columns hold alike much.

        Raises:
            ArgumentError: If it has no such rows.
        """


class FittedPreconditioner(Preconditioner, Protocol):
    """One that was fitted at the checkpoints of a run, by a loss: that of `whence.fit_factors`."""

    @property
    def model(self) -> dict[str, Any]:
        """Digest and parameters of the model, as a manifest has them."""

    @property
    def reduction(self) -> str:
        """How the loss combined its examples."""
