"""Whether scores are right, beside baselines."""

from whence.evaluate.mislabel import mislabel_auc, share_found

__all__ = ["mislabel_auc", "share_found"]
