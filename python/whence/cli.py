"""The command `whence`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TextIO

from whence import store
from whence._plain import clean, counted, line
from whence.errors import ArgumentError, IdError, MissingDependencyError, WhenceError

# As a shell reports them: a store that is not sound, wrong use or an error, Ctrl-C, and output
# that nobody reads any more.
_DAMAGED, _FAILED, _INTERRUPTED, _UNREAD = 1, 2, 130, 141


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Its arguments; None means those of the process.

    Returns:
        The exit status: 0, 1 for damage that was found, 2 for an error, 130 after Ctrl-C, 141 for a
        closed pipe.
    """
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer goes nowhere, or Python complains about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _UNREAD
    except (WhenceError, OSError) as error:
        _print(f"whence: {error}", sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        _print("whence: interrupted", sys.stderr)
        return _INTERRUPTED
    return status


class _Parser(argparse.ArgumentParser):
    """Its errors are safe in a terminal: they repeat arguments, which can be names of files."""

    def error(self, message: str) -> NoReturn:
        super().error(line(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="whence", description="Which training examples made the model do this?")
    parser.add_argument("--version", action="version", version=f"whence {version('whence')}")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="find wrong labels among real digits, and write a page",
        description=(
            "Trains a small network on 1,400 real digits, a tenth of them with a wrong label, "
            "records their gradients, and writes a page with the training examples behind its "
            "predictions and how well scores find the wrong labels. Downloads nothing."
        ),
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("whence-demo"),
        metavar="DIR",
        help="folder for the store and the page (default: %(default)s)",
    )
    demo.add_argument(
        "--seed", type=_seed, default=0, help="seed of everything random (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)
    info = _on_store(commands, "info", "what a store holds, in figures", _info)
    verify = _on_store(
        commands, "verify", "read every byte of a store, and say what is damaged", _verify
    )
    repair = _on_store(
        commands, "repair", "drop what is damaged, and list the ids that are lost", _repair
    )
    repair.add_argument(
        "--undelete",
        action="store_true",
        help="let deleted rows come back if the list of them is damaged",
    )
    compact = _on_store(
        commands, "compact", "take what was deleted off the disk, and join small shards", _compact
    )
    delete = _on_store(commands, "delete", "delete examples by id", _delete)
    delete.add_argument("ids", nargs="+", metavar="ID", help="ids of the examples")
    delete.add_argument(
        "--skip-missing", action="store_true", help="leave out ids that are not in the store"
    )
    merge = _command(commands, "merge", "make one new store of several", _merge)
    merge.add_argument("stores", nargs="+", type=Path, metavar="STORE", help="folders of stores")
    merge.add_argument("out", type=Path, metavar="OUT", help="the new store's folder")
    merge.add_argument(
        "--on-duplicate",
        choices=("error", "first"),
        default="error",
        help="what to do with an id of two stores (default: %(default)s)",
    )
    split = _on_store(commands, "split", "make a new store of the examples that pass", _split)
    split.add_argument("out", type=Path, metavar="OUT", help="the new store's folder")
    split.add_argument(
        "--where",
        action="append",
        required=True,
        metavar="COLUMN=VALUE",
        help="examples of this value; again for another column, or another value of one",
    )
    export = _on_store(commands, "export", "write a store into one file", _export)
    export.add_argument("file", type=Path, metavar="FILE", help="a .npz, .arrow or .parquet file")
    export.add_argument(
        "--rows",
        choices=("stored", "float32"),
        default="stored",
        help="float32 for numbers, which cannot be imported again (default: %(default)s)",
    )
    export.add_argument(
        "--format",
        choices=("npz", "arrow", "parquet"),
        help="of the file (default: what its name ends in)",
    )
    imports = _command(commands, "import", "make a new store of an exported file", _import)
    imports.add_argument("file", type=Path, metavar="FILE", help="what whence export wrote")
    imports.add_argument("store", type=Path, metavar="STORE", help="the new store's folder")
    for command in (demo, info, verify, repair, compact, delete, merge, split, export, imports):
        command.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def _on_store(
    commands: Any, name: str, what: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """A command on a store."""
    command = _command(commands, name, what, run)
    command.add_argument("store", type=Path, metavar="STORE", help="the store's folder")
    return command


def _command(
    commands: Any, name: str, what: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what)
    command.set_defaults(run=run)
    return command


def _seed(text: str) -> int:
    """A seed that NumPy and torch both take."""
    seed = int(text)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"seed must be from 0 to {2**32 - 1}, got {seed}")
    return seed


def _show(found: Any, arguments: argparse.Namespace) -> None:
    """Prints what a call found."""
    if arguments.json:
        _print(json.dumps(dataclasses.asdict(found), indent=2, default=str))
    else:
        _print(str(found))


def _info(arguments: argparse.Namespace) -> int:
    _show(store.info(arguments.store), arguments)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    found = store.verify(arguments.store)
    _show(found, arguments)
    return 0 if found.is_sound else _DAMAGED


def _repair(arguments: argparse.Namespace) -> int:
    found = store.repair(arguments.store, undelete=arguments.undelete)
    _show(found, arguments)
    return _DAMAGED if found.unmended else 0


def _compact(arguments: argparse.Namespace) -> int:
    _show(store.compact(arguments.store), arguments)
    return 0


def _where(arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """The filter that `--where` says, its values in the types of the store's columns.

    Raises:
        ArgumentError: If a text is none of its column's type, or has no equals sign.
    """
    kinds = store.Reader(arguments.store).manifest.columns or {}
    found: dict[str, list[Any]] = {}
    for text in arguments.where:
        # A column's name may have an equals sign too: the longest that there is.
        parts = text.split("=")
        names = ["=".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
        if not names:
            raise ArgumentError(f"--where must be COLUMN=VALUE, got {text!r:.80}")
        name = next((each for each in names if each in kinds), None)
        if name is None:
            raise ArgumentError(f"--where must name columns of {sorted(kinds)}, got {text!r:.80}")
        value = text[len(name) + 1 :]
        wanted, read = _READ[kinds[name]]
        try:
            found.setdefault(name, []).append(read(value))
        except (ValueError, KeyError):
            raise ArgumentError(f"--where {name} must be {wanted}, got {value!r:.80}") from None
    return found


def _int64(text: str) -> int:
    value = int(text)
    if "_" in text or not -(1 << 63) <= value < 1 << 63:
        raise ValueError
    return value


_READ: dict[str, tuple[str, Callable[[str], Any]]] = {
    "bool": (
        "true or false",
        {"true": True, "True": True, "false": False, "False": False}.__getitem__,
    ),
    "int64": ("a whole number of 64 bits", _int64),
    "float64": ("a number", float),
    "str": ("a text", str),
}
"""Type of a column -> how it is called, and a text to a value of it."""


def _delete(arguments: argparse.Namespace) -> int:
    ids: list[Any] = arguments.ids
    if store.Reader(arguments.store).manifest.ids == "int64":
        try:
            ids = [int(id_) for id_ in ids]
        except ValueError:
            raise IdError(f"ID must be a whole number as in the store, got {ids!r:.80}") from None
    missing = "skip" if arguments.skip_missing else "error"
    rows = store.delete(arguments.store, ids, missing=missing)
    if arguments.json:
        _print(json.dumps({"rows": rows}))
    else:
        _print(f"{counted(rows, 'row')} deleted; whence compact takes their bytes off the disk")
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    out = store.merge(arguments.stores, arguments.out, on_duplicate=arguments.on_duplicate)
    _show(store.info(out), arguments)
    return 0


def _split(arguments: argparse.Namespace) -> int:
    (out,) = store.split(arguments.store, {arguments.out: _where(arguments)})
    _show(store.info(out), arguments)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    file = store.export_store(
        arguments.store, arguments.file, format=arguments.format, rows=arguments.rows
    )
    size = file.stat().st_size
    if arguments.json:
        _print(json.dumps({"file": str(file), "bytes": size}))
    else:
        _print(f"{file}: {counted(size, 'byte')}")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    _show(store.info(store.import_store(arguments.file, arguments.store)), arguments)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from whence import demo
    except ModuleNotFoundError as error:
        missing = {"torch": "torch", "sklearn": "scikit-learn"}.get(
            (error.name or "").split(".")[0]
        )
        if missing is None:
            raise
        raise MissingDependencyError(
            f"the demo needs {missing}: pip install 'whence[demo]'"
        ) from error
    results = demo.run(arguments.out, arguments.seed)
    _print(json.dumps(results, indent=2) if arguments.json else demo.summary(results))
    return 0


def _warn(message: Warning | str, *_: Any) -> None:
    """Shows a warning: what it says, and no line of ours."""
    _print(f"whence: {message}", sys.stderr)


def _print(text: str, file: TextIO | None = None) -> None:
    """Prints what may hold names of files and data; a character that `file` has not is written out.

    All that the command prints goes through here.
    """
    file = sys.stdout if file is None else file
    encoding = file.encoding or "utf-8"
    print(clean(text).encode(encoding, "backslashreplace").decode(encoding), file=file)
