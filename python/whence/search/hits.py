"""What a search returns: both ends of the ranking of each query."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whence._arrays import Ids
from whence._optional import imported
from whence.errors import ShapeError, WhenceError

if TYPE_CHECKING:
    import pandas

SIGN = "positive = helpful: training on the example lowers the query's loss"
"""What the sign of every score means."""

METHOD = "gradient product (TracIn), the weak baseline: no curvature, no preconditioning"
"""The method of a plain search."""

COSINE = "cosine of both gradients, whatever their lengths, summed over checkpoints"
"""The unit of a score of normalized rows."""

Show: TypeAlias = Callable[[Any], Any]
"""id -> text, or a uint8 image of [height, width] or [height, width, 3]."""


@dataclass(frozen=True, eq=False)
class Side:
    """One end of the ranking.

    Attributes:
        ids: [queries, width] ids, the most extreme first.
        scores: [queries, width] float32.
        positions: [queries, width] numbers of the examples in the store.
    """

    ids: Ids
    scores: NDArray[np.float32]
    positions: NDArray[np.int64]


class Renderer(Protocol):
    """What draws hits; the report module provides it."""

    def text(self, hits: Hits) -> str:
        """For a terminal."""

    def fragment(self, hits: Hits) -> str:
        """HTML for a notebook."""

    def page(
        self,
        hits: Hits,
        path: Path,
        show: Show | None,
        queries: Sequence[Any] | None,
        title: str,
    ) -> None:
        """Writes a page that stands alone."""


@dataclass(frozen=True, eq=False)
class Hits:
    """The most helpful and the most harmful training examples of each query.

    The width of both sides is min(k, fewest examples eligible for any query); they are never
    padded. A side that was not asked for has width 0.

    Attributes:
        helpful: The largest scores, largest first; of equal scores the earlier example first.
        harmful: The smallest scores, whatever their sign, smallest first.
        eligible: [queries] how many examples each query could have returned.
        method: How scores were computed.
        unit: What a score of 1 means.
        columns: What was stored beside the rows, [examples] each.
        exact: [queries] whether the answer is proven to be that of a scan of all examples.
        margins: [queries, 2] of an approximate answer, for either side: by how much its last
            score is better than the best estimate among the examples that were not scored;
            negative where one of those promised more. None for exact answers.
        clusters: Into how many the examples were cut, for an answer that is a mixture over them,
            and so not that of a scan; None for a plain answer.
    """

    helpful: Side
    harmful: Side
    eligible: NDArray[np.int64]
    method: str
    unit: str
    columns: Mapping[str, NDArray[Any]] = field(repr=False)
    exact: NDArray[np.bool_] = field(repr=False)
    margins: NDArray[np.float32] | None = field(default=None, repr=False)
    clusters: int | None = None

    sign: ClassVar[str] = SIGN
    renderer: ClassVar[Renderer | None] = None

    def __len__(self) -> int:
        return len(self.eligible)

    def __getstate__(self) -> dict[str, Any]:
        # The columns of a store are read from it, and it is not there for who unpickles.
        return {**self.__dict__, "columns": dict(self.columns)}

    @property
    def sides(self) -> dict[str, Side]:
        """The sides that were asked for, by name, helpful first."""
        both = {"helpful": self.helpful, "harmful": self.harmful}
        return {name: side for name, side in both.items() if side.scores.shape[1]}

    @property
    def width(self) -> int:
        """How many hits a side has for each query."""
        return max(int(self.helpful.scores.shape[1]), int(self.harmful.scores.shape[1]))

    @property
    def certainty(self) -> str:
        """Whether the hits are those of a scan of all examples, in words."""
        if self.clusters is not None:
            wide = replace(self, clusters=None).certainty
            return f"a mixture over {self.clusters} clusters of more hits, which are {wide}"
        if self.margins is None:
            return "exact: the hits of a scan of all examples"
        clear = self.margins[:, [side in self.sides for side in ("helpful", "harmful")]]
        share = float((clear >= 0).mean())
        return (
            "approximate: chosen by estimates and then scored exactly; "
            f"{share:.0%} of the ends are clear of every other estimate"
        )

    def __str__(self) -> str:
        return self._drawn().text(self)

    def _repr_html_(self) -> str:
        return self._drawn().fragment(self)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per hit: query, side, rank (from 0), id, score, and the stored columns.

        Raises:
            MissingDependencyError: If pandas is not installed.
        """
        pandas = imported("pandas", "to_pandas", "pandas")
        frames = []
        for name, side in self.sides.items():
            queries, width = side.scores.shape
            positions = side.positions.reshape(-1)
            frames.append(
                pandas.DataFrame(
                    {
                        "query": np.repeat(np.arange(queries), width),
                        "side": name,
                        "rank": np.tile(np.arange(width), queries),
                        "id": side.ids.reshape(-1),
                        "score": side.scores.reshape(-1),
                        **{
                            column if column not in _TAKEN else f"column_{column}": values[
                                positions
                            ]
                            for column, values in self.columns.items()
                        },
                    }
                )
            )
        table = pandas.concat(frames, ignore_index=True)
        return table.sort_values(
            ["query", "side", "rank"], ascending=[True, False, True], ignore_index=True
        )

    def to_html(
        self,
        path: str | os.PathLike[str],
        show: Show | None = None,
        *,
        queries: Sequence[Any] | None = None,
        title: str = "Which training examples made the model do this?",
    ) -> Path:
        """Writes a page that stands alone: no script from elsewhere, no network, opens offline.

        Args:
            path: The file to write.
            show: id -> text, or a uint8 image of [height, width] or [height, width, 3].
            queries: What to show for each query: texts or images.
            title: Heading of the page.

        Returns:
            The path.

        Raises:
            ShapeError: If there are not as many `queries` as queries.
            DtypeError: If something shown is neither text nor an image.
        """
        if queries is not None and len(queries) != len(self):
            raise ShapeError(f"queries must be {len(self)} texts or images, got {len(queries)}")
        path = Path(path)
        self._drawn().page(self, path, show, queries, title)
        return path

    def _drawn(self) -> Renderer:
        if self.renderer is None:
            raise WhenceError("hits need whence.report to be drawn: import whence first")
        return self.renderer


_TAKEN = ("query", "side", "rank", "id", "score")
