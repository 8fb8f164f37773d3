"""Text, fragments and pages show what hits hold, and nothing in the data is more than text."""

import base64
import csv
import hashlib
import os
import re
import struct
import sys
import zlib
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from filled import fill, random_rows

import whence
from whence.errors import ArgumentError, DtypeError
from whence.report import chart, html, png
from whence.report.safe import Html, escape, signed, tag

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</style></title><b>&lt;",
    "bell\x07 escape\x1b[31m null-like\x01 c1\x9b",
    "left \u202eright\u2066 \u200f",
    "half \ud800 a pair",
)
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, and their text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes), f"{name} has an attribute twice"
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.texts.append(text)

    def all(self, name, kind=None):
        return [a for n, a in self.elements if n == name and kind in (None, *_kinds(a))]

    @property
    def text(self):
        return " ".join(self.texts)


def _kinds(attributes):
    return (attributes.get("class") or "").split()


def decode(data):
    """A second way to read a PNG: chunks by hand, all filters of the standard."""
    assert data[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10])
    at, chunks = 8, []
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        (checksum,) = struct.unpack(">I", data[at + 8 + size : at + 12 + size])
        assert checksum == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + size
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (depth, rest) == (8, [0, 0, 0])
    channels = {0: 1, 2: 3}[colour]
    raw = zlib.decompress(chunks[1][1])
    stride = 1 + width * channels
    assert len(raw) == height * stride
    rows = []
    for start in range(0, len(raw), stride):
        assert raw[start] == 0, "this encoder filters no line"
        rows.append(list(raw[start + 1 : start + stride]))
    pixels = np.array(rows, np.uint8).reshape(height, width, channels)
    return pixels[..., 0] if channels == 1 else pixels


@pytest.fixture
def store(tmp_path):
    rows = random_rows(40)
    return fill(tmp_path / "store", rows, label=np.arange(40) % 10, loss=np.linspace(0, 2, 40))


@pytest.fixture
def hits(store):
    return store.search(random_rows(3, seed=1), k=4)


def page_of(hits, tmp_path, **options):
    path = hits.to_html(tmp_path / "page.html", **options)
    return Page(path.read_text(encoding="utf-8"))


def scores_in(page):
    return [float(attributes["value"]) for attributes in page.all("data")]


def in_page_order(hits):
    """[queries · 2 · width] helpful then harmful of each query."""
    return np.stack([hits.helpful.scores, hits.harmful.scores], axis=1).reshape(-1)


# --- PNG


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (3, 17), (5, 4, 3), (1, 1, 3)])
def test_a_png_holds_the_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.testing.assert_array_equal(decode(png.encode(png.image("image", pixels))), pixels)


def test_a_png_of_a_view_holds_the_view():
    pixels = np.arange(60, dtype=np.uint8).reshape(6, 10)[::2, ::-1]
    np.testing.assert_array_equal(decode(png.encode(png.image("image", pixels))), pixels)


def test_a_tensor_is_an_image():
    pixels = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    np.testing.assert_array_equal(png.image("image", pixels), pixels.numpy())


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (np.zeros((8, 8)), r"float64 of shape \[8, 8\]"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 of shape \[3, 8, 8\]"),
        (np.zeros(8, np.uint8), r"uint8 of shape \[8\]"),
        (np.zeros((0, 8), np.uint8), r"uint8 of shape \[0, 8\]"),
        (torch.zeros(2, 2), r"float32 of shape \[2, 2\]"),
        (None, "NoneType None"),
        (b"text", "bytes b'text'"),
    ],
)
def test_what_is_no_image_is_refused_by_name(hits, tmp_path, value, got):
    with pytest.raises(DtypeError, match=rf"^show\(\d+\) must be a str or a uint8 image.*{got}$"):
        hits.to_html(tmp_path / "page.html", show=lambda _: value)
    assert list(tmp_path.glob("*.html*")) == []


def test_a_query_that_cannot_be_shown_is_named(hits, tmp_path):
    with pytest.raises(DtypeError, match=r"^queries\[1\] must be a str or a uint8 image"):
        hits.to_html(tmp_path / "page.html", queries=["a", 7, "c"])


# --- what pages, fragments and texts hold


def test_a_page_holds_every_score_exactly(hits, tmp_path):
    found = scores_in(page_of(hits, tmp_path))
    np.testing.assert_array_equal(np.float32(found), in_page_order(hits))


