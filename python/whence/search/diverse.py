"""Answers from several clusters, as a mixture.

A query often has to do with several kinds of examples, and the plain answer is full of the nearest
kind. As in kNN-Embed (El-Kishky et al., "kNN-Embed: locally smoothed embedding mixtures for
multi-interest candidate retrieval", arXiv 2205.06205) the query becomes a mixture over clusters of
rows: each cluster has the share of its members among the query's nearest, and gives as many hits,
its best, as that share allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence import _arrays
from whence._interrupts import interruptible
from whence.search.basis import sample
from whence.search.hits import Hits, Side
from whence.search.source import Question, Source

NEIGHBOURS = 10
"""How many hits for each one wanted a query's mixture is made of."""

ROUNDS = 12
"""Rounds of k-means."""

STEP = 4096
"""Rows that are assigned to clusters at a time."""


def clusters(source: Source, count: int, seed: int) -> NDArray[np.int64]:
    """[examples] the cluster of each row's direction, from 0 to count - 1.

    Spherical k-means on a sample (Dhillon and Modha, 2001). An example that lacks a checkpoint is
    in cluster 0, and never a hit. O(examples · length · count) time.
    """
    rows = _units(sample(source, seed))
    centres = rows[np.random.default_rng(seed).permutation(len(rows))[:count]]
    for _ in range(ROUNDS):
        nearest = interruptible(_nearest, rows, centres)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, rows)
        empty = ~np.isin(np.arange(len(centres)), nearest)
        centres = np.where(empty[:, None], centres, _units(sums))
    found = np.zeros(len(source.ids), np.int64)
    for examples in np.array_split(np.arange(len(found)), -(-len(found) // STEP)):
        found[examples] = interruptible(_nearest, source.side_by_side(examples), centres)
    if source.incomplete is not None:
        found[source.incomplete] = 0
    return found


def _nearest(rows: NDArray[Any], centres: NDArray[np.float64]) -> NDArray[np.int64]:
    """[rows] the centre of the largest inner product."""
    found: NDArray[np.int64] = _arrays.matmul(rows, centres.T).argmax(axis=1)
    return found


def search(
    asked: Question, clusters: NDArray[np.int64], answer: Callable[[Question], Hits]
) -> Hits:
    """The hits of a question, a mixture over clusters.

    Args:
        asked: The question.
        clusters: [examples] the cluster of each.
        answer: Answers a question as it stands.

    Returns:
        Hits of the question's width: each query's best of each cluster, as many as its share, in
        order of their scores.
    """
    fewest = int(asked.eligible.min())
    wide = answer(replace(asked, k=min(fewest, NEIGHBOURS * asked.k)))
    sides = [
        _mixed(side, clusters, asked.k) if wanted else side
        for side, wanted in zip((wide.helpful, wide.harmful), asked.sides, strict=True)
    ]
    exact = np.zeros_like(wide.exact)
    count = int(clusters.max()) + 1
    return replace(wide, helpful=sides[0], harmful=sides[1], exact=exact, clusters=count)


def _mixed(side: Side, clusters: NDArray[np.int64], k: int) -> Side:
    """K hits of one side, a mixture."""
    picked = []
    for positions in side.positions:
        member = clusters[positions]
        slots = _slots(np.bincount(member, minlength=int(clusters.max()) + 1), k)
        # A cluster has as many among the nearest as its share asks for: they are its best.
        rank = np.zeros(len(member), np.int64)
        for cluster in np.flatnonzero(slots):
            rank[member == cluster] = np.arange((member == cluster).sum())
        picked.append(np.flatnonzero(rank < slots[member]))
    rows = np.arange(len(picked))[:, None]
    columns = np.stack(picked)
    return Side(side.ids[rows, columns], side.scores[rows, columns], side.positions[rows, columns])


def _slots(counts: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """[clusters] of k hits as many as a cluster's share, by largest remainders.

    Every cluster among the nearest has one before any has two, as far as k goes: a smoothed share.
    """
    present = counts > 0
    shares = np.sqrt(counts)
    exact = k * shares / shares.sum()
    slots: NDArray[np.int64] = np.minimum(np.floor(exact).astype(np.int64), counts)
    while (left := k - int(slots.sum())) > 0:
        room = present & (slots < counts)
        order = np.lexsort((np.arange(len(counts)), -(exact - slots)))
        taken = [cluster for cluster in order if room[cluster]][:left]
        slots[taken] += 1
    return slots


def _units(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of norm 1, but zeros."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    found: NDArray[np.float64] = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return found
