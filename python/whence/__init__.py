"""whence: which training examples made the model do this?

    estimate      time, RAM and disk of recording, before any work        (needs torch)
    record        a store that fills while your own loop trains           (needs torch)
    fit_factors   the loss's curvature, which makes rows worth comparing   (needs torch)
    record_checkpoints  one row an example for all checkpoints of a run   (needs torch)
    compress      the same of what was kept while the run trained         (needs torch)
    query         the training examples that helped and harmed a query    (needs torch)
    open          a store, searched with arrays                           (numpy only)
    info, verify, repair, delete, compact   what a store holds, whether it is whole, and less of it
    merge, split  one store of several, and several of one            (numpy only)
    export_store, import_store  a store as one file, and back
    Index         rows made ready to be asked often                       (numpy only)
    Sketch        gradients to rows of a fixed width, usable alone        (numpy only)
    hashing       near rows, near duplicates and instances by random codes (numpy only)
    text          similarity of texts, a baseline and a filter        (numpy only)
    register_layer  teach whence a layer type of your own                 (needs torch)
    methods       the methods of the literature behind one interface   (needs torch)
    interop       what trak and bergson have computed, searched here      (numpy only)
    evaluate      whether scores are right, beside baselines

Positive score = helpful: training on the example lowers the query's loss.
"""

from typing import TYPE_CHECKING, Any

from whence import errors, evaluate, hashing, interop, report, text
from whence._core import HASH_VERSION
from whence.errors import WhenceError
from whence.search import Hits, Index, Matrix, Side, Store, open
from whence.sketch import Sketch
from whence.store import (
    compact,
    delete,
    export_store,
    import_store,
    info,
    merge,
    repair,
    split,
    verify,
)

if TYPE_CHECKING:
    from whence import methods
    from whence.attribution import query
    from whence.curvature import (
        Factors,
        compress,
        fit_factors,
        moments_of,
        suggest_checkpoints,
    )
    from whence.gradients import (
        Recorder,
        estimate,
        record,
        record_checkpoints,
        register_layer,
    )

_NEED_TORCH = {
    "Factors": "whence.curvature",
    "compress": "whence.curvature",
    "estimate": "whence.gradients",
    "fit_factors": "whence.curvature",
    "methods": "whence.methods",
    "moments_of": "whence.curvature",
    "query": "whence.attribution",
    "record": "whence.gradients",
    "record_checkpoints": "whence.gradients",
    "Recorder": "whence.gradients",
    "register_layer": "whence.gradients",
    "suggest_checkpoints": "whence.curvature",
}

__all__ = [
    "HASH_VERSION",
    "Factors",
    "Hits",
    "Index",
    "Matrix",
    "Recorder",
    "Side",
    "Sketch",
    "Store",
    "WhenceError",
    "compact",
    "compress",
    "delete",
    "errors",
    "estimate",
    "evaluate",
    "export_store",
    "fit_factors",
    "hashing",
    "import_store",
    "info",
    "interop",
    "merge",
    "methods",
    "moments_of",
    "open",
    "query",
    "record",
    "record_checkpoints",
    "register_layer",
    "repair",
    "report",
    "split",
    "suggest_checkpoints",
    "text",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Imports what needs torch when it is first asked for."""
    if name not in _NEED_TORCH:
        raise AttributeError(f"module 'whence' has no attribute {name!r}")
    from importlib import import_module

    try:
        found = import_module(_NEED_TORCH[name])
        return found if name == "methods" else getattr(found, name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise errors.MissingDependencyError(
            f"whence.{name} needs torch: pip install 'whence[torch]'"
        ) from error
