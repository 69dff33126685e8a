"""``grad_sample_mode="fast"``: Opacus's clipped update from one backward pass.

The training loop, its batches, its noise and what is returned are those of
``grad_sample_mode="hooks"``; per-example gradients are not formed.
"""

from opacus_pi.integration.fast.hooks import FastGradSampleModule, FastHooks
from opacus_pi.integration.fast.optimizer import clip_from_book
from opacus_pi.integration.fast.setup import MODE, prepare_model, require_fast

__all__ = [
    "MODE",
    "FastGradSampleModule",
    "FastHooks",
    "clip_from_book",
    "prepare_model",
    "require_fast",
]
