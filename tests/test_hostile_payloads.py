"""Hostile text in every place that shows data is only text, and the trial that says so can fail.

The short form of tests/reliability/hostile_payloads.py, which opens the pages in a browser too.
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parent / "reliability"))

from hostile_payloads import (
    LIVE,
    PAGES,
    PAYLOADS,
    POLICY,
    Outcome,
    alive_where_nothing_is_escaped,
    payloads,
    wrong_in_page,
)

from whence import _plain
from whence.report import safe

NEVER = re.compile("(?!)()()")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What places make of harmless texts is worked out once."""
    return Outcome(tmp_path_factory.mktemp("payloads"))


@pytest.fixture
def outcome(shared):
    shared.live.clear()
    return shared


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_is_text_in_every_place(outcome, payload):
    outcome.everywhere(payload, payloads(9)[payload])
    assert outcome.live == []


# --- the trial can fail


def test_it_finds_payloads_that_nobody_made_harmless():
    on_page, in_table, in_terminal = alive_where_nothing_is_escaped(9)
    assert on_page >= 30
    assert in_table >= 4
    assert in_terminal >= 10


@pytest.mark.parametrize("place", PAGES)
def test_it_finds_markup_that_is_not_escaped_in_any_place(outcome, monkeypatch, place):
    outcome.harmless(place, PAGES[place])
    monkeypatch.setattr(safe, "html", SimpleNamespace(escape=str))
    outcome.on_page("script", f'"><script>{LIVE}</script>', place)
    assert [each for each in outcome.live if "other elements" in each]


def test_it_finds_controls_that_are_not_written_out(outcome, monkeypatch):
    monkeypatch.setattr(_plain, "_HIDDEN", NEVER)
    outcome.everywhere("colours", "\x1b[31mred\u202e")
    places = {each.split(": holds")[0].removeprefix("colours in ") for each in outcome.live}
    assert {"text: id", "csv: label", "command: argument", "layer name", "progress bar"} <= places
    assert {"id", "title", "fragment: label"} <= places


def test_it_finds_formulas(outcome, monkeypatch):
    monkeypatch.setattr(_plain, "_FORMULA", NEVER)
    outcome.everywhere("formula", "=1+1")
    assert {each.split(": runs")[0] for each in outcome.live} == {
        f"formula in csv: {what}" for what in ("a store of it", "id", "label", "column name")
    }


def test_it_finds_a_page_without_its_policy(outcome):
    make = PAGES["label"]
    harmless = outcome.harmless("label", make)
    page = make("text", outcome.folder)
    assert wrong_in_page(page, harmless, "text") == []
    assert "has no strict policy before its style" in wrong_in_page(
        POLICY.sub("", page), harmless, "text"
    )
    weaker = page.replace("default-src &#x27;none&#x27;", "default-src *")
    assert wrong_in_page(weaker, harmless, "text")
