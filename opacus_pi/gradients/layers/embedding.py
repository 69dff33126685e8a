r"""Embeddings: the gradient of a table's row is the sum over the tokens that chose it.

Most rows are chosen by no token of an example, so the table of gradients is never
formed for a norm: :math:`\|\nabla E\|^2 = \sum_v \|\sum_{t: x_t = v} g_t\|^2`.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from opacus_pi.gradients.example_gradients import ExampleGradients, scaled
from opacus_pi.gradients.layers.linear import OuterProducts
from opacus_pi.gradients.layers.registry import register_layer_rule
from opacus_pi.gradients.products import blocks, squared_lengths


@register_layer_rule(nn.Embedding)
def embedding_gradients(
    module: nn.Embedding, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, ExampleGradients] | None:
    """Gradients of the table.

    Args:
        module: The layer.
        x: Token numbers, ``(b, ...)``.
        grad: The gradient at its output, ``(b, ..., d)``.
        names: ``["weight"]``.

    Returns:
        The gradients by parameter name; ``None`` if they are scaled by the tokens'
        frequency in the batch, so that examples influence each other.
    """
    if module.scale_grad_by_freq:
        return None
    tokens, grad = x.reshape(len(x), -1), grad.reshape(len(x), -1, grad.shape[-1])
    if module.padding_idx is not None:
        grad = grad.masked_fill((tokens == module.padding_idx)[..., None], 0.0)
    return {"weight": TableGradients(tokens, grad, module.num_embeddings)}


class TableGradients(ExampleGradients):
    """Gradients of a table from which each token has chosen a row.

    Args:
        tokens: ``(b, t)``, from 0 to ``num_rows - 1``.
        grad: The gradient at each token's row, ``(b, t, d)``.
        num_rows: Rows of the table.
    """

    def __init__(self, tokens: Tensor, grad: Tensor, num_rows: int) -> None:
        self._tokens, self._grad, self._num_rows = tokens, grad, num_rows

    def joins(self, other: ExampleGradients) -> bool:
        """Return whether the others are sums over tokens, too."""
        return isinstance(other, TableGradients)

    def joined(self, others: Sequence["TableGradients"]) -> "TableGradients":
        """Return the sums: a use of the table by more tokens."""
        parts = [self, *others]
        tokens = torch.cat([part._tokens for part in parts], 1)
        grad = torch.cat([part._grad for part in parts], 1)
        return TableGradients(tokens, grad, self._num_rows)

    def inner_products(self, other: ExampleGradients) -> Tensor | None:
        r"""Return inner products with the gradients of a linear layer's weight.

        An output layer may use the table as its weight. Take a token x with gradient e
        at its row, and a position t of the output layer with input a and output
        gradient g. Row x of the weight produced the entry :math:`g_t[x]`, so the inner
        product is :math:`\sum_{s t} g_t[x_s] \langle a_t, e_s\rangle`.
        """
        if not isinstance(other, OuterProducts):
            return None
        found = []
        for i in blocks(other.a, row_size=self._tokens.shape[1] * other.a.shape[1]):
            tokens, a, g = self._tokens[i], other.a[i], other.g[i]
            places = tokens[:, None].expand(-1, a.shape[1], -1)
            pairs = (a @ self._grad[i].mT).mul_(g.gather(2, places))
            found.append(pairs.flatten(1).sum(1))
        return torch.cat(found)

    def compute_squares(self) -> Tensor:
        """Return squared norms of the sums over each example's equal tokens.

        Sorting makes equal tokens of an example neighbours; each run of equal tokens is
        one segment, and the output gradients are added up by segment.
        """
        tokens, grad = self._tokens, self._grad
        ordered, order = tokens.sort(1)
        starts = torch.ones_like(ordered, dtype=torch.bool)
        starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        segments = starts.cumsum(1) - 1
        places = torch.empty_like(segments).scatter_(1, order, segments)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        places += rows * tokens.shape[1]
        sums = torch.zeros_like(grad).flatten(0, 1)
        sums.index_add_(0, places.flatten(), grad.flatten(0, 1))
        return squared_lengths(sums.view_as(grad))

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the weighted sum, one table."""
        sums = self._grad.new_zeros(self._num_rows, self._grad.shape[2])
        rows = scaled(self._grad, factors).flatten(0, 1)
        return sums.index_add_(0, self._tokens.flatten(), rows)

    def form(self) -> Tensor:
        """Return one table for each example."""
        grad = self._grad
        table = grad.new_zeros(len(grad), self._num_rows, grad.shape[2])
        return table.scatter_add_(1, self._tokens[..., None].expand_as(grad), grad)

    def form_rows(self, rows: slice, num_rows: int) -> Tensor:
        """Return some rows of each table."""
        inside = (self._tokens >= rows.start) & (self._tokens < rows.stop)
        grad = self._grad * inside[..., None]
        places = torch.where(inside, self._tokens - rows.start, 0)
        return TableGradients(places, grad, rows.stop - rows.start).form().flatten(1)
