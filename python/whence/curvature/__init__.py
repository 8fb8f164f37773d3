"""The curvature of a loss, by which gradients are preconditioned. Imports torch.

labels      labels drawn from the model's own output
statistics  what passes over the data gather of each block
factors     K-FAC and EK-FAC factors of checkpoints: saved, merged, made into maps
basis       the directions that a sample of the training data spans most of
fit         `fit_factors`: the passes
checkpoints which checkpoints of a run to keep
moments     `moments_of`: an optimizer's second moments, in the place of factors
compression coordinates kept at several checkpoints, to one short row an example
"""

from whence.curvature.checkpoints import suggest_checkpoints
from whence.curvature.compression import compress
from whence.curvature.factors import Factors
from whence.curvature.fit import fit_factors
from whence.curvature.moments import Moments, moments_of

__all__ = [
    "Factors",
    "Moments",
    "compress",
    "fit_factors",
    "moments_of",
    "suggest_checkpoints",
]
