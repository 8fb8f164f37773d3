"""Hostile text in every place that shows data: pages, tables, the terminal, names of files.

Short: every payload in every place, pages read by Python's parser of HTML. With --full every page
is also opened in Chromium, as it is and without its content security policy, and everything in it
is pointed at, opened and clicked; mixtures of payloads follow. Ends with one line of figures.

A trial that cannot fail says nothing: each payload is also written where nothing is escaped, and
enough of them must come alive there.
"""

import argparse
import contextlib
import csv
import io
import re
import socket
import sys
import tempfile
import threading
import unicodedata
import warnings
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import count
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1]))  # for filled.py

from filled import fill, random_rows

import whence
from whence import cli
from whence._arrays import MAX_ID
from whence.curvature import fit_factors
from whence.errors import WhenceError
from whence.report import chart, html
from whence.report.safe import Html

# What a payload does if it is alive. No quotes, so that it fits into every kind of attribute.
LIVE = "window.name=/live/.source"
URL = "http://127.0.0.1:PORT/live"

PAYLOADS = {
    # elements that run
    "script": "<script>LIVE</script>",
    "script in mixed case": "<ScRiPt\t>LIVE</sCrIpT >",
    "script from elsewhere": "<script src=URL></script>",
    "image": "<img src=x: onerror=LIVE>",
    "image after a double quote": '"><img src=x: onerror="LIVE">',
    "image after a single quote": "'><img src=x: onerror='LIVE'>",
    "image without spaces": "<img/src='x:'/onerror=LIVE>",
    "svg": "<svg/onload=LIVE>",
    "script in svg": "<svg><script>LIVE</script></svg>",
    "animation": "<svg><animate onbegin=LIVE attributeName=x dur=1s></svg>",
    "text out of svg": "</text></svg><svg onload=LIVE><title>",
    "mathml that mutates": "<math><mtext><table><mglyph><style><!--</style>"
    "<img title='--&gt;&lt;img src=x: onerror=LIVE&gt;'><img src=x: onerror=LIVE>",
    "media": "<video><source src=x: onerror=LIVE></video>",
    "details": "<details open ontoggle=LIVE>x</details>",
    "body": "</body><body onload=LIVE onpageshow=LIVE>",
    "frame with a page": "<iframe srcdoc='<script>parent.LIVE</script>'></iframe>",
    "frame with a script": "<iframe src=javascript:parent.LIVE></iframe>",
    "object": "<object data='javascript:LIVE'></object><embed src=URL>",
    # attributes
    "handler after a double quote": '" autofocus tabindex=0 onfocus="LIVE" x="',
    "handler after a single quote": "' autofocus tabindex=0 onmouseover='LIVE' x='",
    "style after a double quote": '" style="background:url(URL)" x="',
    "link with a script": "<a href='javascript:LIVE'>click</a>",
    "address of a script": "javascript:LIVE//\"><a href='java\tscript:LIVE'>x</a>",
    "address of data": "<a href='data:text/html,<script>LIVE</script>'>x</a><img src=URL>",
    # the page around it
    "meta refresh": "<meta http-equiv=refresh content='0;url=URL'>",
    "base": "<base href=URL/><link rel=stylesheet href=x>",
    "style sheet": "</style><style>@import 'URL';*{background:url(URL)}</style>",
    "form": "<form action=URL><input type=submit autofocus><button formaction=javascript:LIVE>x",
    "comment that opens": "<!-- <p hidden>",
    "comment that closes": "--!><script>LIVE</script><!--",
    "tag left open": "<img src='URL?",
    "plaintext": "</title></textarea><plaintext>",
    "all that can be closed": "</title></style></script></textarea></svg></td><svg onload=LIVE>",
    "cdata": "<![CDATA[><script>LIVE</script>]]>",
    # forms of the same that become it if decoded once more
    "entities": "&lt;script&gt;LIVE&lt;/script&gt;&#60;img src=x: onerror=LIVE&#62;&quot;",
    "percent and other codes": "%3Cscript%3ELIVE%3C/script%3E +ADw-script+AD4-LIVE \\x3cscript>",
    "templates": "{{constructor.constructor('LIVE')()}} ${LIVE} <%= LIVE %> #{LIVE}",
    # terminals and eyes
    "zero bytes": "<scr\x00ipt>LIVE</scr\x00ipt><img src=x: \x00onerror=LIVE>",
    "colours and clearing": "\x1b[2J\x1b[H\x1b[31mred\x1b[0m\x9b31m",
    "title and clipboard": "\x1b]0;title\x07\x1b]52;c;bGl2\x07\x1b]8;;URL\x1b\\x\x1b]8;;\x07\x90q",
    "lines that are not there": "id\nsign    positive = harmful\r\nwhence: well\x0b\x85\u2028x",
    "writing over": "wrong\rright\x08\x08\x08\x7f\x07",
    "reordering": "\u202eexe.txt\u202c \u2066a\u2069 \u2067b\u200f\u061c \u202d",
    "unseen": "a\u200b\u2060\ufeff\xad\u034f\u3164\u200c\u200d\ufe0f\U000e0041\U000e007f",
    "half a pair": "\ud800<script>LIVE</script>\udfff",
    "very long": "<b>" + "long " * 4000 + "Z\u0310\u0343\u0342" * 500 + "W" * 9000 + "<script>LIVE",
    # spreadsheets
    "command in a cell": "=cmd|' /C calc'!A0",
    "functions": "@SUM(1+1)*HYPERLINK(\"URL\";\"x\");=1+1;\"=2+2\";\t-3+3",
    "spaces before a formula": ' \t\r\n+IMPORTXML("URL","//a")\n=1',
    # files
    "paths": "../../../etc/passwd\x00.html ..\\..\\win.ini C:\\x //host/x ~/.ssh $(id) `id` ;id|",
}  # fmt: skip
assert len(PAYLOADS) == 50

