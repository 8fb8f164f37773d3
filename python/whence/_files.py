"""Files for people, a page or a table: they appear whole, or not at all."""

from __future__ import annotations

import secrets
from pathlib import Path


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
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
