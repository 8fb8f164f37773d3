r"""Text that is only text, whatever a terminal, a browser or a spreadsheet could take it for.

Ids, labels, column names, names of checkpoints and layers, paths and texts are whatever was in a
data set or in the name of a file. What acts on a terminal, reorders what stands beside it or is
not seen at all is written out as Python writes it, `\x1b` or `\u202e`: it is then harmless, it can
be seen, and two ids that differ never look the same.
"""

from __future__ import annotations

import re

# Of Unicode's controls, format characters and surrogates all but tab and newline and the few that
# are seen; letters and marks that are blank; code points that are no characters.
_UNSEEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufdd0-\ufdef\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
)
# They say how the letter before them is drawn, in Persian, Hindi, Chinese and emoji.
_JOINERS = "\u200c\u200d"
_SELECTORS = "\ufe00-\ufe0f\U000e0100-\U000e01ef"
_HIDDEN = re.compile(f"[{_UNSEEN}{_JOINERS}{_SELECTORS}]")
# A letter beyond ASCII keeps one of each; where they shape no letter they only hide.
_SHAPED = re.compile(
    f"([^\x00-\x7f{_UNSEEN}{_JOINERS}{_SELECTORS}][{_SELECTORS}]?[{_JOINERS}]?)|{_HIDDEN.pattern}"
)
_BREAK = re.compile("\r\n?|[\u2028\u2029]")
_GAP = re.compile("[\t\n]+")

# Where a spreadsheet looks for a formula: at the start, also after the semicolon that parts cells
# where a comma is the decimal mark. The wide forms are those of Chinese and Japanese keyboards.
_FORMULA = re.compile('(^|;)([\\s"]*[=+\\-@\uff1d\uff0b\uff0d\uff20])')


def clean(text: str) -> str:
    """The text on as many lines as it has, its tabs kept, all that is not seen written out."""
    text = _BREAK.sub("\n", text)
    if _HIDDEN.search(text) is None:
        return text
    return _SHAPED.sub(lambda found: found[1] or _written_out(found[0]), text)


def line(text: str, width: int | None = None) -> str:
    """The same on one line, a space for each run of tabs and line breaks.

    Args:
        text: Any text.
        width: The most characters to keep; the end is then an ellipsis of three dots.
    """
    text = _GAP.sub(" ", clean(text))
    if width is not None and len(text) > width:
        return text[: width - 3] + "..."
    return text


def cell(text: str) -> str:
    """The same on one line that no spreadsheet takes for a formula.

    An apostrophe stands before `=`, `+`, `-` and `@` where a cell could begin with them.
    """
    return _FORMULA.sub(r"\1'\2", line(text))


def counted(count: int, one: str, many: str | None = None) -> str:
    """The count with its noun, whose plural has an s unless it is given: 1 query, 1,400 rows."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _written_out(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
