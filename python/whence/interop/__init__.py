"""What other libraries have computed, searched here with the scores they give it.

- `from_trak`: a `save_dir` of trak; `from_bergson`: a gradient index of bergson. Either is a
  source that `whence.Index` takes, and answers `search` itself.
- `folders`: their files, checked before anything is read; `rows`: rows in files that stay where
  they are; `hessian`: the curvature beside bergson's gradients.

Neither library has to be installed. Their sign is turned where it must be: positive = helpful.
"""

from whence.interop.bergson import BergsonGradients, from_bergson
from whence.interop.trak import TrakFeatures, from_trak

__all__ = ["BergsonGradients", "TrakFeatures", "from_bergson", "from_trak"]