def test_a_page_writes_every_score_with_its_sign(hits, tmp_path):
    path = hits.to_html(tmp_path / "page.html")
    written = re.findall(r"<data [^>]*>([^<]*)</data>", path.read_text(encoding="utf-8"))
    for shown, score in zip(written, in_page_order(hits), strict=True):
        assert shown[0] == ("+" if score > 0 else "\N{MINUS SIGN}")
        assert float(shown.replace("\N{MINUS SIGN}", "-")) == pytest.approx(score, rel=5e-3)


def test_a_page_says_what_scores_mean(hits, tmp_path):
    text = page_of(hits, tmp_path).text
    for meaning in (hits.sign, hits.method, hits.unit, "4 examples at each end, of 40 eligible"):
        assert meaning in text


def test_a_page_shows_ids_and_columns_of_each_hit(hits, store, tmp_path):
    texts = page_of(hits, tmp_path).texts
    names = [text for text in texts if text.startswith("id ")]
    ids = np.stack([hits.helpful.ids, hits.harmful.ids], axis=1).reshape(-1)
    assert names == [f"id {id_}" for id_ in ids]
    labels = [after for text, after in pairwise(texts) if text == "label"]
    assert [int(label) for label in labels] == store.columns["label"][ids].tolist()


def test_a_page_shows_the_image_of_each_hit(hits, tmp_path):
    images = np.random.default_rng(2).integers(0, 256, (40, 4, 4)).astype(np.uint8)
    page = page_of(hits, tmp_path, show=lambda id_: images[id_])
    ids = np.stack([hits.helpful.ids, hits.harmful.ids], axis=1).reshape(-1)
    drawn = page.all("img")
    assert len(drawn) == len(ids)
    for attributes, id_ in zip(drawn, ids, strict=True):
        start, data = attributes["src"].split(",")
        assert start == "data:image/png;base64"
        np.testing.assert_array_equal(decode(base64.b64decode(data)), images[id_])
        assert attributes["alt"] == f"training example {id_}"


def test_small_images_are_enlarged_without_blur_and_large_ones_left(hits, tmp_path):
    sizes = {True: np.zeros((8, 4), np.uint8), False: np.zeros((300, 200, 3), np.uint8)}
    page = page_of(hits, tmp_path, show=lambda id_: sizes[bool(id_ % 2)])
    seen = {(a["width"], a["height"], a.get("class")) for a in page.all("img")}
    assert seen <= {("48", "96", "small"), ("200", "300", None)}


def test_each_example_is_shown_by_one_call(hits, tmp_path):
    calls = []

    def show(id_):
        calls.append(id_)
        return "text"

    page_of(hits, tmp_path, show=show)
    assert len(calls) == len(set(calls))
    assert all(type(call) is int for call in calls)


def test_a_page_shows_what_was_asked(hits, tmp_path):
    page = page_of(hits, tmp_path, queries=["first", np.zeros((2, 2), np.uint8), "third"])
    assert "first" in page.texts
    assert "third" in page.texts
    assert [a["alt"] for a in page.all("img")] == ["query 1"]


def test_a_long_text_can_be_opened_and_is_whole(hits, tmp_path):
    text = "word " * 400
    page = page_of(hits, tmp_path, show=lambda _: text)
    assert len(page.all("details")) == 24
    assert page.texts.count(text) == 24


def test_bars_stand_on_the_side_of_their_sign_and_grow_with_the_score():
    positive, negative, half = (
        Page(chart.bar(score, 2.0)).all("rect")[1] for score in (2.0, -2.0, 1.0)
    )
    assert (float(positive["x"]), float(positive["width"])) == (50, 50)
    assert (float(negative["x"]), float(negative["width"])) == (0, 50)
    assert float(half["width"]) == 25


def test_a_curve_is_drawn_where_its_values_are():
    heights = np.array([0.0, 0.25, 1.0, 1.0, 1.0])
    drawn = chart.curves({"a": heights}, title="t", across="x", up="y", until=0.5)
    (points,) = re.findall(r'points="([^"]*)"', drawn)
    places = np.array([[float(n) for n in pair.split(",")] for pair in points.split()])
    shares = (places - places[0]) / (places[-1] - places[0])
    np.testing.assert_allclose(shares, [[0, 0], [0.5, 0.25], [1, 1]], atol=1e-3)


def test_curves_that_could_not_be_told_apart_are_refused():
    series = {str(n): np.zeros(2) for n in range(6)}
    with pytest.raises(ArgumentError, match=r"^series must be at most 5 curves, got 6$"):
        chart.curves(series, title="t", across="x", up="y")


