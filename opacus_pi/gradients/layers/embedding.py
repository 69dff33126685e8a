"""Embeddings: the gradient of a row is the sum over the tokens that chose it."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from opacus_pi.gradients.parameter_gradients import Gradients, token_gradients
from opacus_pi.gradients.products import squared_lengths
from opacus_pi.gradients.registry import register_gradient_rule, register_norm_rule


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
    return _token_squares(*_tokens(module, x, grad))


@register_gradient_rule(nn.Embedding)
def embedding_gradients(
    module: nn.Embedding, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, Gradients] | None:
    """Gradients of the table; arguments as above."""
    if module.scale_grad_by_freq:
        return None
    tokens, grad = _tokens(module, x, grad)
    squares = _token_squares(tokens, grad)
    return {"weight": token_gradients(tokens, grad, module.num_embeddings, squares)}


def _tokens(module: nn.Embedding, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens ``(b, t)`` and their gradients ``(b, t, d)``, 0 for padding."""
    tokens, grad = x.reshape(len(x), -1), grad.reshape(len(x), -1, grad.shape[-1])
    if module.padding_idx is not None:
        grad = grad.masked_fill((tokens == module.padding_idx)[..., None], 0.0)
    return tokens, grad


def _token_squares(tokens: Tensor, grad: Tensor) -> Tensor:
    """Squared norms of the sums over each example's equal tokens."""
    # Equal tokens of an example become neighbours; each run of them is one segment.
    ordered, order = tokens.sort(1)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    segments = starts.cumsum(1) - 1
    places = torch.empty_like(segments).scatter_(1, order, segments)
    places += torch.arange(len(tokens), device=tokens.device)[:, None] * tokens.shape[1]
    sums = torch.zeros_like(grad).flatten(0, 1)
    sums.index_add_(0, places.flatten(), grad.flatten(0, 1))
    return squared_lengths(sums.view_as(grad))
