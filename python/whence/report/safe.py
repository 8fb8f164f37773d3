"""Markup that text out of training data cannot be mixed up with.

Ids, labels, column names and texts are whatever was in a data set. Text becomes markup in one
place, `escape`; what `tag` is given is escaped unless it is `Html`, so forgetting to escape shows
up as visible `&lt;`, never as a live tag.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from whence._plain import clean

_VOID = frozenset({"img", "meta", "br"})


class Html(str):
    """Markup that is escaped already; anything else counts as text."""

    __slots__ = ()


def value(item: Any) -> str:
    """A stored value as a person reads it: floats with four digits."""
    if hasattr(item, "item"):
        item = item.item()
    return f"{item:.4g}" if isinstance(item, float) else str(item)


def signed(score: float) -> str:
    """The number to three digits, its sign always there, in ASCII: +0.0123, -4.50, +1.00e+03, 0."""
    return f"{score:+#.3g}".rstrip(".") if score else "0"


def escape(text: Any) -> Html:
    """`text` as markup that shows it; `Html` as it is."""
    return text if isinstance(text, Html) else Html(html.escape(clean(str(text))))


def join(parts: Iterable[Any]) -> Html:
    """The parts after one another, each escaped."""
    return Html("".join(escape(part) for part in parts))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element.

    Args:
        name: Its name, from the program, never from data.
        *children: Texts, which are escaped, or `Html`.
        **attributes: Values are escaped; None leaves the attribute out. An underscore in a name
            stands for a hyphen, one at the end is dropped: class_, aria_label.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(clean(str(text)))}"'
        for key, text in attributes.items()
        if text is not None
    )
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")
