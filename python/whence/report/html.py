"""Pages that stand alone, and fragments for notebooks.

A page is one file without script. Its content security policy names the hash of its one style
sheet and images inside the page, and forbids everything else, so that even markup that slipped
through could load or run nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from whence._files import write_text
from whence._plain import clean, counted, line
from whence.report import png, style
from whence.report.chart import bar
from whence.report.safe import Html, escape, join, signed, tag, value
from whence.report.text import QUERIES_SHOWN, RANKS_SHOWN, left_out
from whence.search import Hits, Show, Side

_EXCERPT = 280  # characters of a text that a card shows before it is opened
_EXCERPT_LINES = 8
_NAME = 160  # characters of an id, a label or a badge on a card: one must not fill the page
_PICTURE = 96  # pixels that the longer side of a small image is enlarged to, about


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading of its own.

    Attributes:
        title: Its heading.
        parts: Texts, each a paragraph, or `Html` from the functions of this module.
    """

    title: str
    parts: Sequence[Any]


@dataclass(frozen=True)
class Card:
    """One example.

    Attributes:
        name: What it is called: "id 17".
        picture: What it looks like, from `picture`; None to show nothing.
        score: Its score; None to show none.
        notes: What is known about it, such as its label.
        badge: A short mark, such as "flipped label".
    """

    name: str
    picture: Html | None = None
    score: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    badge: str | None = None


def write_page(
    path: Path,
    hits: Hits,
    *,
    title: str,
    show: Show | None = None,
    queries: Sequence[Any] | None = None,
    captions: Sequence[str] | None = None,
    badge: Callable[[Any], str | None] | None = None,
    lead: Sequence[str] = (),
    before: Sequence[Section] = (),
    after: Sequence[Section] = (),
) -> None:
    """Writes the hits as a page that stands alone, between sections of your own.

    The file appears whole or not at all.

    Args:
        path: The file to write.
        hits: What to show.
        title: Heading of the page.
        show: id -> text, or a uint8 image of [height, width] or [height, width, 3].
        queries: What to show for each query: texts or images.
        captions: What to say beside each query.
        badge: id -> a short mark on its card, or None.
        lead: Paragraphs below the heading.
        before: Sections above the hits.
        after: Sections below them.

    Raises:
        DtypeError: If something shown is neither text nor an image.
        OSError: If the file cannot be written.
    """
    sections = [*before, legend(hits), hits_section(hits, show, queries, captions, badge), *after]
    write_text(path, document(title, sections, lead=lead))


def document(title: str, sections: Sequence[Section], *, lead: Sequence[str] = ()) -> str:
    """A whole page."""
    digest = base64.b64encode(hashlib.sha256(style.PAGE.encode()).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    links = [
        tag("li", tag("a", section.title, href=f"#part-{number}"))
        for number, section in enumerate(sections)
    ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", line(title)),
        tag("style", Html(style.PAGE)),
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", title, dir="auto"),
            *map(paragraph, lead),
            tag("nav", tag("ul", *links), aria_label="On this page"),
        ),
        tag("main", *(_section(number, section) for number, section in enumerate(sections))),
        tag("footer", tag("p", "Made by whence. One file; it loads nothing.")),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def paragraph(text: Any) -> Html:
    """A paragraph."""
    return tag("p", text)


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Html:
    """A table whose first column names its rows; the others are numbers."""
    heads = [tag("th", name, scope="col", class_=_number(i)) for i, name in enumerate(header)]
    lines = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_="number") for cell in row[1:]),
        )
        for row in rows
    ]
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption),
            tag("thead", tag("tr", *heads)),
            tag("tbody", *lines),
        ),
        class_="scroll",
        # What scrolls must be within reach of the keyboard.
        tabindex=0,
        role="region",
        aria_label=caption,
    )


def terms(meanings: Mapping[str, str]) -> Html:
    """Terms and what they mean."""
    return tag("div", _definitions(meanings), class_="sheet legend")


def beside(*parts: Html) -> Html:
    """Parts side by side where the window is wide enough, else one below the other."""
    return tag("div", *(tag("div", part) for part in parts), class_="beside")


def figure(drawing: Html, caption: str) -> Html:
    """A drawing with its caption."""
    return tag("figure", drawing, tag("figcaption", caption), class_="sheet")


