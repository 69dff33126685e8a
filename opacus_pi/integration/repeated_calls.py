"""Find out whether a model or a criterion gives other values when it is called again.

An audit compares gradients of a batch with those of each example alone, which takes
several calls. If the model draws random numbers, or counts its calls, as some schedules
do, these gradients are of different functions, and comparing them shows nothing.

*Guarantee.* A model or a criterion whose values differ in one of b + 1 calls, by more
than the tolerance, is found.

>>> x, y = torch.ones(2, 3), torch.zeros(2, 3)
>>> changing_part(nn.Dropout(0.5).train(), nn.MSELoss(), x.repeat(9, 9), y, 1e-6)
'The model'
>>> changing_part(nn.Identity(), nn.MSELoss(), x, y, 1e-6)
''
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi.custody.probed_call import distance
from opacus_pi.models.batches import forward, num_examples, tensors_of
from opacus_pi.models.own_losses import CoupledLoss

__all__ = ["changing_part"]


def changing_part(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    x: Any,
    y: Any,
    tolerance: float,
) -> str:
    """Return which part gives other values when it is called again; empty if none.

    Args:
        model: A copy of the model.
        loss: The criterion.
        x: Inputs of b examples.
        y: Their targets.
        tolerance: What rounding may change, relative to the largest value.
    """
    times = num_examples(y)
    with torch.no_grad():
        first = [tensor.clone() for tensor in tensors_of(forward(model, x))]
        for _ in range(times):
            outputs = forward(model, x)
            if distance(first, tensors_of(outputs)) > tolerance:
                return "The model"
        try:
            values = [loss(outputs, y).detach().clone() for _ in range(times + 1)]
        except CoupledLoss:  # which the audit reports by itself
            return ""
    if any(distance(values[:1], [value]) > tolerance for value in values):
        return "The criterion"
    return ""
