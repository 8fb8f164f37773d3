"""Files for people, a page or a table: they appear whole, or not at all."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Lets errors of the system be of `path`, where it is written under another name.

    Raises:
        OSError: Of `path`, where one of another path is raised.
    """
    try:
        yield
    except OSError as error:
        if type(error.errno) is not int:  # one of ours
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text into a file that is new or replaced.

    Raises:
        OSError: If it cannot be written.
    """
    if path.exists() and not path.is_file():  # a pipe or a device is not for us to replace
        path.write_text(text, encoding="utf-8", newline="")
        return
    # A name of its own: of two writers the later one wins, and no file is half of each. It is
    # short, since the name of the file may be as long as the system allows.
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    with named(path):
        try:
            temporary.write_text(text, encoding="utf-8", newline="")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
