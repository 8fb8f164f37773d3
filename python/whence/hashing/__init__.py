"""Random-projection hashing: codes that agree the more often, the nearer two rows are.

    SignHash, PStableHash   codes: near by angle, near by Euclidean distance
    HashIndex               candidates by code, rescored exactly
    hash_graph              nearest neighbours by code: one or several levels and views
    distance_graph          nearest neighbours within batches, exactly
    near_duplicates         groups of rows that are nearly the same
    stratified_batches      rows dealt into batches, class by class
    softmax_importance      how much attention a row gets from its neighbours
    select_instances        the most important rows of each class (GAIS)

All of it needs numpy only. `whence.hashing.gat.gat_importance`, which trains a graph attention
network, needs torch.
"""

from whence.hashing.families import PStableHash, SignHash
from whence.hashing.graph import Graph, distance_graph, hash_graph, near_duplicates
from whence.hashing.index import HashIndex, Neighbours
from whence.hashing.selection import (
    Selection,
    select_instances,
    softmax_importance,
    stratified_batches,
)

__all__ = [
    "Graph",
    "HashIndex",
    "Neighbours",
    "PStableHash",
    "Selection",
    "SignHash",
    "distance_graph",
    "hash_graph",
    "near_duplicates",
    "select_instances",
    "softmax_importance",
    "stratified_batches",
]