def test_sections_stand_before_and_after_the_hits(hits, tmp_path):
    path = tmp_path / "page.html"
    html.write_page(
        path,
        hits,
        title="Title",
        before=[html.Section("First", ["one & two"])],
        after=[html.Section("Last", [html.table("Caption", ["a", "b"], [["x", "1"]])])],
    )
    page = Page(path.read_text(encoding="utf-8"))
    order = [
        page.text.rindex(part) for part in ("First", "one & two", "Query 0", "Last", "Caption")
    ]
    assert order == sorted(order)


def test_a_fragment_holds_the_first_scores_of_each_query(hits):
    found = scores_in(Page(hits._repr_html_()))
    by_rank = np.stack([hits.helpful.scores, hits.harmful.scores], axis=2).reshape(-1)
    np.testing.assert_array_equal(np.float32(found), by_rank)


def test_a_fragment_styles_nothing_but_itself(hits):
    (style,) = re.findall(r"<style>(.*?)</style>", hits._repr_html_(), re.DOTALL)
    selectors = [
        part.strip() for rule in re.findall(r"([^{}]+){", style) for part in rule.split(",")
    ]
    assert selectors
    assert all(selector.startswith(".whence-hits ") for selector in selectors)


def test_text_holds_sign_method_unit_and_signed_scores(hits):
    text = str(hits)
    for meaning in (hits.sign, hits.method, hits.unit):
        assert meaning in text
    rows = [line.split() for line in text.splitlines() if re.match(r"  +\d", line)]
    assert len(rows) == 12
    for number, cells in enumerate(rows):
        query, rank = divmod(number, 4)
        # rank, then id, score, label, loss of each side
        assert [int(cells[1]), int(cells[5])] == [
            hits.helpful.ids[query, rank],
            hits.harmful.ids[query, rank],
        ]
        assert cells[2] == signed(hits.helpful.scores[query, rank])
        assert cells[6] == signed(hits.harmful.scores[query, rank])


def test_text_and_fragment_stay_short_and_say_what_they_leave_out(store):
    hits = store.search(random_rows(12, seed=1), k=11)
    for short in (str(hits), Page(hits._repr_html_()).text):
        assert "and 1 more rank of each query" in short
        assert "and 2 more queries" in short
    assert len(scores_in(Page(hits._repr_html_()))) == 10 * 10 * 2


def test_text_has_its_columns_one_below_the_other(tmp_path):
    labels = ["a", "文字", "e\u0301", "longer label"] * 2
    ids = [f"id{number}" for number in range(8)]
    store = fill(tmp_path / "s", random_rows(8), ids, label=labels)
    rows = str(store.search(random_rows(1), k=8)).splitlines()[8:]
    befores = [row[: [found.start() for found in re.finditer("id", row)][1]] for row in rows]
    # A wide character takes two cells of a terminal, a combining accent none.
    cells = [len(before) + before.count("文") + before.count("字") for before in befores]
    assert (
        len({count - before.count("\u0301") for count, before in zip(cells, befores, strict=True)})
        == 1
    )
    assert len(rows) == 8


@pytest.mark.parametrize(
    ("score", "written"),
    [(0.012345, "+0.0123"), (-4.5, "-4.50"), (123.4, "+123"), (0.0, "0"), (1e-9, "+1.00e-09")],
)
def test_a_signed_score_always_has_its_sign(score, written):
    assert signed(score) == written


# --- tables for programs


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_a_csv_holds_the_table_of_pandas(hits, tmp_path):
    path = tmp_path / "hits.csv"
    assert hits.to_csv(path) == path
    kinds = {"score": np.float32, "id": np.int64}
    pandas.testing.assert_frame_equal(pandas.read_csv(path, dtype=kinds), hits.to_pandas())


def test_the_table_has_each_hit_once_in_order(hits, store):
    table = hits.to_pandas()
    assert list(table) == ["query", "side", "rank", "id", "score", "label", "loss"]
    row = iter(table.itertuples(index=False))
    for query in range(3):
        for name, side in (("helpful", hits.helpful), ("harmful", hits.harmful)):
            for rank in range(4):
                id_ = side.ids[query, rank]
                found = (query, name, rank, id_, side.scores[query, rank])
                assert next(row) == (
                    *found,
                    store.columns["label"][id_],
                    store.columns["loss"][id_],
                )
    assert next(row, None) is None


