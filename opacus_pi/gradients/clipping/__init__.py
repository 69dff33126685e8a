"""Clipped sums of gradients from one backward pass, without per-example gradients.

:class:`TrainingTaps` intercepts the forward and backward passes of a model that is
being trained, and fills one :class:`BatchCache` for each physical batch. The optimizer
takes each example's norm from the cache, then one weighted sum for each parameter, with
the clip factors as weights. ``grad_sample_mode="fast"`` is built on it.
"""

from opacus_pi._promised import promise
from opacus_pi.gradients.clipping.batch_cache import (
    BatchCache,
    clip_factors,
    example_norms,
)
from opacus_pi.gradients.clipping.training_taps import TrainingTaps

__all__ = ["BatchCache", "TrainingTaps", "clip_factors", "example_norms"]

promise(__name__)