HARMLESS = ("harmless", "harmless " * 100, "harmless " * 3000, "x\n" * 20)
"""Texts of the lengths that are drawn differently: whole, and cut to be opened."""

_numbers = count()


def payloads(port):
    """Name -> text, with a listener's port filled in."""
    url = URL.replace("PORT", str(port))
    return {name: text.replace("URL", url).replace("LIVE", LIVE) for name, text in PAYLOADS.items()}


# --- places


@cache
def stored(folder, text):
    """A store in which all that can be is the text: ids, a label, a column, the checkpoint."""
    path = folder / f"store-{next(_numbers)}"
    ids = [text[:MAX_ID], "b"]
    return fill(path, random_rows(2), ids, checkpoint=text, **{text: [text, "other"]})


@cache
def all_of_it(folder, text):
    """Hits of such a store."""
    return stored(folder, text).search(random_rows(1, seed=1), k=1)


def found(folder, *, ids="a", label="l", column="label"):
    """Hits of which one thing is hostile."""
    hits = all_of_it(folder, "plain")
    names = np.array([ids, "b"])
    return replace(
        hits,
        **{name: replace(side, ids=names[side.positions]) for name, side in hits.sides.items()},
        columns={column: np.array([label, "other"], object)},
    )


def page(folder, hits, **options):
    """The text of their page; of `write_page` if it takes what `to_html` does not."""
    path = folder / f"page-{next(_numbers)}.html"
    if {"title", "show", "queries"} >= set(options):
        hits.to_html(path, **options)
    else:
        html.write_page(path, hits, title="title", **options)
    return path.read_text(encoding="utf-8")


def section(*parts, title="section"):
    """A page of one section."""
    return html.document("title", [html.Section(title, parts)])


def drawn(text, *, axis="x", title="t", name="n"):
    """A page with a chart."""
    curve = chart.curves({name: np.zeros(3)}, title=title, across=axis, up=axis)
    return section(html.figure(curve, text))


PIXELS = np.zeros((2, 2), np.uint8)

