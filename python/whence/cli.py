"""The command `whence`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, TextIO

from whence._plain import clean, line
from whence.errors import MissingDependencyError, WhenceError

# As a shell reports them: wrong use or an error, Ctrl-C, and output that nobody reads any more.
_FAILED, _INTERRUPTED, _UNREAD = 2, 130, 141


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Its arguments; None means those of the process.

    Returns:
        The exit status: 0, 2 for an error, 130 after Ctrl-C, 141 for a closed pipe.
    """
    arguments = _parser().parse_args(argv)
    try:
        _demo(arguments.out, arguments.seed, as_json=arguments.json)
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
    return 0


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
    demo.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def _seed(text: str) -> int:
    """A seed that NumPy and torch both take."""
    seed = int(text)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"seed must be from 0 to {2**32 - 1}, got {seed}")
    return seed


def _demo(out: Path, seed: int, *, as_json: bool) -> None:
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
    results = demo.run(out, seed)
    _print(json.dumps(results, indent=2) if as_json else demo.summary(results))


def _print(text: str, file: TextIO | None = None) -> None:
    """Prints what may hold names of files and data; a character that `file` has not is written out.

    All that the command prints goes through here.
    """
    file = sys.stdout if file is None else file
    encoding = file.encoding or "utf-8"
    print(clean(text).encode(encoding, "backslashreplace").decode(encoding), file=file)
