"""Search: which examples have the largest and the smallest scores for a query.

- `hits`: what comes back; `source`: what can be searched, and the scan that defines the answer.
- `store`, `matrix`: rows of a recorded store, and of a plain matrix.
- `index`: rows made ready to be asked often, with codes whose bounds prove the scan's answer;
  `basis`: the directions that codes begin with; `kept`: an index as files; `diverse`: answers from
  several clusters.
"""

from whence.search.hits import COSINE, METHOD, SIGN, Hits, Renderer, Show, Side
from whence.search.index import Explanation, Index, Recall
from whence.search.matrix import Matrix, Numbered
from whence.search.source import SIDES, Source
from whence.search.store import Store, open

__all__ = [
    "COSINE",
    "METHOD",
    "SIDES",
    "SIGN",
    "Explanation",
    "Hits",
    "Index",
    "Matrix",
    "Numbered",
    "Recall",
    "Renderer",
    "Show",
    "Side",
    "Source",
    "Store",
    "open",
]