def test_a_csv_needs_no_pandas(hits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert len(read_csv(hits.to_csv(tmp_path / "hits.csv"))) == 1 + 3 * 2 * 4


def test_text_in_a_csv_runs_nothing_and_numbers_stay_numbers(tmp_path):
    ids = ["=1+1", "-2", "@SUM(A1)"]
    label = ["+cmd|' /C calc'!A0", "two\nlines", 'quote " and, comma']
    store = fill(tmp_path / "s", random_rows(3), ids, label=label, loss=[-1.5, 2.0, -3.0])
    rows = read_csv(store.search(random_rows(1), k=3, side="helpful").to_csv(tmp_path / "h.csv"))
    assert rows[0] == ["query", "side", "rank", "id", "score", "label", "loss"]
    assert {row[3]: (row[5], row[6]) for row in rows[1:]} == {
        "'=1+1": ("'+cmd|' /C calc'!A0", "-1.5"),
        "'-2": ("two lines", "2.0"),
        "'@SUM(A1)": ('quote " and, comma', "-3.0"),
    }


def test_names_of_columns_in_a_csv_run_nothing_and_hide_no_other(tmp_path):
    columns = {"=1": [1], "id": [2], "column_id": [3], "score": [4]}
    store = fill(tmp_path / "s", random_rows(1), **columns)
    names, values = read_csv(store.search(random_rows(1), k=1).to_csv(tmp_path / "h.csv"))[:2]
    own = ["query", "side", "rank", "id", "score"]
    assert sorted(names[5:]) == ["'=1", "column_column_id", "column_id", "column_score"]
    assert names[:5] == own
    assert sorted(values[5:]) == ["1", "2", "3", "4"]


def test_a_table_or_page_goes_into_a_device_and_does_not_take_its_place(hits, tmp_path):
    link = tmp_path / "nowhere"
    link.symlink_to(os.devnull)
    hits.to_csv(link)
    hits.to_html(link)
    assert link.is_symlink()
    assert not Path(os.devnull).is_file()


def test_a_file_may_have_as_long_a_name_as_the_system_takes(hits, tmp_path):
    for name, write in (("n" * 250 + ".html", hits.to_html), ("n" * 250 + ".csv", hits.to_csv)):
        assert write(tmp_path / name).is_file()
    assert len(list(tmp_path.glob("n*"))) == 2


# --- nothing in the data is more than text


@pytest.fixture
def hostile(tmp_path):
    """Hits whose ids, labels and column names are all hostile."""
    count = len(HOSTILE)
    names = {text.replace("\ud800", ""): [text.replace("\ud800", "")] * count for text in HOSTILE}
    ids = [f"{number} {text}".replace("\ud800", "") for number, text in enumerate(HOSTILE)]
    store = fill(tmp_path / "store", random_rows(count), ids, **names)
    return store.search(random_rows(1, seed=1), k=count)


def test_hostile_data_makes_no_element_and_no_attribute(hostile, tmp_path):
    plain_elements = {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "h4", "p",
        "nav", "ul", "li", "a", "main", "section", "div", "dl", "dt", "dd", "article", "ol", "data",
        "svg", "rect", "bdi", "footer",
    }  # fmt: skip
    text = HOSTILE[1]
    page = page_of(hostile, tmp_path, show=lambda id_: id_, queries=[text], title="</title>" + text)
    assert {name for name, _ in page.elements} <= plain_elements
    assert not [key for _, given in page.elements for key in given if key.startswith("on")]
    assert {given["href"][0] for given in page.all("a")} == {"#"}


def test_hostile_data_is_shown_as_text(hostile, tmp_path):
    for shown in (page_of(hostile, tmp_path).text, Page(hostile._repr_html_()).text):
        for text in HOSTILE[:4]:
            assert text in shown


def test_no_control_character_reaches_any_output(hostile, tmp_path):
    path = hostile.to_html(tmp_path / "page.html", show=lambda id_: id_, title="\x1b[31m\u202e")
    forbidden = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
    for written in (path.read_text(encoding="utf-8"), hostile._repr_html_(), str(hostile)):
        assert forbidden.search(written) is None


def test_a_label_cannot_add_a_line_to_the_text(tmp_path):
    store = fill(tmp_path / "s", random_rows(2), label=["a\nquery 9\r\n", "b\u2028\u0085c"])
    lines = str(store.search(random_rows(1), k=2)).splitlines()
    assert len(lines) == 5 + 2 + 1 + 2


def test_direction_marks_cannot_reorder_what_stands_beside_them(tmp_path):
    store = fill(tmp_path / "s", random_rows(2), ["\u202eabc", "def\u200f"], label=["\u2067x", "y"])
    hits = store.search(random_rows(1), k=2)
    path = hits.to_html(tmp_path / "page.html")
    assert re.search("[\u200e\u200f\u202a-\u202e\u2066-\u2069]", str(hits)) is None
    names = re.findall(r'<div class="name">(.*?)</div>', path.read_text(encoding="utf-8"))
    assert sorted(set(names)) == ["<bdi>id \\u202eabc</bdi>", "<bdi>id def\\u200f</bdi>"]


def test_a_long_id_or_label_does_not_fill_the_page(tmp_path):
    long = "W" * 100_000
    store = fill(tmp_path / "s", random_rows(2), [long[:1024], "b"], label=[long, "c"])
    page = page_of(store.search(random_rows(1), k=2), tmp_path)
    assert 300 < len("".join(text for text in page.texts if "WWW" in text)) < 1000


def test_half_a_surrogate_pair_can_be_written(hits, tmp_path):
    page = page_of(hits, tmp_path, show=lambda _: "half \ud800 a pair")
    assert r"half \ud800 a pair" in page.texts


def test_text_is_escaped_unless_it_is_markup():
    assert tag("p", "<b>", Html("<i></i>"), class_='"x"') == (
        '<p class="&quot;x&quot;">&lt;b&gt;<i></i></p>'
    )
    assert escape("a" + Html("<b>")) == "a&lt;b&gt;", "markup joined to text is text"


# --- the page as a file


def test_a_page_loads_nothing_and_runs_nothing(hits, tmp_path):
    page = page_of(hits, tmp_path, show=lambda _: np.zeros((2, 2), np.uint8))
    assert not {"script", "link", "iframe", "object", "base"} & {n for n, _ in page.elements}
    addresses = [a[key] for _, a in page.elements for key in ("src", "href") if key in a]
    assert all(address.startswith(("data:image/png;base64,", "#part-")) for address in addresses)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_the_policy_allows_the_one_style_sheet_and_images_inside(hits, tmp_path):
    page = page_of(hits, tmp_path)
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert not [a for _, a in page.elements if "style" in a], "the policy forbids these"


def test_headings_go_down_one_level_at_a_time(hits, tmp_path):
    levels = [int(n[1]) for n, _ in page_of(hits, tmp_path).elements if re.fullmatch(r"h\d", n)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))


