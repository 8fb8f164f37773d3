"""Whether scores are right, beside baselines.

- `lds`, `noise_ceiling`, `leave_one_out`: against models trained without some examples;
  `subsets`, `leave_one_out_subsets` and `retrain` make them.
- `brittleness`, `removal_curve`: against models trained without the best; `tail_patch`: against
  one step of training on them (needs torch).
- `recall_at_k`, `mean_reciprocal_rank`: against examples that are known to matter.
- `mislabel`, `mislabel_auc`, `share_found`: against known wrong labels, beside the loss.
- `compare`: whether one method is better than another, or only luckier.
- `sanity`: a minute's check without any truth at hand.
"""

from whence.evaluate.datamodels import LDS, NoiseCeiling, lds, leave_one_out, noise_ceiling
from whence.evaluate.measures import Comparison, PerQuery, compare
from whence.evaluate.removal import Brittleness, RemovalCurve, brittleness, removal_curve
from whence.evaluate.retraining import leave_one_out_subsets, retrain, subsets
from whence.evaluate.retrieval import mean_reciprocal_rank, recall_at_k
from whence.evaluate.sanity_checks import Check, Sanity, sanity
from whence.evaluate.steps import TailPatch, tail_patch
from whence.evaluate.wrong_labels import Mislabel, mislabel, mislabel_auc, share_found

__all__ = [
    "LDS",
    "Brittleness",
    "Check",
    "Comparison",
    "Mislabel",
    "NoiseCeiling",
    "PerQuery",
    "RemovalCurve",
    "Sanity",
    "TailPatch",
    "brittleness",
    "compare",
    "lds",
    "leave_one_out",
    "leave_one_out_subsets",
    "mean_reciprocal_rank",
    "mislabel",
    "mislabel_auc",
    "noise_ceiling",
    "recall_at_k",
    "removal_curve",
    "retrain",
    "sanity",
    "share_found",
    "subsets",
    "tail_patch",
]