def gallery(cards: Sequence[Card], *, largest: float | None = None) -> Html:
    """Cards side by side, in order.

    Args:
        cards: What to show.
        largest: The size of a score whose bar is full, of either sign. None for scores that
            cannot be negative: the largest of the cards.
    """
    both_ways = largest is not None
    if largest is None:
        largest = max((card.score for card in cards if card.score is not None), default=0.0)
    wide = any(_is_text(card.picture) for card in cards)
    items = [tag("li", *_card(card, largest, both_ways), class_="card") for card in cards]
    return tag("ol", *items, class_="gallery texts" if wide else "gallery")


def picture(name: str, shown: Any, alternative: str) -> Html:
    """A text or an image as markup.

    Args:
        name: The argument as the caller wrote it.
        shown: A str, or a uint8 image of [height, width] or [height, width, 3].
        alternative: What an image is, in words.

    Raises:
        DtypeError: If it is something else.
    """
    if isinstance(shown, str):
        return _text(shown)
    pixels = png.image(name, shown)
    height, width = pixels.shape[:2]
    factor = max(1, _PICTURE // max(height, width))
    return tag(
        "img",
        src=png.data_uri(pixels),
        alt=alternative,
        width=width * factor,
        height=height * factor,
        class_="small" if factor > 1 else None,
    )


def score(number: float) -> Html:
    """A score with its sign, and its exact value for programs that read the page."""
    kind = "plus" if number > 0 else "minus" if number < 0 else ""
    written = signed(number).replace("-", "\N{MINUS SIGN}")
    return tag("data", written, value=repr(float(number)), class_=f"score {kind}".strip())


def legend(hits: Hits) -> Section:
    """What the scores of these hits mean."""
    return Section(
        "How to read the scores",
        [terms(_meanings(hits))],
    )


def hits_section(
    hits: Hits,
    show: Show | None,
    queries: Sequence[Any] | None,
    captions: Sequence[str] | None,
    badge: Callable[[Any], str | None] | None,
) -> Section:
    """All queries, each with its helpful and harmful examples; arguments as in `write_page`."""
    pictures: dict[Any, Html | None] = {}

    def shown(identity: Any) -> Html | None:
        # Asked for once per example: an example is often among the hits of many queries.
        if show is not None and identity not in pictures:
            pictures[identity] = picture(
                f"show({identity!r})", show(identity), line(f"training example {identity}", _NAME)
            )
        return pictures.get(identity)

    parts = []
    for query in range(len(hits)):
        seen = None
        if queries is not None:
            seen = picture(f"queries[{query}]", queries[query], f"query {query}")
        sides = [
            _side(hits, name.capitalize(), side, query, shown, badge)
            for name, side in hits.sides.items()
        ]
        heading = tag("h3", f"Query {query}", id=f"query-{query}")
        caption = None if captions is None else tag("p", captions[query])
        about = tag("div", *(part for part in (heading, seen, caption) if part is not None))
        # A query without an image needs no column of its own.
        narrow = seen is not None and not _is_text(seen)
        parts.append(
            tag(
                "article",
                about,
                tag("div", *sides),
                class_="sheet query" if narrow else "sheet query texts",
                aria_labelledby=f"query-{query}",
            )
        )
    return Section("Queries and the training examples behind them", parts)


def fragment(hits: Hits) -> str:
    """Compact tables for a notebook, with a style that touches nothing else."""
    tables = [_fragment_table(hits, query) for query in range(min(len(hits), QUERIES_SHOWN))]
    return tag(
        "div",
        tag("style", Html(style.FRAGMENT)),
        _definitions(_meanings(hits)),
        *(tag("div", drawn, class_="whence-scroll") for drawn in tables),
        *(tag("p", sentence) for sentence in left_out(hits)),
        class_="whence-hits",
    )


def _section(number: int, section: Section) -> Html:
    parts = [part if isinstance(part, Html) else paragraph(part) for part in section.parts]
    heading = tag("h2", section.title, id=f"part-{number}")
    return tag("section", heading, *parts, aria_labelledby=f"part-{number}")


def _meanings(hits: Hits) -> dict[str, str]:
    """What sign, method, unit and width of the hits are."""
    low, high = int(hits.eligible.min()), int(hits.eligible.max())
    eligible = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    where = "at each end" if len(hits.sides) > 1 else f"at the {next(iter(hits.sides))} end"
    ends = (
        f"{counted(hits.width, 'example', 'examples')} {where}, of {eligible} eligible for each "
        "query: helpful are the largest scores, harmful the smallest, whatever their sign"
    )
    return {
        "Sign": hits.sign,
        "Method": hits.method,
        "Unit": hits.unit,
        "Search": hits.certainty,
        "Shown": ends,
    }


def _definitions(meanings: Mapping[str, str]) -> Html:
    return tag(
        "dl",
        *(
            part
            for term, meaning in meanings.items()
            for part in (tag("dt", term), tag("dd", meaning))
        ),
    )


def _side(
    hits: Hits,
    name: str,
    side: Side,
    query: int,
    shown: Callable[[Any], Html | None],
    badge: Callable[[Any], str | None] | None,
) -> Html:
    cards = []
    for rank in range(side.scores.shape[1]):
        identity = side.ids[query, rank].item()
        cards.append(
            Card(
                f"id {identity}",
                shown(identity),
                float(side.scores[query, rank]),
                _notes(hits, int(side.positions[query, rank])),
                None if badge is None else badge(identity),
            )
        )
    heading = tag("h4", name, class_="plus" if name == "Helpful" else "minus")
    return tag("div", heading, gallery(cards, largest=_largest(hits, query)), class_="side")


def _notes(hits: Hits, position: int) -> dict[str, str]:
    return {name: value(column[position]) for name, column in hits.columns.items()}


def _largest(hits: Hits, query: int) -> float:
    return float(max(np.abs(side.scores[query]).max() for side in hits.sides.values()))


def _card(card: Card, largest: float, both_ways: bool) -> list[Html]:
    parts = []
    if card.score is not None:
        parts += [score(card.score), bar(card.score, largest, both_ways=both_ways)]
    parts.append(tag("div", tag("bdi", line(card.name, _NAME)), class_="name"))
    if card.notes:
        notes = (
            tag(
                "div",
                tag("dt", tag("bdi", line(name, _NAME))),
                tag("dd", tag("bdi", line(str(note), _NAME))),
            )
            for name, note in card.notes.items()
        )
        parts.append(tag("dl", *notes, class_="notes"))
    if card.badge is not None:
        parts.append(tag("span", line(card.badge, _NAME), class_="badge"))
    if card.picture is None:
        return parts
    # Images are of one size, texts are not: scores above them stand in one line.
    return [*parts, card.picture] if _is_text(card.picture) else [card.picture, *parts]


def _text(text: str) -> Html:
    """A text; a long one by its beginning, to be opened."""
    text = clean(text).strip("\n")
    beginning = "\n".join(text[:_EXCERPT].split("\n")[:_EXCERPT_LINES])
    if beginning == text:
        return tag("p", text, class_="text", dir="auto")
    excerpt = tag("p", beginning + "\N{HORIZONTAL ELLIPSIS}", class_="text", dir="auto")
    opened = tag(
        "details",
        tag("summary", f"all {len(text):,} characters"),
        tag("p", text, class_="text", dir="auto"),
    )
    return join((excerpt, opened))


def _is_text(drawn: Html | None) -> bool:
    return drawn is not None and not drawn.startswith("<img")


def _number(place: int) -> str | None:
    return "number" if place else None


def _fragment_table(hits: Hits, query: int) -> Html:
    names = [tag("th", line(name, _CELL), scope="col") for name in hits.columns]
    number = "whence-number"
    header = [tag("th", "rank", scope="col", class_=number)]
    for side in hits.sides:
        header += [
            tag("th", side, scope="col"),
            tag("th", "score", scope="col", class_=number),
            tag("td"),
            *names,
        ]
    rows = [
        tag(
            "tr",
            tag("td", rank, class_=number),
            *(
                cell
                for side in hits.sides.values()
                for cell in _fragment_cells(hits, side, query, rank)
            ),
        )
        for rank in range(min(hits.width, RANKS_SHOWN))
    ]
    caption = f"Query {query}, of {hits.eligible[query]:,} eligible examples"
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *header)),
        tag("tbody", *rows),
    )


def _fragment_cells(hits: Hits, side: Side, query: int, rank: int) -> list[Html]:
    number = float(side.scores[query, rank])
    notes = _notes(hits, int(side.positions[query, rank])).values()
    return [
        tag("td", tag("bdi", line(value(side.ids[query, rank]), _CELL))),
        tag("td", score(number), class_="whence-number"),
        tag("td", bar(number, _largest(hits, query))),
        *(tag("td", tag("bdi", line(note, _CELL))) for note in notes),
    ]


_CELL = 60  # characters of a cell in a fragment

__all__ = [
    "Card",
    "Section",
    "beside",
    "document",
    "escape",
    "figure",
    "fragment",
    "gallery",
    "hits_section",
    "legend",
    "paragraph",
    "picture",
    "score",
    "table",
    "terms",
    "write_page",
]
