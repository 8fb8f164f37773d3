"""Hits as text, notebook tables and pages that stand alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whence.report import html
from whence.report import text as terminal
from whence.search import Hits, Show


class HitsRenderer:
    """Draws hits; see `whence.search.Renderer`."""

    def text(self, hits: Hits) -> str:
        """For a terminal."""
        return terminal.text(hits)

    def fragment(self, hits: Hits) -> str:
        """HTML for a notebook."""
        return html.fragment(hits)

    def page(
        self,
        hits: Hits,
        path: Path,
        show: Show | None,
        queries: Sequence[Any] | None,
        title: str,
    ) -> None:
        """Writes a page that stands alone.

        Raises:
            DtypeError: If something shown is neither text nor an image.
            OSError: If the file cannot be written.
        """
        html.write_page(path, hits, title=title, show=show, queries=queries)


# The search module lies below this one and cannot import it.
Hits.renderer = HitsRenderer()

__all__ = ["HitsRenderer"]
