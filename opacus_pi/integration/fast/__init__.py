"""``grad_sample_mode="fast"``: Opacus's clipped update from one backward pass.

The training loop, its batches, the noise and what ``make_private`` returns are those of
``grad_sample_mode="hooks"``, but per-example gradients are not formed. A per-batch
cache keeps what the backward pass computes at each layer
(:mod:`~opacus_pi.integration.fast.model`); the optimizer takes the norms of all
examples from it, then one weighted sum per parameter
(:mod:`~opacus_pi.integration.fast.optimizer`).
"""

from opacus_pi._promised import promise
from opacus_pi.integration.fast.model import (
    MODE,
    FastGradSampleModule,
    FastHooks,
    prepare_model,
    require_fast,
)
from opacus_pi.integration.fast.optimizer import clip_from_cache

__all__ = [
    "MODE",
    "FastGradSampleModule",
    "FastHooks",
    "clip_from_cache",
    "prepare_model",
    "require_fast",
]

promise(__name__)
