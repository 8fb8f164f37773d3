"""Progress of long work on a store, on a terminal's standard error."""

from __future__ import annotations

import sys
from typing import Any

from whence.errors import DtypeError


def bar(what: str, total: int, progress: bool | None) -> Any:
    """A bar of bytes.

    Args:
        what: Is done.
        total: Bytes.
        progress: Whether to show it; None means if standard error is a terminal.

    Raises:
        DtypeError: If `progress` is something else.
    """
    from tqdm.auto import tqdm  # which takes longer to import than all of whence

    if progress is not None and not isinstance(progress, bool):
        raise DtypeError(f"progress must be a bool or None, got {progress!r:.80}")
    off = None if progress is None else not progress
    return tqdm(total=total, desc=what, file=sys.stderr, disable=off, unit="B", unit_scale=True)
