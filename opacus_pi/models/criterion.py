"""A criterion that gives one loss per example, whatever the user handed in."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._validate import expect

Criterion = Callable[[Any, Any], Tensor]


def per_example_criterion(criterion: Criterion) -> Criterion:
    """Return ``criterion`` as a function that gives one loss per example.

    A torch loss module is copied with ``reduction="none"`` (the caller's object stays
    as it is); any other callable is used as it is and checked at each call.

    Args:
        criterion: ``criterion(outputs, targets)``, a loss module or a function.

    Returns:
        A function ``(outputs, targets) -> losses`` with losses of shape ``(b,)``.
    """
    if isinstance(criterion, nn.Module) and hasattr(criterion, "reduction"):
        criterion = copy.deepcopy(criterion)
        criterion.reduction = "none"  # type: ignore[assignment]  # torch: a Tensor

    def losses(outputs: Any, targets: Any) -> Tensor:
        values = criterion(outputs, targets)
        check_losses(values, len(targets))
        return values.flatten(1).mean(1) if values.dim() > 1 else values

    return losses


def check_losses(losses: Tensor, batch_size: int) -> None:
    """Raise unless ``losses`` holds one loss per example.

    Args:
        losses: What a criterion returned, shape ``(b, ...)`` wanted.
        batch_size: The number of examples ``b``.

    Raises:
        ValueError: If it is a scalar or its length is not ``batch_size``.
    """
    expect(
        isinstance(losses, torch.Tensor)
        and losses.dim() >= 1
        and len(losses) == batch_size,
        "criterion(outputs, targets)",
        f"a value of shape {tuple(getattr(losses, 'shape', ()))}",
        f"to hold one loss per example, shape ({batch_size},)",
        'Pass a criterion with reduction="none".',
    )
