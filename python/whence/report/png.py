"""Images as PNG, by the standard library."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence.errors import DtypeError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _COLOUR = 0, 2  # colour types of the format


def image(name: str, value: Any) -> NDArray[np.uint8]:
    """`value` as an image that can be encoded.

    Args:
        name: The argument as the caller wrote it.
        value: uint8 [height, width] grey or [height, width, 3] red, green, blue; an array or a
            tensor.

    Raises:
        DtypeError: If it is anything else.
    """
    array = _arrays.to_numpy(value)
    good = (
        isinstance(array, np.ndarray)
        and array.dtype == np.uint8
        and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3))
        and array.size > 0
    )
    if not good:
        raise DtypeError(
            f"{name} must be a str or a uint8 image of [height, width] or [height, width, 3], "
            f"got {_arrays.describe(array)}"
        )
    return np.ascontiguousarray(array)


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file, without loss.

    Args:
        pixels: [height, width] or [height, width, 3], as `image` returns it.
    """
    height, width = pixels.shape[:2]
    colour = _GREY if pixels.ndim == 2 else _COLOUR
    # Each line starts with the number of its filter; 0 is none.
    lines = np.zeros((height, 1 + pixels[0].size), np.uint8)
    lines[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"".join(
        (
            _SIGNATURE,
            _chunk(b"IHDR", header),
            _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
            _chunk(b"IEND", b""),
        )
    )


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """The image as an address that holds it, for `src` of an `img`."""
    return "data:image/png;base64," + base64.b64encode(encode(pixels)).decode("ascii")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
