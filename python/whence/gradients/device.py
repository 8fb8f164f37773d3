"""The sketch computed with torch where the tensors are: for models on CUDA.

`DeviceAccumulator` is to tensors on a device what `whence.sketch.Accumulator` is to arrays: the
same map, so that its totals and those of the core compare, and each may add to what the other
began. Offsets and signs are the core's, bit for bit (`rust/core/src/random.rs` defines them). The
sums differ by rounding, for both are of 32 bits for a while, and in another order.

Every sum has an order that depends on the sizes alone. Additions to a bucket are not sent there as
they come, which on a GPU means atomic operations in whatever order the threads arrive; chunks are
sorted by bucket first, and the sum is a gather and a reduction along a dimension. Nothing here is
refused by `torch.use_deterministic_algorithms`.

A sorted list of chunks has runs of very different length. It is cut into pieces of one size, the
last of a run padded with a zero; the sums of the pieces are a shorter list of the same kind. After
one or two such rounds no run has more than a few entries, and every bucket takes its own.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whence._core import MAX_COORDINATES
from whence.errors import ArgumentError, DtypeError, ShapeError
from whence.sketch import Sketch

SLAB = 1 << 20
"""Coordinates of a parameter that are worked on at a time."""

VALUES = 1 << 25
"""Values of a batch that are worked on at a time, 128 MiB; at least those of one sample's slab."""

CACHE_BYTES = 1 << 30
"""The most memory that the plans of one sketch take between calls."""

_LANES = 16
_MASK = (1 << 64) - 1
_INCREMENT = 0x9E37_79B9_7F4A_7C15
_DIRECT = 8
"""Runs of at most so many entries are summed without being cut into pieces."""


def supports(sketch: Sketch) -> bool:
    """Whether a sketch can be computed here: `chunked_sjlt` for all parameters, in one row.

    What a later option of `Sketch` means is not known here, so one is taken to change the map.
    """
    # Whether rows are normalized in the end changes no total.
    known = {"kind", "dim", "seed", "hash_version", "normalize"}
    return sketch.kind == "chunked_sjlt" and sketch.spec.keys() <= known


