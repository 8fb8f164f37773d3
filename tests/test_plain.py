"""What acts, reorders or hides is written out; what is only unusual is left as it is."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whence._plain import cell, clean, line
from whence.errors import StoreError, WhenceError

# Unicode's format characters that are seen: number signs of Arabic, Syriac and Kaithi, and the
# signs that arrange hieroglyphs.
SEEN = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}
SEEN |= set(range(0x13430, 0x13440))
JOINERS = {0x200C, 0x200D}


def is_unseen(letter):
    """By Python's own table of Unicode."""
    if letter in "\t\n" or ord(letter) in SEEN:
        return False
    return unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def test_every_control_format_character_and_surrogate_is_written_out_or_breaks_a_line():
    for number in range(0x110000):
        letter = chr(number)
        if is_unseen(letter):
            written = line(f"a{letter}b")
            assert written in (f"a{ascii(letter)[1:-1]}b", "a b"), hex(number)
            assert written != "a b" or letter in "\r\u2028\u2029"


def test_letters_marks_numbers_and_signs_stay():
    kept = [
        chr(number) for number in range(0x110000) if unicodedata.category(chr(number))[0] in "LMNPS"
    ]
    changed = {letter for letter in kept if line(f"a{letter}b") != f"a{letter}b"}
    # Blank letters, and what chooses how the letter before it is drawn.
    selectors = {chr(n) for n in (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))}
    assert changed == selectors | set("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")


@pytest.mark.parametrize(
    "text",
    [
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # a Persian word
        "\u0915\u094d\u200d\u0937",  # half a Hindi letter
        "\u2764\ufe0f\u200d\U0001f525",  # a heart on fire
        "\u845b\U000e0100",  # a Chinese character in one of its forms
    ],
)
def test_what_shapes_a_letter_stays(text):
    assert line(text) == text


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a\u200db", r"a\u200db"),
        ("\u0645\u200c\u200d\u200cx", "\u0645\u200c\\u200d\\u200cx"),
        ("a\ufe0f", r"a\ufe0f"),
        ("\u202e\ufe0f", r"\u202e\ufe0f"),
    ],
)
def test_what_shapes_no_letter_is_written_out(text, written):
    assert line(text) == written


@given(st.text(st.characters()))
def test_no_text_at_all_reaches_a_terminal_with_more_than_text(text):
    for shown, allowed in ((line(text), ""), (clean(text), "\t\n")):
        assert not [
            letter
            for letter in shown
            if is_unseen(letter) and letter not in allowed and ord(letter) not in JOINERS
        ]
    assert len(line(text).splitlines()) <= 1


@given(st.text(), st.text())
def test_texts_that_differ_only_in_what_is_not_seen_look_different(one, other):
    assert line(one + "\u200b" + other) != line(one + other)


def test_text_in_many_scripts_is_left_alone():
    for text in ("naïve", "שלום", "مرحبا", "文字", "हिन्दी", "e\u0301", "👍🏽", "x\u00a0y", r"\x1b"):
        assert clean(text) is text


def test_tabs_and_newlines_stay_in_texts_and_leave_lines():
    assert clean("a\tb\nc\r\nd\re\u2028f") == "a\tb\nc\nd\ne\nf"
    assert line("a\tb\n\nc") == "a b c"
    assert line("abcdefgh", 6) == "abc..."


# --- cells of a table


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20"])
@pytest.mark.parametrize("before", ["", " ", "\t", "\r", "\n", "\u00a0", '"', ' "', "\u2028="])
def test_no_cell_starts_as_a_formula(first, before):
    written = cell(f"{before}{first}1+1")
    assert written.startswith("'")
    assert written[1:] == line(f"{before}{first}1+1")


def test_no_cell_starts_as_a_formula_where_semicolons_part_cells():
    assert cell('a;=1;"+2";b') == "a;'=1;'\"+2\";b"


@pytest.mark.parametrize("text", ["", "a=b", "1-2", "'=1", "x@y.z", "a, -b", "\\x1b", "#"])
def test_a_cell_that_starts_as_no_formula_is_left_alone(text):
    assert cell(text) == text


# --- errors


def test_errors_are_one_line_without_controls():
    assert str(WhenceError("x\x1b[31m\r\ny\u202e")) == r"x\x1b[31m y\u202e"
    assert str(StoreError("/tmp/\x07")) == r"/tmp/\x07"


def test_an_error_of_the_system_keeps_its_parts():
    error = StoreError(2, "No such file", "a\nb")
    assert (error.errno, error.filename) == (2, "a\nb")
    assert str(error) == r"[Errno 2] No such file: 'a\nb'"