def test_a_page_has_language_alternatives_and_names(hits, tmp_path):
    page = page_of(hits, tmp_path, show=lambda _: np.zeros((2, 2), np.uint8))
    assert page.all("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in page.all("img"))
    identities = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identities) == len(set(identities))
    assert {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a} <= set(
        identities
    )


def test_a_page_replaces_the_one_before_and_leaves_no_other_file(hits, tmp_path):
    path = tmp_path / "folder" / "page.html"
    path.parent.mkdir()
    path.write_text("before", encoding="utf-8")
    assert hits.to_html(path) == path
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list(path.parent.iterdir()) == [path]


def test_a_page_that_cannot_be_made_leaves_the_one_before(hits, tmp_path):
    path = tmp_path / "folder" / "page.html"
    path.parent.mkdir()
    path.write_text("before", encoding="utf-8")
    with pytest.raises(DtypeError):
        hits.to_html(path, show=lambda _: 3)
    assert path.read_text(encoding="utf-8") == "before"
    assert list(path.parent.iterdir()) == [path]


def test_the_same_hits_make_the_same_page(hits, tmp_path):
    first = hits.to_html(tmp_path / "a.html").read_bytes()
    assert hits.to_html(tmp_path / "b.html").read_bytes() == first


def test_one_side_and_approximate_answers_are_drawn_as_what_they_are(tmp_path):
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    index = whence.Index(rows, "certified")
    hits = index.search(rows[:2], 3, side="harmful")
    page = hits.to_html(tmp_path / "a.html").read_text()
    for drawn in (str(hits), hits._repr_html_(), page):
        assert "3 examples at the harmful end" in drawn
        assert "exact: the hits of a scan" in drawn
        assert str(hits.harmful.ids[1, 2]) in drawn
    assert "helpful" not in "".join(str(hits).splitlines()[6:])
    assert set(hits.to_pandas().side) == {"harmful"}
    assert "approximate: chosen by estimates" in str(index.search(rows[:2], 2, approximate=True))


def test_an_error_of_the_system_names_the_page_that_was_asked_for(tmp_path, hits):
    page = tmp_path / "nowhere" / "x.html"
    with pytest.raises(FileNotFoundError) as caught:
        hits.to_html(page)
    assert caught.value.filename == str(page)