def slots(key: int, chunks: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Where chunks of a parameter go.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in the arithmetic of int64, which wraps.

    Args:
        key: The parameter's key.
        chunks: int64 numbers of chunks, any shape.
        dim: Width of a row.

    Returns:
        The int64 offset of each chunk, and its 16 signs as the bits of an int16; O(chunks).
    """
    bits = (chunks + 1) * _signed(_INCREMENT) + _signed(key)
    bits = (bits ^ _shifted(bits, 30)) * _signed(0xBF58_476D_1CE4_E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D0_49BB_1331_11EB)
    bits = bits ^ _shifted(bits, 31)
    return (_shifted(bits, 32) * dim) >> 32, bits.to(torch.int16)


def _signed(word: int) -> int:
    """The int64 with the bits of `word`."""
    return word - (word >> 63 << 64)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """`bits` shifted right as if they had no sign."""
    return (bits >> by) & (_MASK >> by)


def _factors(signs: Tensor) -> Tensor:
    """[..., 16] int16 of 1 and -1, from [...] signs as bits."""
    lanes = torch.arange(_LANES, dtype=torch.int16, device=signs.device)
    return torch.rsub((signs.unsqueeze(-1) >> lanes) & 1, 1, alpha=2)


def _keys(offsets: Tensor, dim: int, lanes: int) -> Tensor:
    """The key of each entry: the offset of a chunk, or the bucket of each coordinate."""
    if lanes > 1:
        return offsets
    ring = _ring(dim)
    offsets, lane = offsets.unsqueeze(-1), torch.arange(_LANES, device=offsets.device)
    if ring == dim:
        return offsets ^ lane
    return torch.where(
        offsets < ring, offsets ^ lane, ring + (offsets - ring + lane) % (dim - ring)
    )


def _sources(dim: int, device: torch.device) -> Tensor:
    """[dim, 16]: the offset at which each lane of a chunk goes to a bucket."""
    ring = _ring(dim)
    bucket = torch.arange(dim, device=device).unsqueeze(-1)
    lane = torch.arange(_LANES, device=device)
    if ring == dim:
        return bucket ^ lane
    return torch.where(bucket < ring, bucket ^ lane, ring + (bucket - ring - lane) % (dim - ring))


def _ring(dim: int) -> int:
    """The first bucket of the ring, as in `rust/core/src/sketch/chunked.rs`."""
    return dim if dim % _LANES == 0 else max(dim // _LANES - 1, 0) * _LANES


def _lanes(chunks: int, dim: int) -> int:
    """Values in an entry: whole chunks are summed where there are many for each bucket.

    They are gathered in one piece then, but leave 16 sums for each bucket.
    """
    return _LANES if chunks >= 2 * dim else 1


@dataclass(frozen=True)
class _Sums:
    """Which entries add up to which bucket.

    Attributes:
        levels: int32 [pieces, size] each: the entries of a piece. One past the last is the zero.
        last: int32 [samples, dim, size]: the entries of a bucket, or of an offset for chunks.
        lanes: Values in an entry, 16 or 1.
    """

    levels: tuple[Tensor, ...]
    last: Tensor
    lanes: int

    @classmethod
    def of(cls, keys: Tensor, samples: int, dim: int, lanes: int) -> _Sums:
        """How to sum entries with these keys, sample · dim + bucket or offset.

        O(entries · log entries + samples · dim) time. Waits for the device, once a level and once
        more, for sizes depend on the keys.
        """
        device = keys.device

        def places(count: int) -> Tensor:
            return torch.arange(count, device=device)

        def index(first: Tensor, end: Tensor, size: int) -> Tensor:
            place = first.unsqueeze(-1) + places(size)
            found = entries[place.clamp(max=len(entries) - 1)]
            return torch.where(place < end.unsqueeze(-1), found, len(entries)).to(torch.int32)

        groups = samples * dim
        ordered, entries = torch.sort(keys.reshape(-1).to(torch.int32), stable=True)
        bounds = torch.searchsorted(ordered, places(groups + 1).to(torch.int32))
        starts, counts = bounds[:-1], bounds.diff()
        levels: list[Tensor] = []
        while True:
            size = _piece(len(entries) / groups)
            pieces = (counts + (size - 1)) // size
            ends = pieces.cumsum(0)
            longest, total = torch.stack((counts.max(), ends[-1])).tolist()
            if longest <= _DIRECT:
                break
            # Of a piece: its run, and which of the run's pieces it is.
            run = torch.searchsorted(ends, places(total), right=True)
            nth = places(total) - (ends - pieces)[run]
            levels.append(index(starts[run] + nth * size, (starts + counts)[run], size))
            starts, counts, entries = ends - pieces, pieces, places(total)
        last = index(starts, starts + counts, longest).view(samples, dim, longest)
        return cls(tuple(levels), last, lanes)

    def __call__(self, entries: Tensor) -> Tensor:
        """Sums.

        Args:
            entries: float32 [batch, entries + 1, lanes], of which the last is zero.

        Returns:
            float64 [batch * samples, dim], O(entries + batch · samples · dim). What one lane adds
            to a bucket is summed in float32, piece by piece, so that a sum of n values has the
            rounding of about log n.
        """
        batch, _, lanes = entries.shape
        for level in self.levels:
            pieces, size = level.shape
            gathered = entries.index_select(1, level.view(-1)).view(batch, pieces, size, lanes)
            entries = gathered.new_empty((batch, pieces + 1, lanes))
            entries[:, pieces].zero_()
            torch.sum(gathered, 2, out=entries[:, :pieces])
        samples, dim, size = self.last.shape
        gathered = entries.index_select(1, self.last.view(-1))
        sums = gathered.view(batch * samples, dim, size, lanes).sum(2)
        if lanes == 1:
            return sums.squeeze(2).double()
        sources = _sources(dim, sums.device).expand(len(sums), -1, -1)
        return sums.gather(1, sources).sum(2, dtype=torch.float64)

    @property
    def bytes(self) -> int:
        """Memory of the indices."""
        return sum(tensor.nbytes for tensor in (*self.levels, self.last))


def _piece(mean: float) -> int:
    """Entries in a piece, for runs of `mean` entries.

    Of each run, half a piece is padding, and a run leaves mean / size sums for the next level; the
    sum of the two is least at about twice the root of the mean.
    """
    size = 4
    while size < 64 and size * size < 4 * mean:
        size *= 2
    return size


@dataclass(frozen=True)
class _Plan:
    """How a slab, `width` coordinates of a parameter from somewhere in a chunk on, is summed.

    Attributes:
        lead: Lanes of the first chunk before the first coordinate.
        signs: int16 [chunks], as bits.
        sums: Where entries go.
    """

    lead: int
    signs: Tensor
    sums: _Sums

    @classmethod
    def of(cls, key: int, start: int, width: int, dim: int, device: torch.device) -> _Plan:
        """The plan of the coordinates from `start` on; O(width · log width + dim)."""
        first, end = start // _LANES, -(-(start + width) // _LANES)
        offsets, signs = slots(key, torch.arange(first, end, device=device), dim)
        lanes = _lanes(end - first, dim)
        sums = _Sums.of(_keys(offsets, dim, lanes), 1, dim, lanes)
        return cls(start % _LANES, signs, sums)

    def __call__(self, values: Tensor) -> Tensor:
        """float64 [rows, dim] of [rows, width] values of any floating type, O(rows · width)."""
        rows, width = values.shape
        end = self.lead + width
        size = len(self.signs) * _LANES + self.sums.lanes  # with the entry that is zero
        entries = torch.empty((rows, size), dtype=torch.float32, device=values.device)
        entries[:, : self.lead].zero_()
        entries[:, end:].zero_()
        factors = _factors(self.signs).view(-1)[self.lead : end]
        torch.mul(values, factors, out=entries[:, self.lead : end])
        return self.sums(entries.view(rows, -1, self.sums.lanes))

    @property
    def bytes(self) -> int:
        """Memory of the tensors."""
        return self.signs.nbytes + self.sums.bytes


class _Plans:
    """Plans that were used, up to `limit` bytes; the least recently used go first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._kept: OrderedDict[Hashable, _Plan] = OrderedDict()
        self._lock = threading.Lock()  # autograd has a thread for each device

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], _Plan]) -> _Plan:
        """The plan of this key, made if it is not there."""
        with self._lock:
            plan = self._kept.get(key)
            if plan is not None:
                self._kept.move_to_end(key)
                return plan
            plan = self._kept[key] = make()
            self.bytes += plan.bytes
            while self.bytes > self.limit:
                _, gone = self._kept.popitem(last=False)
                self.bytes -= gone.bytes
            return plan


