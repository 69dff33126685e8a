"""Norms in bfloat16: good enough to put examples in order, and for nothing else.

Layers run in bfloat16 as under ``torch.autocast``, and so do the matrix products that
norms follow from; losses are taken on float64 copies of the outputs, and squares are
added up in float32 at least.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from opacus_pi._validate import expect
from opacus_pi.gradients.products import at_least_float32
from opacus_pi.models.batches import map_tensors

Lowered = Callable[[], AbstractContextManager[Any]]


def check_ranking_dtype(ranking_dtype: torch.dtype | None) -> None:
    """Raise unless it is ``torch.bfloat16``, or None: the model's own precision."""
    expect(
        ranking_dtype in (None, torch.bfloat16),
        "ranking_dtype",
        ranking_dtype,
        "to be torch.bfloat16 or None",
        "None measures in the model's own precision.",
    )


def lowered(ranking_dtype: torch.dtype | None, device: torch.device) -> Lowered:
    """Makes contexts in which layers and matrix products run in a lower precision.

    Args:
        ranking_dtype: ``torch.bfloat16``, or None: the contexts do nothing.
        device: Where the model is.

    Raises:
        ValueError: If it is another type.
    """
    check_ranking_dtype(ranking_dtype)
    if ranking_dtype is None:
        return nullcontext
    # no cache: it would outlive the switches of requires_grad
    return partial(
        torch.autocast, device.type, dtype=ranking_dtype, cache_enabled=False
    )


def lower_(model: nn.Module, low: Lowered) -> None:
    """Have a copy of a model run its layers so, and return float32 at least.

    Args:
        model: The copy, changed in place.
        low: From :func:`lowered`.
    """
    plain_forward = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with low():
            return plain_forward(*args, **kwargs)

    def widen(module: nn.Module, args: Any, outputs: Any) -> Any:
        return map_tensors(at_least_float32, outputs)

    model.forward = forward
    model.register_forward_hook(widen)
