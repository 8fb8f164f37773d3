"""Collecting per-sample gradients inside the user's own training loop. Imports torch.

structure   which parameters there are, under which names, in which layers
layers      one rule per layer type: input and output gradient to per-sample gradient
attention   the projections inside MultiheadAttention
maps        which map from gradients to rows was asked for, or a store has
device      the same sums as the core's, by torch on a GPU
capture     what one forward and backward pass gathers, and whether it is whole
blocks      parts of a gradient that have a preconditioner of their own
coordinates a gradient in a preconditioner's eigenbasis
functional  any other module, by torch.func
hooks       what feeds the rules while a model runs
passes      a user's own loss over batches, feeding a map
recorder    `record`: batches, checkpoints, resume
combined    `record_checkpoints`: one row for all checkpoints
reduction   how a loss combines its examples, and what undoes it
verify      recorded rows against exact gradients
estimates   `estimate`: time, RAM and disk before any work
memory      how many bytes tensors and arrays hold
weights     digests of weights, and loading states for a while
"""

from whence.gradients.combined import record_checkpoints
from whence.gradients.estimates import Estimate, Stage, estimate
from whence.gradients.layers import register_layer
from whence.gradients.recorder import Recorder, record

__all__ = [
    "Estimate",
    "Recorder",
    "Stage",
    "estimate",
    "record",
    "record_checkpoints",
    "register_layer",
]
