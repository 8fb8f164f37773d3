"""Rows on disk: immutable shards and a manifest that is replaced whole.

A store is a directory, whose format 1 is described in `docs/format.md`:

    manifest-00000002.json     what is there; the highest number counts
    committed-00000002         an empty marker of that number
    shard-00000001/shard.json  the length and checksums of the files beside it
                   rows.npy    unit rows, float16 or float32, [rows, dim]; or levels, int8, [rows,
                               dim]; or codes of 4, 2 or 1 bits, uint8, [rows, ceil(dim bits / 8)]
                   scales.npy  float32 [rows]; row = scale * unit row, or scale * levels
                   ids.npy ... ids and columns
    pack-00000001.json         what the manifest would say of older shards
    gone-00000002.npy          rows that were deleted or replaced, until `compact`
    map-00000001/map.json ...  of preconditioned rows: a checkpoint's eigenvectors and basis
    writer-3-of-8/             a store of its own, of one of several writers
    lock                       held while a writer is open

Code c of b bits is the level 2 c - (2^b - 1); the codes of a row follow each other from the lowest
bits of its first byte on (`whence.store.manifest.BITS`). The manifest says which type it is.

Shards are written and synced first; then a manifest that names them appears under its final name
in one step. What no manifest names was never confirmed, and is not read.
"""

from whence.store.checking import Damage, Repair, Verification, repair, verify
from whence.store.copying import merge, split
from whence.store.examples import Places, eligible
from whence.store.info import Info, info
from whence.store.lifecycle import Compacted, compact, delete
from whence.store.manifest import COMBINED, SECOND_MOMENTS, Checkpoint, Manifest
from whence.store.maps import StoredMap, read_map
from whence.store.reader import Reader
from whence.store.writer import Writer

__all__ = [
    "COMBINED",
    "SECOND_MOMENTS",
    "Checkpoint",
    "Compacted",
    "Damage",
    "Info",
    "Manifest",
    "Places",
    "Reader",
    "Repair",
    "StoredMap",
    "Verification",
    "Writer",
    "compact",
    "delete",
    "eligible",
    "info",
    "merge",
    "read_map",
    "repair",
    "split",
    "verify",
]
