"""What a search returns: both ends of the ranking of each query."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whence._arrays import Ids
from whence._files import write_text
from whence._optional import imported
from whence._plain import cell
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
        return imported("pandas", "to_pandas", "pandas").DataFrame(self._table())

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        r"""Writes the table of `to_pandas` as CSV, in UTF-8; it needs no pandas.

        One line of names, then one per hit. A positive score is helpful: training on the example
        lowers the query's loss. A score that is read as float32 is the one that was written.

        Ids and columns of text are whatever was in the data set: in the file their tabs and line
        breaks are spaces, characters that are not seen are written out (`\u202e`), and an
        apostrophe stands before `=`, `+`, `-` and `@` where a spreadsheet would read a formula.
        Numbers stay numbers. The file appears whole or not at all.

        Args:
            path: The file to write.

        Returns:
            The path.

        Raises:
            OSError: If the file cannot be written.
        """
        path, table = Path(path), self._table()
        written = io.StringIO()
        rows = csv.writer(written, lineterminator="\n")
        rows.writerow(map(cell, table))
        for row in zip(*table.values(), strict=True):
            rows.writerow(cell(item) if isinstance(item, str) else str(item) for item in row)
        write_text(path, written.getvalue())
        return path

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
            OSError: If the page cannot be written.
        """
        if queries is not None and len(queries) != len(self):
            raise ShapeError(f"queries must be {len(self)} texts or images, got {len(queries)}")
        path = Path(path)
        self._drawn().page(self, path, show, queries, title)
        return path

    def _table(self) -> dict[str, NDArray[Any]]:
        """Name -> [hits] values: by query, helpful before harmful, by rank."""

        def joined(parts: Iterable[Any]) -> NDArray[Any]:
            return np.concatenate(list(parts), axis=1).reshape(-1)

        sides, queries = self.sides, len(self)
        positions = joined(side.positions for side in sides.values())
        table = {
            "query": np.repeat(np.arange(queries), len(positions) // max(queries, 1)),
            "side": joined(np.full(side.scores.shape, name) for name, side in sides.items()),
            "rank": joined(
                np.broadcast_to(np.arange(side.scores.shape[1]), side.scores.shape)
                for side in sides.values()
            ),
            "id": joined(side.ids for side in sides.values()),
            "score": joined(side.scores for side in sides.values()),
        }
        for name, values in self.columns.items():
            while name in table:
                name = f"column_{name}"
            table[name] = values[positions]
        return table

    def _drawn(self) -> Renderer:
        if self.renderer is None:
            raise WhenceError("hits need whence.report to be drawn: import whence first")
        return self.renderer
