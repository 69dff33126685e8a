"""Linear layers: the gradient of the weight is a sum of outer products over tokens."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi.gradients.parameter_gradients import (
    Formed,
    Gradients,
    outer_product_gradients,
)
from opacus_pi.gradients.products import (
    outer_product_squares,
    squared_lengths,
)
from opacus_pi.gradients.registry import (
    register_gradient_rule,
    register_norm_rule,
)


@register_norm_rule(nn.Linear)
def linear_squares(
    module: nn.Module,
    x: Tensor,
    grad: Tensor,
    names: Collection[str],
) -> Tensor | None:
    r"""Squares for :math:`y_t = W a_t + b`: :math:`\nabla W = \sum_t g_t a_t^\top`.

    Args:
        module: The layer.
        x: Its input, ``(b, ..., d)``.
        grad: The gradient at its output, ``(b, ..., p)``.
        names: Which of ``"weight"``, ``"bias"`` count.

    Returns:
        float64 ``(b,)``.
    """
    if x.dim() < 2:
        return None
    if x.dim() == 2:  # one term: ‖g‖²‖a‖² for the weight, ‖g‖² for the bias
        lengths = squared_lengths(grad)
        if "weight" not in names:
            return lengths
        factors = squared_lengths(x)
        if "bias" not in names:
            return lengths * factors
        return torch.addcmul(lengths, lengths, factors)
    b = len(x)
    a, g = x.reshape(b, -1, x.shape[-1]), grad.reshape(b, -1, grad.shape[-1])
    squares: Any = outer_product_squares(a, g) if "weight" in names else 0.0
    total: Tensor = squares + squared_lengths(g.sum(1)) if "bias" in names else squares
    return total


@register_gradient_rule(nn.Linear)
def linear_gradients(
    module: nn.Linear, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, Gradients] | None:
    """Gradients of weight and bias; arguments as above."""
    if x.dim() < 2:
        return None
    a, g = (v.reshape(len(v), -1, v.shape[-1]) for v in (x, grad))
    found: dict[str, Gradients] = {}
    if "weight" in names:
        found["weight"] = outer_product_gradients(a, g)
    if "bias" in names:
        found["bias"] = Formed(grad if x.dim() == 2 else g.sum(1))
    return found
