"""The errors of whence, one class a kind, all under `WhenceError`.

    WhenceError
      ArgumentError        an argument's value, or options that do not go together
        ShapeError         an array's shape
        DtypeError         an array's type
        IdError            ids: of mixed kinds, twice, not in the store
        CheckpointError    checkpoints or their states: missing, unknown, twice
      NotFiniteError       a NaN or an infinity
      LayerError           a layer that cannot be recorded as it is used
        CoverageError      a parameter with a gradient that no layer rule accounts for
      WeightsError         weights that are not those the rows were recorded with
      StoreError           a store that is missing, damaged, or cannot be written
        MismatchError      a store of another model, sketch or setting
        LockedError        a store that another process writes to
      MissingDependencyError  an optional package that is not installed

And one warning, `MissingWritersWarning`: a store is read while some of its writers have no rows.

Messages read "ARGUMENT must BE, got WHAT", on one line that is safe in a terminal: names and paths
are in them.
"""

from __future__ import annotations

from whence._plain import line


class WhenceError(Exception):
    """Any error that whence raises on purpose."""

    def __str__(self) -> str:
        return line(super().__str__())


class ArgumentError(WhenceError, ValueError):
    """An argument has a value it cannot have, or options do not go together."""


class ShapeError(ArgumentError):
    """An array has another shape than its neighbours ask for."""


class DtypeError(ArgumentError, TypeError):
    """An array or value has a type that is not taken."""


class IdError(ArgumentError):
    """Ids are of mixed kinds, appear twice, or are not in the store."""


class CheckpointError(ArgumentError):
    """A checkpoint or its state is missing, unknown, or given twice."""


class NotFiniteError(WhenceError, ArithmeticError):
    """A value is NaN or infinite."""


class LayerError(WhenceError):
    """A layer cannot be recorded in the way it is used."""


class CoverageError(LayerError):
    """A parameter received a gradient that no layer rule accounts for."""


class WeightsError(WhenceError):
    """The model's weights are not those the rows were recorded with."""


class StoreError(WhenceError, OSError):
    """A store is missing, damaged, or cannot be written."""


class MismatchError(StoreError):
    """A store belongs to another model, sketch or setting."""


class LockedError(StoreError):
    """Another process is writing to the store."""


class MissingWritersWarning(UserWarning):
    """Some writers of a store of several have confirmed nothing yet."""


class MissingDependencyError(WhenceError, ImportError):
    """An optional package is needed and not installed."""


__all__ = [
    "ArgumentError",
    "CheckpointError",
    "CoverageError",
    "DtypeError",
    "IdError",
    "LayerError",
    "LockedError",
    "MismatchError",
    "MissingDependencyError",
    "MissingWritersWarning",
    "NotFiniteError",
    "ShapeError",
    "StoreError",
    "WeightsError",
    "WhenceError",
]
