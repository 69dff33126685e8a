"""Embeddings: the gradient of a row is the sum over the tokens that chose it."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from opacus_pi.gradients.products import squared_lengths
from opacus_pi.gradients.registry import register_norm_rule


@register_norm_rule(nn.Embedding)
def embedding_squares(
    module: nn.Embedding, x: Tensor, grad: Tensor, names: Collection[str]
) -> Tensor | None:
    r"""Squared norms :math:`\sum_v \|\sum_{t: x_t = v} g_t\|^2` without the table.

    Args:
        module: The layer.
        x: Token numbers, ``(b, ...)``.
        grad: The gradient at its output, ``(b, ..., d)``.
        names: ``["weight"]``.

    Returns:
        float64 ``(b,)``; ``None`` if gradients are scaled by frequency.
    """
    if module.scale_grad_by_freq:
        return None
    tokens, grad = x.reshape(len(x), -1), grad.reshape(len(x), -1, grad.shape[-1])
    if module.padding_idx is not None:
        grad = grad.masked_fill((tokens == module.padding_idx)[..., None], 0.0)
    # Equal tokens of an example become neighbours; each run of them is one segment.
    ordered, order = tokens.sort(1)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    segments = starts.cumsum(1) - 1
    places = torch.empty_like(segments).scatter_(1, order, segments)
    places += torch.arange(len(x), device=x.device)[:, None] * tokens.shape[1]
    sums = torch.zeros_like(grad).flatten(0, 1)
    sums.index_add_(0, places.flatten(), grad.flatten(0, 1))
    return squared_lengths(sums.view_as(grad))
