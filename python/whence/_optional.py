"""Libraries that are not always installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from whence.errors import MissingDependencyError


def imported(module: str, caller: str, package: str) -> Any:
    """A module that `caller` needs, and `package` brings.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        if (error.name or "").split(".")[0] != module:
            raise
        raise MissingDependencyError(f"{caller} needs {module}: pip install {package}") from None
