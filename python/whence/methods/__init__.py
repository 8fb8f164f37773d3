"""Methods of the literature behind one interface: `fit(run)`, `scores(closure)`, `top_k(closure)`.

run          a model, its training data and its checkpoints
method       what every method has
products     exact products of recomputed gradients
gradient     GradientDot, GradientCosine, TracInCP: plain products
dense        GaussNewton: the whole matrix, for small models
ekfac        Ekfac: influence with the loss's curvature, exact
stored       EkfacStored: the same from short rows; TwoStage: exact for candidates from them
sketched     DampedGram, Trak: random sketches and their Gram matrix
margins      the stable margin that TRAK attributes
less         Less: cosines of gradients as Adam sees them
suspicion    suspicion: wrong labels by loss and self-influence together
representer  RepresenterPoints: the last layer's logits as a sum over examples
"""

from whence.methods.dense import GaussNewton
from whence.methods.ekfac import Ekfac
from whence.methods.gradient import GradientCosine, GradientDot, TracInCP
from whence.methods.less import Less
from whence.methods.margins import stable_margin
from whence.methods.method import Method
from whence.methods.representer import RepresenterPoints
from whence.methods.run import Run
from whence.methods.sketched import DampedGram, Trak
from whence.methods.stored import EkfacStored, TwoStage
from whence.methods.suspicion import suspicion

__all__ = [
    "DampedGram",
    "Ekfac",
    "EkfacStored",
    "GaussNewton",
    "GradientCosine",
    "GradientDot",
    "Less",
    "Method",
    "RepresenterPoints",
    "Run",
    "TracInCP",
    "Trak",
    "TwoStage",
    "stable_margin",
    "suspicion",
]