PAGES = {
    "a store of it": lambda text, at: page(at, all_of_it(at, text), show=lambda id_: id_),
    "id": lambda text, at: page(at, found(at, ids=text)),
    "label": lambda text, at: page(at, found(at, label=text)),
    "column name": lambda text, at: page(at, found(at, column=text)),
    "method": lambda text, at: page(at, replace(found(at), method=text)),
    "unit": lambda text, at: page(at, replace(found(at), unit=text)),
    "title": lambda text, at: page(at, found(at), title=text),
    "text shown": lambda text, at: page(at, found(at), show=lambda _: text),
    "id of an image": lambda text, at: page(at, found(at, ids=text), show=lambda _: PIXELS),
    "query": lambda text, at: page(at, found(at), queries=[text]),
    "caption": lambda text, at: page(at, found(at), captions=[text]),
    "badge": lambda text, at: page(at, found(at), badge=lambda _: text),
    "lead": lambda text, at: page(at, found(at), lead=[text]),
    "section title": lambda text, at: section(title=text),
    "paragraph": lambda text, at: section(text),
    "table caption": lambda text, at: section(html.table(text, ["a", "b"], [["c", "1"]])),
    "table header": lambda text, at: section(html.table("t", [text, "b"], [["c", "1"]])),
    "table cell": lambda text, at: section(html.table("t", ["a", "b"], [[text, text]])),
    "term": lambda text, at: section(html.terms({text: "meaning"})),
    "meaning": lambda text, at: section(html.terms({"term": text})),
    "figure caption": lambda text, at: drawn(text),
    "chart title": lambda text, at: drawn("c", title=text),
    "chart axis": lambda text, at: drawn("c", axis=text),
    "curve name": lambda text, at: drawn("c", name=text),
    "card": lambda text, at: section(html.gallery([html.Card(text, None, 1, {text: text}, text)])),
    "image alternative": lambda text, at: section(html.picture("image", PIXELS, text)),
    "fragment: a store of it": lambda text, at: all_of_it(at, text)._repr_html_(),
    "fragment: id": lambda text, at: found(at, ids=text)._repr_html_(),
    "fragment: label": lambda text, at: found(at, label=text)._repr_html_(),
    "fragment: column name": lambda text, at: found(at, column=text)._repr_html_(),
    "fragment: method": lambda text, at: replace(found(at), method=text)._repr_html_(),
}  # fmt: skip


def table(folder, hits):
    path = hits.to_csv(folder / f"table-{next(_numbers)}.csv")
    return path.read_text(encoding="utf-8")


TABLES = {
    "csv: a store of it": lambda text, at: table(at, all_of_it(at, text)),
    "csv: id": lambda text, at: table(at, found(at, ids=text)),
    "csv: label": lambda text, at: table(at, found(at, label=text)),
    "csv: column name": lambda text, at: table(at, found(at, column=text)),
}


def message(call, *arguments, **options):
    """The error of a call that must fail."""
    try:
        call(*arguments, **options)
    except WhenceError as error:
        return str(error)
    raise AssertionError("no error")


def said(*arguments):
    """What the command prints, on both of its streams."""
    out, errors = io.StringIO(), io.StringIO()
    silent = contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors)
    with silent[0], silent[1], contextlib.suppress(SystemExit):
        cli.main([*arguments])
    return out.getvalue() + errors.getvalue()


def file_name(text):
    """The text as a name of one file, as long as the system takes."""
    name = text.replace("/", "_").replace("\0", "").encode("utf-8", "replace")[:200]
    return name.decode("utf-8", "ignore")


def file_of(folder, text):
    path = folder / file_name(text)
    path.write_text("mine", encoding="utf-8")
    return path


def on_a_store(*commands, damaged=False):
    """What commands print of a store whose name and content are the text."""

    def make(text, folder):
        folder = folder / f"within-{next(_numbers)}"
        path = folder / f"{file_name(text)}.store"
        ids = [text[:MAX_ID], "b"]
        fill(path, random_rows(2), ids, checkpoint=text, **{text: [text, "other"]})
        if damaged:
            (rows,) = path.glob("shard-*/rows.npy")
            content = bytearray(rows.read_bytes())
            content[-1] ^= 1
            rows.write_bytes(content)
        return "".join(
            said(command, str(path), *(f"x{text}" for _ in range(command == "delete")))
            for command in commands
        )

    return make


