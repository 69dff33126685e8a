"""Clipped sums of gradients from one backward pass, without per-example gradients."""

from opacus_pi.gradients.clipping.batch import (
    Batch,
    clip_factors,
    joint_norms,
)
from opacus_pi.gradients.clipping.book import Book

__all__ = ["Batch", "Book", "clip_factors", "joint_norms"]