_PLANS: weakref.WeakKeyDictionary[Sketch, _Plans] = weakref.WeakKeyDictionary()
_plans_lock = threading.Lock()


def _plans(sketch: Sketch) -> _Plans:
    """The plans of a sketch. They are dropped with it."""
    with _plans_lock:
        return _PLANS.setdefault(sketch, _Plans(CACHE_BYTES))


class DeviceAccumulator:
    """Running float64 totals of the rows of one batch, held and added to on a device.

    Takes what `whence.sketch.Accumulator` takes, as tensors; a row's totals are those of the core
    but for rounding, about 1e-7 of its norm. The same calls on the same device with the same
    versions give the same bits; other batch sizes may differ by rounding.

    Parameters are worked on by slabs of 2^20 coordinates and as many samples at a time as have 2^25
    values, so that memory is at most about 2 GiB beside the totals, whatever the parameter. What
    depends on the parameter alone, the sorted places of its chunks, is kept on the device between
    calls and accumulators for as long as the sketch exists, at most `CACHE_BYTES` of it; the least
    recently used goes first. It takes half a byte a coordinate for dim up to 4096, one at 2^15, 6
    to 22 above, where coordinates are sorted one by one, as in parameters of less than 32 · dim
    coordinates. Places that are not kept are made again, some 70 small kernels a slab, after which
    the processor waits for the device.

    The device must have float64. Calls from several CUDA streams are put in order.

    Args:
        sketch: The map, one that `supports` accepts.
        batch: How many rows.
        device: Where the tensors lie.

    Raises:
        ArgumentError: If it is another.
    """

    def __init__(self, sketch: Sketch, batch: int, device: torch.device) -> None:
        if not supports(sketch):
            raise ArgumentError(f"sketch must be one that `supports` accepts, got {sketch}")
        self._sketch = sketch
        self._totals = torch.zeros((batch, sketch.dim), dtype=torch.float64, device=device)
        self._device = self._totals.device  # with its number, as tensors have it
        self._plans = _plans(sketch)
        # Of each parameter the sum of all it added to a row, which is NaN or infinite if any
        # value was: one that is looked at only in the end does not make the processor wait.
        self._marks: dict[str, Tensor] = {}
        # Of each table its rows, and the least and largest index so far.
        self._indices: dict[str, tuple[int, Tensor]] = {}
        self._stream = (
            torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        )

    def add(self, name: str, shape: Sequence[int], values: Tensor, start: int = 0) -> None:
        """Adds values at the coordinates from `start` on.

        O(batch · (width + slabs · dim)) time. Does not wait for the device, but where places of
        coordinates are not kept.

        Args:
            name: Canonical name of the parameter.
            shape: Shape of the parameter.
            values: [batch, width], any floating type and strides; taken as float32.
            start: First coordinate.

        Raises:
            ShapeError: If values are not [batch, width], or go past the parameter's end.
            DtypeError: If values are not floating.
            ArgumentError: If they are on another device.
        """
        size = _size(shape)
        self._check("values", values, (len(self._totals), None))
        width = values.shape[1]
        if start < 0 or start + width > size:
            raise ShapeError(
                f"values must be at most {max(size - start, 0)} wide from coordinate {start}, "
                f"got {width}"
            )
        with self._apart():
            self._mark(name)
            at = 0
            while at < width:  # cut at multiples of SLAB, so that any start makes whole slabs
                end = min(width, ((start + at) // SLAB + 1) * SLAB - start)
                plan = self._plan(name, shape, start + at, end - at)
                for rows in self._rows(len(values), end - at):
                    self._put(name, rows.start, plan(values[rows, at:end]))
                at = end

    def add_outer(
        self,
        name: str,
        shape: Sequence[int],
        left: Tensor,
        right: Tensor,
        start: int = 0,
        first: int = 0,
    ) -> None:
        """Adds, for each sample, the matrix Σ_t left[t] right[t]ᵀ at the coordinates from `start`.

        The product is a float32 `torch.bmm` of some rows of the matrix at a time, also under
        autocast. `torch.backends.cuda.matmul.allow_tf32` is left as it is: where it is on, the
        product has 11 bits. Factors of 16 bits are copied to float32 as a whole.

        O(batch · (terms · rows · columns + slabs · dim)) time. Does not wait for the device, but
        where places of coordinates are not kept.

        Args:
            name: Canonical name of the parameter.
            shape: Shape of the parameter.
            left: [batch, terms, rows], any floating type and strides.
            right: [batch, terms, columns], any floating type and strides.
            start: First coordinate of the matrix in the parameter.
            first: The row of the first sample.

        Raises:
            ShapeError: If the factors do not fit together, the samples not into the batch, or the
                matrix not into the parameter.
            DtypeError: If a factor is not floating.
            ArgumentError: If one is on another device.
        """
        size = _size(shape)
        self._check("left", left, (None, None, None))
        batch, terms, height = left.shape
        self._check("right", right, (batch, terms, None))
        columns = right.shape[2]
        if first < 0 or first + batch > len(self._totals):
            raise ShapeError(
                f"left must be at most {max(len(self._totals) - first, 0)} samples from row "
                f"{first}, got {batch}"
            )
        if start < 0 or start + height * columns > size:
            raise ShapeError(
                f"left must be a block of at most {max(size - start, 0)} values from {start}, "
                f"got {height} x {columns}"
            )
        if 0 in (terms, height, columns):
            return
        with self._apart():
            self._mark(name)
            left, right = left.float(), right.float()
            for down in _cuts(height, max(1, SLAB // columns)):
                for across in _cuts(columns, SLAB):
                    width = (down.stop - down.start) * (across.stop - across.start)
                    at = start + down.start * columns + across.start
                    plan = self._plan(name, shape, at, width)
                    for rows in self._rows(batch, width):
                        product = torch.bmm(left[rows, :, down].mT, right[rows, :, across])
                        self._put(name, first + rows.start, plan(product.flatten(1)))

    def add_lookup(
        self,
        name: str,
        shape: Sequence[int],
        indices: Tensor,
        values: Tensor,
        ignored: int | None,
    ) -> None:
        """Adds, for each sample, values[t] to row indices[t] of a table.

        A row that occurs several times gets the sum, as in the dense gradient. An index outside
        the table is an error of `totals` and `bad_rows`, for it is not looked at before.

        O(batch · (terms · width + dim)) time and the sorting of batch · terms · width / 16 keys.
        Waits for the device two or three times, for each block of 2^23 values.

        Args:
            name: Canonical name of the table.
            shape: [rows, width] of the table.
            indices: [batch, terms] integers.
            values: [batch, terms, width], any floating type and strides; taken as float32.
            ignored: The index whose terms are left out.

        Raises:
            ShapeError: If the tensors do not fit together or to the table.
            DtypeError: If indices are not integers, or values not floating.
            ArgumentError: If one is on another device.
        """
        size = _size(shape)
        self._check("indices", indices, (len(self._totals), None), floating=False)
        batch, terms = indices.shape
        self._check("values", values, (batch, terms, None))
        width = values.shape[2]
        if len(shape) == 0 or shape[0] * width != size:
            raise ShapeError(f"shape must be [rows, {width}], as values are, got {list(shape)}")
        if 0 in (batch, terms, width):
            return
        with self._apart():
            self._mark(name)
            indices = indices.to(torch.int64)
            ends = torch.stack(indices.aminmax())
            if name in self._indices:
                _, before = self._indices[name]
                ends = torch.stack((ends, before))
                ends = torch.stack((ends[:, 0].amin(), ends[:, 1].amax()))
            self._indices[name] = shape[0], ends
            key = self._key(name, shape)
            chunks = -(-width // _LANES) if width % _LANES == 0 else (width + 30) // _LANES
            # A key of 64 bits and some places go with each value and each bucket of a sample.
            most = max(1, VALUES // (4 * chunks * _LANES))
            for block in _cuts(terms, most):
                size = 4 * max((block.stop - block.start) * chunks * _LANES, 2 * self._sketch.dim)
                for rows in self._rows(batch, size):
                    sums = self._looked_up(
                        key, chunks, indices[rows, block], values[rows, block], ignored
                    )
                    self._put(name, rows.start, sums)

    def totals(self) -> NDArray[np.float64]:
        """[batch, dim], the totals so far. Waits for the device.

        Raises:
            ArgumentError: If an index was not a row of its table.
        """
        with self._apart():
            self._check_indices()
            return self._totals.to("cpu", copy=True).numpy()

    def bad_rows(self) -> list[int]:
        """The rows in which a sum was NaN or infinite, in order. Waits for the device.

        Such is also a sum over a part of a parameter that exceeds float32.

        Raises:
            ArgumentError: If an index was not a row of its table.
        """
        return sorted(self.bad_parameters())

    def bad_parameters(self) -> dict[int, str]:
        """The rows in which a sum was NaN or infinite, each with the parameter where it first was.

        Raises:
            ArgumentError: If an index was not a row of its table.
        """
        with self._apart():
            self._check_indices()
            if not self._marks:
                return {}
            marks = torch.stack(list(self._marks.values())).cpu().numpy()
        found: dict[int, str] = {}
        for name, bad in zip(self._marks, ~np.isfinite(marks), strict=True):
            for row in np.flatnonzero(bad):
                found.setdefault(int(row), name)
        return found

    def _looked_up(
        self, key: int, chunks: int, indices: Tensor, values: Tensor, ignored: int | None
    ) -> Tensor:
        """float64 [samples, dim] of [samples, terms] indices and [samples, terms, width] values."""
        samples, terms, width = values.shape
        dim, device = self._sketch.dim, self._device
        start = (indices * width).unsqueeze(-1)
        first, lead = start >> 4, start & (_LANES - 1)  # of 16 lanes
        offsets, signs = slots(key, first + torch.arange(chunks, device=device), dim)
        values = values.float()
        taken = torch.ones_like(start, dtype=torch.bool)
        if ignored is not None:
            taken = (indices != ignored).unsqueeze(-1)
        if width % _LANES:
            source = torch.arange(chunks * _LANES, device=device) - lead
            taken = taken & (source >= 0) & (source < width)
            values = values.gather(2, source.clamp(0, width - 1))
        # A value left out may be NaN: it is replaced, for a product with 0 would still be NaN.
        values = torch.where(taken, values, 0.0).view(samples, terms, chunks, _LANES)
        lanes = _lanes(terms * chunks, dim)
        entries = torch.empty(
            (samples * terms * chunks * _LANES + lanes,), dtype=torch.float32, device=device
        )
        entries[-lanes:].zero_()
        torch.mul(values, _factors(signs), out=entries[:-lanes].view(values.shape))
        sample = torch.arange(samples, device=device).view(-1, 1) * dim
        keys = sample + _keys(offsets, dim, lanes).flatten(1)
        return _Sums.of(keys, samples, dim, lanes)(entries.view(1, -1, lanes))

    def _key(self, name: str, shape: Sequence[int]) -> int:
        """What the offsets and signs of a parameter are computed from, by `slots`."""
        return self._sketch._cores[self._sketch.kind].key(name, list(shape))

    def _plan(self, name: str, shape: Sequence[int], start: int, width: int) -> _Plan:
        """The plan of a slab. Streams do not share plans, which no stream waits for."""
        stream = None if self._stream is None else self._stream.cuda_stream
        return self._plans.get(
            (name, tuple(shape), start, width, self._device, stream),
            lambda: _Plan.of(self._key(name, shape), start, width, self._sketch.dim, self._device),
        )

    def _rows(self, count: int, width: int) -> Iterator[slice]:
        """As many of `count` samples at a time as VALUES allows."""
        yield from _cuts(count, max(1, VALUES // max(width, self._sketch.dim)))

    def _put(self, name: str, first: int, sums: Tensor) -> None:
        """Adds [rows, dim] sums to the rows from `first` on."""
        rows = slice(first, first + len(sums))
        self._totals[rows].add_(sums)
        self._marks[name][rows].add_(sums.sum(1))

    def _mark(self, name: str) -> None:
        if name not in self._marks:
            self._marks[name] = self._totals.new_zeros(len(self._totals))

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Without autograd and autocast, and after what other streams were told to add."""
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._device)
            if stream != self._stream:
                stream.wait_stream(self._stream)
                for tensor in (self._totals, *self._marks.values()):
                    tensor.record_stream(stream)
                self._stream = stream
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            yield

    def _check(
        self, argument: str, tensor: Tensor, shape: tuple[int | None, ...], *, floating: bool = True
    ) -> None:
        """Nothing, if the tensor has this shape (None is any size), kind and device.

        Raises:
            ShapeError, DtypeError, ArgumentError: If not.
        """
        kind = tensor.dtype
        if floating and not kind.is_floating_point:
            raise DtypeError(f"{argument} must be floating, got {kind}")
        if not floating and (kind.is_floating_point or kind.is_complex or kind == torch.bool):
            raise DtypeError(f"{argument} must be integers, got {kind}")
        if tensor.device != self._device:
            raise ArgumentError(f"{argument} must be on {self._device}, got {tensor.device}")
        wrong = (size not in (None, got) for size, got in zip(shape, tensor.shape, strict=False))
        if tensor.dim() != len(shape) or any(wrong):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ShapeError(f"{argument} must be [{wanted}], got {list(tensor.shape)}")

    def _check_indices(self) -> None:
        """Nothing, if all indices so far were rows of their tables.

        Raises:
            ArgumentError: If not.
        """
        for name, (rows, ends) in self._indices.items():
            low, high = ends.tolist()
            if low < 0 or high >= rows:
                raise ArgumentError(
                    f"indices of {name} must be from 0 to below {rows}, "
                    f"got {low if low < 0 else high}"
                )


def _cuts(count: int, most: int) -> Iterator[slice]:
    """`count` in as few parts of at most `most` as can be, of nearly one size."""
    parts = -(-count // most)
    size = -(-count // parts) if parts else 1
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _size(shape: Sequence[int]) -> int:
    """Coordinates of a parameter.

    Raises:
        ShapeError: If there are more than 2**48.
    """
    size = math.prod(shape)
    if size > MAX_COORDINATES or any(each < 0 for each in shape):
        raise ShapeError(
            f"shape must be a shape of at most {MAX_COORDINATES} values, got {list(shape)}"
        )
    return size
