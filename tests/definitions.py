"""The matrix of every kind of sketch, written out from its definition in plain Python.

A second way of knowing: nothing here uses the library. See `docs/randomness.md`.
"""

from itertools import pairwise
from statistics import NormalDist

import numpy as np

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
HALF = 2**63


def mix(z):
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


def parameter_key(seed, name, shape):
    data = name.encode()
    words = [seed]
    words += [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    words += [len(data), *shape, len(shape)]
    state = 0
    for word in words:
        state = mix(((state ^ word) + GOLDEN) & MASK)
    return state


def value(key, counter):
    return mix((key + (counter + 1) * GOLDEN) & MASK)


def below(bits, n):
    """A number below n from the upper 32 bits."""
    return (bits >> 32) * n >> 32


def sign(bits):
    return -1 if bits & 1 else 1


def sign_bit(key, first, index):
    """The sign of bit `index` of the words from counter `first` on."""
    return -1 if value(key, first + index // 64) >> index % 64 & 1 else 1


def strata(count, most):
    """(first, size) of as many strata as are kept."""
    kept = min(count, most)
    cuts = [k * count // kept for k in range(kept + 1)]
    return [(a, b - a) for a, b in pairwise(cuts)]


def chosen(key, first, count, most):
    """The coordinates that are kept, and the roots of their strata's sizes."""
    for index, (begin, size) in enumerate(strata(count, most)):
        yield begin + (value(key, first + index) * size >> 64), size**0.5


def chunked(key, count, dim):
    matrix = np.zeros((count, dim))
    for c in range(count):
        bits = value(key, c // 16)
        matrix[c, bucket(below(bits, dim), c % 16, dim)] = -1 if bits >> c % 16 & 1 else 1
    return matrix


def bucket(offset, lane, dim):
    """Where lane `lane` of a chunk with this offset goes."""
    ring = dim if dim % 16 == 0 else max(dim // 16 - 1, 0) * 16
    if offset < ring:
        return offset ^ lane
    return ring + (offset - ring + lane) % (dim - ring)


def matrix_of(kind, dim, seed, name, shape, nonzeros=1):
    """[coordinates, dim] float64."""
    key, count = parameter_key(seed, name, shape), int(np.prod(shape))
    columns = int(np.prod(shape[1:]))
    rows = count // columns
    matrix = np.zeros((count, dim))
    if kind == "chunked_sjlt" or (kind == "kronecker" and columns == 1):
        return chunked(key, count, dim)
    if kind == "sjlt":
        part = dim // nonzeros
        for c in range(count):
            for j in range(nonzeros):
                bits = value(key, c * nonzeros + j)
                matrix[c, j * part + below(bits, part)] += sign(bits) / nonzeros**0.5
    if kind == "rademacher":
        words = -(-dim // 64)
        for c in range(count):
            matrix[c] = [sign_bit(key, c * words, b) for b in range(dim)]
        matrix /= dim**0.5
    if kind == "gaussian":
        words = -(-dim // 2)
        for c in range(count):
            for b in range(dim):
                bits = value(key, c * words + b // 2) >> 32 * (b % 2) & 0xFFFFFFFF
                matrix[c, b] = NormalDist().inv_cdf((bits + 0.5) / 2**32)
        matrix /= dim**0.5
    if kind == "srht":
        n = max(16, 1 << (dim - 1).bit_length())
        for block in range(-(-count // n)):
            order = list(range(n))
            for b in range(dim):
                bits = value(key, HALF + block * n + b)
                at = b + below(bits, n - b)
                order[b], order[at] = order[at], order[b]
                for i in range(min(n, count - block * n)):
                    signs = sign_bit(key, block * max(n // 64, 1), i) * sign(bits)
                    walsh = -1 if (order[b] & i).bit_count() % 2 else 1
                    matrix[block * n + i, b] = signs * walsh / dim**0.5
    if kind == "tensorsketch":
        for c in range(count):
            one = value(key, c // columns)
            other = value(key, HALF + c % columns)
            if columns == 1:
                matrix[c, below(one, dim)] = sign(one)
            else:
                bucket = (below(one, dim) + below(other, dim)) % dim
                matrix[c, bucket] = sign(one) * sign(other)
    if kind == "kronecker":
        left = max(k for k in range(1, int(dim**0.5) + 1) if dim % k == 0)
        right = dim // left
        for c in range(count):
            i, j = divmod(c, columns)
            one = [sign_bit(key, i * -(-left // 64), a) for a in range(left)]
            other = [sign_bit(key, HALF + j * -(-right // 64), b) for b in range(right)]
            matrix[c] = np.outer(one, other).reshape(-1) / dim**0.5
    if kind == "grass" or (kind == "factgrass" and columns == 1):
        for index, (c, root) in enumerate(chosen(key, HALF, count, 4 * dim)):
            bits = value(key, index)
            matrix[c, below(bits, dim)] += sign(bits) * root
    if kind == "factgrass" and columns > 1:
        side = int(np.ceil((4 * dim) ** 0.5))
        kept_rows = list(chosen(key, HALF, rows, side))
        kept_columns = list(chosen(key, HALF + HALF // 2, columns, side))
        small = chunked(key, len(kept_rows) * len(kept_columns), dim)
        for a, (i, root) in enumerate(kept_rows):
            for b, (j, other) in enumerate(kept_columns):
                matrix[i * columns + j] += small[a * len(kept_columns) + b] * root * other
    return matrix