def missing_writer(text, folder):
    """The warning of a store that a writer has not come to."""
    path = folder / f"within-{next(_numbers)}" / file_name(text)
    with whence.record(torch.nn.Linear(2, 2), path, dim=8, writer="1/2") as recorder:
        recorder.checkpoint(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        whence.open(path)
    return "".join(str(each.message) for each in caught)


def coverage(text, folder):
    """What recording says of a layer that it has no rule for."""
    model, path = torch.nn.Sequential(torch.nn.Linear(2, 2)), folder / f"store-{next(_numbers)}"
    model.add_module(text.replace(".", "_"), torch.nn.PReLU())
    with whence.record(model, path, dim=8, uncovered="skip") as recorder:
        return str(recorder.coverage())


def bars(text, folder):
    """Progress bars of a checkpoint, and what was chosen at their end."""
    model, errors = torch.nn.Linear(2, 2), io.StringIO()
    data = [(torch.eye(2), torch.tensor([0, 1]))]
    states = {text: model.state_dict(), "last": model.state_dict()}
    with contextlib.redirect_stderr(errors):
        fit_factors(
            model,
            data,
            lambda x, y: torch.nn.functional.cross_entropy(model(x), y),
            states=states,
            labels="empirical",
            progress=True,
        )
    # A bar draws itself over itself, as often as it has time to: what differs is put together.
    drawn = errors.getvalue().replace("\x1b[A", "").replace("\n", "\r").split("\r")
    return " ".join(drawn)


TERMINAL = {
    "text: a store of it": lambda text, at: str(all_of_it(at, text)),
    "text: id": lambda text, at: str(found(at, ids=text)),
    "text: label": lambda text, at: str(found(at, label=text)),
    "text: column name": lambda text, at: str(found(at, column=text)),
    "text: method and unit": lambda text, at: str(replace(found(at), method=text, unit=text)),
    "repr: store": lambda text, at: repr(stored(at, text)),
    "repr: hits": lambda text, at: repr(all_of_it(at, text)),
    "error: unknown id": lambda text, at: message(
        stored(at, text).search, random_rows(1), where=[text + "x"]
    ),
    "error: unknown column": lambda text, at: message(
        stored(at, text).search, random_rows(1), where={text + "x": 1}
    ),
    "error: unknown checkpoint": lambda text, at: message(
        stored(at, text).rows, checkpoint=text + "x"
    ),
    "error: no store": lambda text, at: message(whence.open, at / file_name(text)),
    "error: no image": lambda text, at: message(
        found(at, ids=text).to_html, at / "page.html", show=lambda _: 3
    ),
    "command: path": lambda text, at: said("demo", "--out", str(file_of(at, text))),
    "command: argument": lambda text, at: said("demo", "x" + text),
    "command: option": lambda text, at: said("demo", "--seed", text),
    "command: info": on_a_store("info"),
    "command: verify and repair": on_a_store("verify", "repair", "info", damaged=True),
    "command: delete and compact": on_a_store("delete", "compact"),
    "warning: missing writers": missing_writer,
    "layer name": coverage,
    "progress bar": bars,
}  # fmt: skip


# --- what is no text any more


class Tree(HTMLParser):
    """Elements with their attributes; what two of them hold is text."""

    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.structure, self.texts = [], []
        self.feed(markup)
        self.close()

    def handle_starttag(self, name, attributes):
        self.structure.append((name, *((k, v) for k, v in attributes if k not in _TEXT)))
        self.texts += [value for key, value in attributes if key in _TEXT]

    def handle_endtag(self, name):
        self.structure.append("/" + name)

    def handle_data(self, text):
        self.texts.append(text)

    def handle_comment(self, text):
        self.structure.append("comment")

    def handle_decl(self, text):
        self.structure.append("declaration " + text)

    def unknown_decl(self, text):
        self.structure.append("declaration")

    def handle_pi(self, text):
        self.structure.append("instruction")


_TEXT = ("alt", "aria-label")
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">')


def unseen(text, allowed=""):
    """Characters that act on a terminal, reorder text or are not seen, by Python's Unicode."""
    return [
        letter
        for letter in text
        if letter not in allowed and unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    ]


def is_strict(tree):
    """Whether a policy stands first and allows one style sheet and images in the page."""
    heads = [each for each in tree.structure if each[0] in ("meta", "title", "style", "link")]
    policies = [dict(pairs).get("content", "") for _, *pairs in heads[1:2]]
    rules = dict(rule.split(" ", 1) for rule in policies[0].split("; ")) if policies[0] else {}
    style = rules.pop("style-src", "")
    strict = {
        "default-src": "'none'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return rules == strict and re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", style) is not None


def wrong_in_page(markup, harmless, text):
    """What is more than text in a page or fragment, in words.

    Args:
        markup: The page.
        harmless: The same of harmless texts.
        text: What was hostile.
    """
    wrong, tree = [], Tree(markup)
    if tree.structure not in [Tree(each).structure for each in harmless]:
        wrong.append("has other elements or attributes")
    if unseen(markup, "\t\n"):
        wrong.append(f"holds {unseen(markup, chr(9) + chr(10))[:5]}")
    words = [word for word in text.split() if not unseen(word)]
    shown = " ".join(tree.texts)
    # The middle of long texts is left out of one-line forms.
    if len(text) < 55 and not all(word in shown for word in words):
        wrong.append("does not show the text")
    if markup.startswith("<!DOCTYPE html>"):
        if not is_strict(tree):
            wrong.append("has no strict policy before its style")
    elif re.search(r"<\s*script", markup, re.I):
        wrong.append("has a script")
    return wrong


def wrong_in_table(written, harmless):
    """What a spreadsheet would run, or read as another table."""
    wrong = []
    if unseen(written, "\n"):
        wrong.append(f"holds {unseen(written, chr(10))[:5]}")
    try:
        rows = list(csv.reader(io.StringIO(written)))
    except csv.Error as error:
        return [*wrong, f"cannot be read: {error}"]
    if [len(row) for row in rows] != [len(row) for row in csv.reader(io.StringIO(harmless))]:
        wrong.append("has other rows or cells")
    if len(written.splitlines()) != len(rows):
        wrong.append("has a cell of several lines")
    for delimiter in ",;\t":  # as a spreadsheet of another country parts it
        for row in csv.reader(io.StringIO(written), delimiter=delimiter):
            wrong += [f"runs {cell[:40]!r}" for cell in row if is_formula(cell)]
    return wrong


def is_formula(cell):
    """Whether a spreadsheet would take it for one; a number is none."""
    try:
        float(cell)
    except ValueError:
        return cell.strip().lstrip('"').strip()[:1] in tuple("=+-@\uff1d\uff0b\uff0d\uff20")
    return False


def wrong_in_terminal(output, lines):
    """What a terminal would do besides showing text; `lines` is how many it may have."""
    wrong = []
    if unseen(output, "\n"):
        wrong.append(f"holds {unseen(output, chr(10))[:5]}")
    if len(output.split("\n")) not in lines:
        wrong.append("has other lines")
    return wrong


def wrong_with_paths(text, folder):
    """What happens elsewhere if a store, a page and a table have hostile names."""
    folder = folder / f"within-{next(_numbers)}"
    folder.mkdir()
    name = file_name(text)
    store = fill(folder / f"{name}.store", random_rows(2), [name, "b"], **{name: [name, "b"]})
    hits = store.search(random_rows(1), k=1)
    hits.to_html(folder / f"{name}.html")
    hits.to_csv(folder / f"{name}.csv")
    wrong = wrong_in_terminal(repr(store), {1})
    made = {path.name for path in folder.iterdir()}
    if made != {f"{name}{ending}" for ending in (".store", ".html", ".csv")}:
        wrong.append(f"made {sorted(made)}")
    # Nothing out of the data becomes the name of a file.
    for path in (folder / f"{name}.store").rglob("*"):
        if not re.fullmatch(r"[a-z0-9.-]+", path.name):
            wrong.append(f"made the file {path.name!r}")
    return wrong


# --- the trial


class Outcome:
    """What was checked and what was found."""

    def __init__(self, folder, port=9):
        self.folder, self.port = folder, port
        self.checks = self.refused = 0
        self.live = []
        self.pages = []  # (place, payload, text, page) to be opened in a browser
        self._harmless = {}

    def harmless(self, place, make):
        """What a place makes of harmless texts."""
        if place not in self._harmless:
            made = self._harmless[place] = []
            for text in HARMLESS:
                with contextlib.suppress(WhenceError):  # an id that is too long
                    made.append(make(text, self.folder))
        return self._harmless[place]

    def check(self, payload, text, place, make, judge):
        """One payload in one place; what it makes, or None where it is refused by name."""
        self.checks += 1
        try:
            made = make(text, self.folder)
        except WhenceError as error:
            # A zero byte in an id, say. The refusal repeats the text.
            self.refused += 1
            wrong, made = wrong_in_terminal(str(error), {1}), None
        else:
            wrong = judge(made)
        self.live += [f"{payload} in {place}: {each}" for each in wrong]
        return made

    def on_page(self, payload, text, place):
        """A payload in a place of a page."""
        make = PAGES[place]
        harmless = self.harmless(place, make)
        made = self.check(
            payload, text, place, make, lambda made: wrong_in_page(made, harmless, text)
        )
        if made is not None:
            self.pages.append((place, payload, made))

    def everywhere(self, payload, text):
        """A payload in every place."""
        for place in PAGES:
            self.on_page(payload, text, place)
        for place, make in TABLES.items():
            (harmless, *_) = self.harmless(place, make)
            self.check(payload, text, place, make, lambda made, h=harmless: wrong_in_table(made, h))
        for place, make in TERMINAL.items():
            lines = {len(made.split("\n")) for made in self.harmless(place, make)}
            self.check(payload, text, place, make, lambda made, n=lines: wrong_in_terminal(made, n))
        self.check(payload, text, "names of files", wrong_with_paths, lambda wrong: wrong)


PLACES = len(PAGES) + len(TABLES) + len(TERMINAL) + 1


def alive_where_nothing_is_escaped(port):
    """How many payloads the judges find on pages, in tables and in terminals without escaping.

    What makes them harmless must be the code under test, and not that nobody looks.
    """
    on_page = in_table = in_terminal = 0
    for text in payloads(port).values():
        raw = text.encode("utf-8", "replace").decode()
        pages = [
            (f"<p>{raw}</p>", "<p>x</p>"),
            (f'<p title="{raw}">x</p>', '<p title="x">x</p>'),
            (f"<p title='{raw}'>x</p>", "<p title='x'>x</p>"),
        ]
        on_page += any(
            [e if isinstance(e, str) else e[0] for e in Tree(hostile).structure]
            != [e if isinstance(e, str) else e[0] for e in Tree(plain).structure]
            for hostile, plain in pages
        )
        row = io.StringIO()
        csv.writer(row, lineterminator="\n").writerow(["0", raw])
        in_table += bool(wrong_in_table(row.getvalue(), "0,x\n"))
        in_terminal += bool(wrong_in_terminal(text, {1}))
    return on_page, in_table, in_terminal


class Listener:
    """Counts what is asked for at a port of this machine."""

    def __init__(self):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port, self.asked = self._socket.getsockname()[1], 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(1)
                if connection.recv(4096):  # a browser also connects ahead, and asks nothing
                    self.asked += 1
                connection.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")

    def close(self):
        self._socket.close()


def say(text):
    """Prints it at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def in_browser(outcome, browser, listener, screenshots):
    """Opens every page, with its policy and without; how many were opened."""
    folder, looked_at, opened = outcome.folder, {}, 0

    def look(markup):
        nonlocal opened
        opened += 1
        path = folder / "looked-at.html"
        path.write_text(markup, encoding="utf-8")
        return browser.opened(path)

    def forms(markup):
        """A page as it is, and with nothing but escaping between its text and the browser."""
        if not markup.startswith("<!DOCTYPE html>"):
            return {"in a notebook": f"<!DOCTYPE html><meta charset=utf-8><body>{markup}</body>"}
        bare, times = POLICY.subn("", markup)
        assert times == 1
        return {"as it is": markup, "without its policy": bare}

    for number, (place, payload, markup) in enumerate(outcome.pages):
        if place not in looked_at:
            looked_at[place] = {}
            for harmless in outcome.harmless(place, PAGES[place]):
                for form, text in forms(harmless).items():
                    looked_at[place].setdefault(form, []).append(look(text)["structure"])
        for form, text in forms(markup).items():
            asked = listener.asked
            seen = look(text)
            wrong = list(seen["did"])
            if seen["structure"] not in looked_at[place][form]:
                wrong.append("has other elements or attributes")
            if listener.asked != asked:
                wrong.append("was heard on the network")
            outcome.live += [f"{payload} in {place}, {form}, in the browser: {w}" for w in wrong]
        if number % 250 == 249:
            say(f"{number + 1:,} of {len(outcome.pages):,} pages opened")
    if screenshots is not None:
        photograph(outcome, browser, screenshots)
    return opened


def photograph(outcome, browser, folder):
    """Pictures of pages with all payloads, to be looked at."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [text.replace("\0", "") for text in payloads(outcome.port).values()]
    ids = [f"{number} {text}"[:MAX_ID] for number, text in enumerate(texts)]
    path = outcome.folder / "all"
    store = fill(path, random_rows(len(ids)), ids, label=texts, **{texts[4]: texts})
    hits = store.search(random_rows(1, seed=1), k=25)
    html.write_page(
        outcome.folder / "all.html",
        hits,
        title="Payloads " + texts[0],
        show=lambda id_: texts[int(id_.split()[0])],
        captions=[texts[42]],
        badge=lambda id_: id_,
        lead=texts[:3],
        before=[html.Section(texts[1], [html.table(texts[2], texts[:2], [texts[3:5]])])],
    )
    fragment = outcome.folder / "fragment.html"
    fragment.write_text(f"<meta charset=utf-8>{hits._repr_html_()}", encoding="utf-8")
    for name in ("all", "fragment"):
        page = outcome.folder / f"{name}.html"
        seen = browser.opened(page, screenshot=folder / f"{name}.png", height=6000)
        outcome.live += [f"all payloads on one page: {did}" for did in seen["did"]]


def alive_in_browser(browser, folder, port):
    """How many payloads act on a page that escapes nothing, and how many if it has our policy."""
    raw, behind_policy = 0, []
    for name, text in payloads(port).items():
        text = text.encode("utf-8", "replace").decode()
        contexts = (
            "{}",
            '<p title="{}">x</p>',
            "<p title='{}'>x</p>",
            "<svg><text>{}</text></svg>",
        )
        acts = []
        for context in contexts:
            written = context.replace("{}", text)
            pages = (
                f"<!DOCTYPE html><meta charset=utf-8><title>x</title><body>{written}</body>",
                section(Html(written)),
            )
            for page in pages:
                path = folder / "raw.html"
                path.write_text(page, encoding="utf-8")
                did = browser.opened(path, fresh=True)["did"]
                acts.append([each for each in did if not each.startswith("was refused")])
        raw += any(acts[::2])
        if any(each.startswith("set ") for did in acts[1::2] for each in did):
            behind_policy.append(name)
    return raw, behind_policy


def mixed(generator, texts):
    """Pieces of several payloads."""
    pieces = []
    for text in generator.choice(np.array(texts, object), generator.integers(2, 5)):
        start, end = sorted(generator.integers(0, len(text) + 1, 2))
        pieces.append(text[start:end][:2000])
    return "".join(pieces)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="open every page in Chromium also")
    parser.add_argument("--seed", type=int, default=0, help="of the mixtures (%(default)s)")
    parser.add_argument("--mixtures", type=int, help="how many (200 with --full, else 20)")
    parser.add_argument("--screenshots", type=Path, help="folder for pictures of pages")
    asked = parser.parse_args()
    mixtures = asked.mixtures if asked.mixtures is not None else (200 if asked.full else 20)
    generator, listener = np.random.default_rng(asked.seed), Listener()
    figures = []
    with tempfile.TemporaryDirectory() as scratch:
        outcome = Outcome(Path(scratch), listener.port)
        texts = payloads(listener.port)
        for payload, text in texts.items():
            outcome.everywhere(payload, text)
        for number in range(mixtures):
            place = str(generator.choice(list(PAGES)))
            text = mixed(generator, list(texts.values()))
            outcome.on_page(f"mixture {number}, {text!r},", text, place)
        counts = alive_where_nothing_is_escaped(listener.port)
        enough = all(np.array(counts) >= (30, 4, 10))
        if asked.full:
            from browser import Browser

            with Browser() as browser:
                opened = in_browser(outcome, browser, listener, asked.screenshots)
                silent = listener.asked
                raw, behind_policy = alive_in_browser(browser, outcome.folder, listener.port)
                enough = enough and raw >= 25 and listener.asked > silent == 0
                outcome.live += [f"{name} runs behind the policy" for name in behind_policy]
                figures = [
                    f"{opened:,} pages in {browser.version}",
                    f"of pages that escape nothing {raw} act, {len(behind_policy)} with our policy",
                ]
    listener.close()
    for live in outcome.live[:50]:
        say(live)
    reached = enough and not outcome.live
    figures = [
        f"{len(texts)} payloads in {PLACES} places and {mixtures} mixtures",
        f"{outcome.checks:,} checks, {outcome.refused} refused by name",
        *figures,
        f"where nothing is escaped {counts[0]} are found on pages, {counts[1]} in tables, "
        f"{counts[2]} in terminals",
        f"{len(outcome.live)} live",
    ]
    say(f"hostile payloads: {'; '.join(figures)} - {'reached' if reached else 'MISSED'}")
    sys.exit(not reached)


if __name__ == "__main__":
    main()
