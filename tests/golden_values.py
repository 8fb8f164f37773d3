"""What the golden stores hold, by formulas: nothing in them comes from what was written.

Every row is a power of two times values that its type holds exactly, so that it must come back to
the bit.
"""

import numpy as np

DIM = 13
"""Odd, so that the last byte of packed rows is not full."""

UNITS = [7, -3, 2, 1, -1]
"""Eighths; the sum of their squares is that of 8."""

BITS = {"int8": 8, "int4": 4, "int2": 2, "int1": 1}

TEXTS = ["", "a", "é", "日本", "😀", "\ud800", "=1+1", "<b>&", "a\nb", "x" * 1024]
NUMBERS = [0, -1, 1, 2**63 - 1, -(2**63), 10**12, 7, -8, 9, 10]
FLOATS = [0.0, -0.0, 1 / 3, float("inf"), -float("inf"), 5e-324, 1e308, -2.5, float("nan"), 1.0]


def row(number, dtype="float32", dim=DIM):
    """[dim] float32: the row of a number; that of number 2 is zeros where 0 can be stored."""
    scale = 2.0 ** (number % 7 - 3)
    if dtype in BITS:
        top = 127 if dtype == "int8" else 2 ** BITS[dtype] - 1
        step = 1 if dtype == "int8" else 2
        count = 2 * top // step + 1
        codes = np.array([(number * 37 + place * 11) % count for place in range(dim)])
        codes[number % dim] = count - 1  # a row whose levels go less far is one of another scale
        return (scale * (step * codes - top)).astype(np.float32)
    found = np.zeros(dim, np.float32)
    if number != 2:
        for place, unit in enumerate(UNITS):
            found[(number * 5 + place * 2) % dim] = scale * unit
    return found


def rows(numbers, dtype="float32", dim=DIM):
    """[numbers, dim] the rows of some numbers."""
    return np.stack([row(number, dtype, dim) for number in numbers])


def columns(numbers):
    """name -> [numbers] a column of each type."""
    return {
        "third": np.array([number % 3 == 0 for number in numbers]),
        "number": np.array([NUMBERS[number] for number in numbers]),
        "float": np.array([FLOATS[number] for number in numbers]),
        "text": np.array([TEXTS[number] for number in numbers], object),
    }


def matrix(count, dim):
    """[count, dim] float32 rows of falling norms, for an index."""
    places = np.arange(count * dim).reshape(count, dim)
    waves = np.sin(places * 0.7) + 0.25 * np.cos(places * places % 17)
    return (waves * (1 + np.arange(count) % 5)[:, None]).astype(np.float32)


def fitted():
    """Factors of a linear model, fitted to rows of `matrix`."""
    import torch

    import whence

    model = torch.nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(8.0).reshape(2, 4) / 8 - 0.5)
        model.bias.copy_(torch.tensor([0.25, -0.5]))
    x = torch.from_numpy(matrix(12, 4))
    return whence.fit_factors(
        model,
        list(x.split(4)),
        lambda x: model(x).square().mean(),
        labels="empirical",
        sample=12,
        progress=False,
    )
