"""Progress of long work, on a terminal's standard error: one rule for all of whence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from whence._plain import line
from whence.errors import DtypeError


def bar(what: str, total: int, progress: bool | None, unit: str = "B") -> Any:
    """A bar that is moved on by its `update`.

    Args:
        what: Is done.
        total: Of units.
        progress: Whether to show it; None means if standard error is a terminal.
        unit: Of what is counted; bytes.

    Raises:
        DtypeError: If `progress` is something else.
    """
    return _bar(progress, total=total, desc=line(what), unit=unit, unit_scale=True)


def watched(
    items: Iterable[Any], what: str, progress: bool | None, unit: str, *, leave: bool = True
) -> Iterable[Any]:
    """The items, with a bar that says how many are done.

    Args:
        items: Whatever is gone through.
        what: Is done.
        progress: Whether to show the bar; None means if standard error is a terminal.
        unit: Of what is counted.
        leave: Whether the bar stays when it is full.

    Raises:
        DtypeError: If `progress` is something else.
    """
    found: Iterable[Any] = _bar(progress, items, desc=line(what), unit=unit, leave=leave)
    return found


def say(text: Callable[[], str], progress: bool | None) -> None:
    """Writes a text where bars are shown; it is made only there."""
    if checked(progress) or (progress is None and getattr(sys.stderr, "isatty", bool)()):
        from tqdm.auto import tqdm  # which takes longer to import than all of whence

        tqdm.write(text(), file=sys.stderr)


def checked(progress: Any) -> bool | None:
    """`progress`, if it is what it can be.

    Raises:
        DtypeError: If it is something else.
    """
    if progress is None:
        return None
    if not isinstance(progress, (bool, np.bool_)):
        raise DtypeError(f"progress must be a bool or None, got {progress!r:.80}")
    return bool(progress)


def _bar(progress: bool | None, *items: Iterable[Any], **options: Any) -> Any:
    off = None if checked(progress) is None else not progress  # None: tqdm looks for a terminal

    from tqdm.auto import tqdm  # which takes longer to import than all of whence

    return tqdm(*items, file=sys.stderr, disable=off, **options)
