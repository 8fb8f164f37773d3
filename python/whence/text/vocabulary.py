"""Words of texts, and numbers for them."""

from __future__ import annotations

import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence.errors import ArgumentError, DtypeError, ShapeError

TEXTS, WORDS, NUMBERS = "a str", "a list of str tokens", "a list of token ids"
"""The kinds of documents and queries."""

MAX_TOKEN = 2**32 - 1

Encoded = tuple[NDArray[np.uint32], NDArray[np.uint64]]
"""Tokens of all texts, one text behind the other; [texts + 1] where each begins."""


class _Words(dict[int, str]):
    """Code point -> the character, if it is part of a word, or a space; found when first asked."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = character if unicodedata.category(character)[0] in "LMN" else " "
        return self[code]


_WORDS = _Words()
_ASCII = "".join(_WORDS[code] for code in range(128)).lower().encode() + b" " * 128


def words(text: str) -> list[str]:
    """The words of a text: lower-cased runs of letters, marks and numbers.

    The text is put in normal form NFKC and lower-cased, and cut wherever a character is of none of
    the Unicode categories L, M and N: at spaces, punctuation, symbols and underscores. Nothing is
    stemmed or left out. Text that is written without spaces, as Chinese is, becomes long words: for
    those give lists of tokens.

    Raises:
        DtypeError: If it is not a str.

    Examples:
        >>> words("Don't panic: 42² naïve_CAFÉS")
        ['don', 't', 'panic', '422', 'naïve', 'cafés']
    """
    if not isinstance(text, str):
        raise DtypeError(f"text must be a str, got {_arrays.describe(text)}")
    if text.isascii():  # for which the normal form is the text; the same in half the time
        return text.encode().translate(_ASCII).decode().split()
    return unicodedata.normalize("NFKC", text).lower().translate(_WORDS).split()


class Vocabulary:
    """Numbers of the tokens of documents: of words in the order they appear, or ids as they are."""

    def __init__(self) -> None:
        self._kind: str | None = None
        self._numbers: defaultdict[str, int] = defaultdict()
        self._numbers.default_factory = self._numbers.__len__

    def learn(self, documents: Any) -> Encoded:
        """The tokens of documents, with numbers for words that are new.

        Raises:
            ArgumentError: If a token id is out of range.
            DtypeError: If documents are of no kind, or of several.
            ShapeError: If a document does not have one dimension.
        """
        return self._encoded("documents", documents, learn=True)

    def encode(self, queries: Any) -> Encoded:
        """The tokens of queries; words that no document has are left out.

        Raises:
            WhenceError: As `learn`, and if queries are not of the kind of the documents.
        """
        return self._encoded("queries", queries, learn=False)

    def _encoded(self, name: str, texts: Any, *, learn: bool) -> Encoded:
        texts = _arrays.to_numpy(texts)
        if isinstance(texts, (str, bytes, Mapping, Set)) or not isinstance(texts, Iterable):
            raise DtypeError(
                f"{name} must be a list of texts or of lists of tokens, "
                f"got {_arrays.describe(texts)}"
            )
        if isinstance(texts, np.ndarray) and not texts.ndim:
            raise ShapeError(f"{name} must be a list, got {_arrays.describe(texts)}")
        tokens, starts = array("I"), array("Q", [0])
        for number, text in enumerate(texts):
            kind, found = _tokens_of(name, number, text)
            if kind is not None and kind != self._kind:
                if self._kind is not None:
                    raise DtypeError(
                        f"{name}[{number}] must be {self._kind} as the documents before, got {kind}"
                    )
                if learn:
                    self._kind = kind
            if isinstance(found, np.ndarray):
                tokens.frombytes(found.tobytes())
            elif kind == NUMBERS:
                _extend(tokens, name, number, found)
            elif learn:
                tokens.extend(map(self._numbers.__getitem__, found))
            else:
                known = map(self._numbers.get, found)
                tokens.extend([number for number in known if number is not None])
            starts.append(len(tokens))
        return np.frombuffer(tokens, np.uint32), np.frombuffer(starts, np.uint64)


def _tokens_of(name: str, number: int, text: Any) -> tuple[str | None, Any]:
    """The kind of a text, None for an empty list, which is of any; and its tokens.

    They are a list of str; a list of integers, still of any size; or a uint32 array.

    Raises:
        ArgumentError: If a token id in an array is out of range.
        DtypeError: If it is of no kind.
        ShapeError: If it does not have one dimension.
    """
    if isinstance(text, str):
        return TEXTS, words(text)
    if not isinstance(text, list):
        text = _arrays.to_numpy(text)
    if isinstance(text, np.ndarray):
        if text.ndim != 1:
            shape = list(text.shape)
            raise ShapeError(f"{name}[{number}] must have one dimension, got shape {shape}")
        if text.dtype.kind in "iu" and text.size:
            if text.min() < 0 or text.max() > MAX_TOKEN:
                raise _out_of_range(name, number, text.tolist())
            return NUMBERS, text.astype(np.uint32)
        text = text.tolist()
    must = f"must be {TEXTS}, {WORDS} or {NUMBERS}"
    if isinstance(text, (bytes, bytearray)) or not isinstance(text, Sequence):
        raise DtypeError(f"{name}[{number}] {must}, got {_arrays.describe(text)}")
    kinds = set(map(type, text))
    if not kinds:
        return None, []
    if kinds == {str} or all(issubclass(kind, str) for kind in kinds):
        return WORDS, text
    integers = (int, np.integer)
    if kinds == {int} or all(issubclass(k, integers) and k is not bool for k in kinds):
        return NUMBERS, text
    named = " and ".join(sorted(kind.__name__ for kind in kinds))
    raise DtypeError(f"{name}[{number}] {must}, got a list of {named}")


def _extend(tokens: array[int], name: str, number: int, found: Sequence[int]) -> None:
    """Adds token ids to others.

    Raises:
        ArgumentError: If one is out of range.
    """
    try:
        tokens.extend(found)
    except OverflowError:
        raise _out_of_range(name, number, found) from None


def _out_of_range(name: str, number: int, tokens: Sequence[int]) -> ArgumentError:
    wrong = next(token for token in tokens if not 0 <= token <= MAX_TOKEN)
    return ArgumentError(f"{name}[{number}] must hold token ids from 0 to {MAX_TOKEN}, got {wrong}")
