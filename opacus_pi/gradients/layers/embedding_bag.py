r"""Embedding bags: all tokens of a bag receive the same gradient, each with its weight.

For :math:`y = \sum_s w_s E_{x_s}` with output gradient g, the gradient of row v is
:math:`g \sum_{s: x_s = v} w_s`, so that

.. math:: \|\nabla E\|^2 = \|g\|^2 \sum_v \Big(\sum_{s: x_s = v} w_s\Big)^2.

The weights are 1 (``"sum"``), those given, or one over the length of the bag
(``"mean"``); padding weighs 0. In ``"max"`` each entry of g goes to the one token with
the largest entry there, so the norm is that of g.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from opacus_pi.gradients.example_gradients import ExampleGradients, scaled
from opacus_pi.gradients.layers.embedding import TableGradients
from opacus_pi.gradients.layers.registry import register_layer_rule
from opacus_pi.gradients.products import blocks, squared_lengths
from opacus_pi.gradients.taps import Call


@register_layer_rule(nn.EmbeddingBag, whole_call=True)
def embedding_bag_gradients(
    module: nn.EmbeddingBag, call: Call, grad: Tensor, names: Collection[str]
) -> dict[str, ExampleGradients] | None:
    """Gradients of the table.

    Args:
        module: The layer.
        call: Its arguments: token numbers ``(b, t)``, or ``(total,)`` with the offset
            of each bag; with mode ``"sum"`` possibly a weight for each token.
        grad: The gradient at its output, ``(b, d)``.
        names: ``["weight"]``.

    Returns:
        The gradients by parameter name; ``None`` if they are scaled by the tokens'
        frequency in the batch, so that examples influence each other.
    """
    if module.scale_grad_by_freq:
        return None
    tokens, offsets, given = _arguments(*call[0], **call[1])
    weights = torch.ones_like(tokens, dtype=grad.dtype) if given is None else given
    if offsets is not None:
        ends = offsets[1:] if module.include_last_offset else None
        starts = offsets[:-1] if module.include_last_offset else offsets
        tokens, weights = _in_rows(tokens, weights, starts, ends)
    if module.padding_idx is not None:
        weights = weights.masked_fill(tokens == module.padding_idx, 0.0)
    if module.mode == "max":
        return {"weight": LargestGradients(module.weight, tokens, weights > 0, grad)}
    if module.mode == "mean":
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1.0)
    return {"weight": BagGradients(tokens, weights, grad, module.num_embeddings)}


def _arguments(
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the arguments of a call in the order of ``nn.EmbeddingBag.forward``."""
    return input.long(), None if offsets is None else offsets.long(), per_sample_weights


def _in_rows(
    tokens: Tensor, weights: Tensor, starts: Tensor, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Put bags that lie one after the other in rows, filled up with weights of 0.

    Args:
        tokens: ``(total,)``.
        weights: ``(total,)``.
        starts: Where each bag starts, ``(b,)``.
        ends: Where it ends; ``None``: where the next one starts.

    Returns:
        Tokens and weights, ``(b, length of the longest bag)``.
    """
    if ends is None:
        ends = torch.cat([starts[1:], starts.new_tensor([len(tokens)])])
    lengths = ends - starts
    longest = int(lengths.max()) if len(lengths) else 0
    steps = torch.arange(longest, device=tokens.device)
    inside = steps < lengths[:, None]
    places = torch.where(inside, starts[:, None] + steps, 0)
    if not len(tokens):
        return places, weights.new_zeros(places.shape)
    return tokens[places], weights[places].masked_fill(~inside, 0.0)


class BagGradients(ExampleGradients):
    """Gradients of a table from which each bag has added up some rows.

    Args:
        tokens: ``(b, t)``, from 0 to ``num_rows - 1``.
        weights: The weight of each token, ``(b, t)``.
        grad: The gradient at each bag, ``(b, d)``.
        num_rows: Rows of the table.
    """

    def __init__(
        self, tokens: Tensor, weights: Tensor, grad: Tensor, num_rows: int
    ) -> None:
        self._tokens, self._weights = tokens, weights.to(grad)
        self._grad, self._num_rows = grad, num_rows

    def compute_squares(self) -> Tensor:
        """Return squared norms, by the tokens' joint weights."""
        joint = TableGradients(self._tokens, self._weights[..., None], self._num_rows)
        return squared_lengths(self._grad) * joint.squares

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the weighted sum, one table."""
        grad = scaled(self._grad, factors)
        sums = grad.new_zeros(self._num_rows, grad.shape[1])
        for i in blocks(grad, row_size=self._tokens.shape[1] * grad.shape[1]):
            rows = self._weights[i, :, None] * grad[i, None]
            sums.index_add_(0, self._tokens[i].flatten(), rows.flatten(0, 1))
        return sums

    def form(self) -> Tensor:
        """Return one table for each example."""
        return self._by_token().form()

    def joins(self, other: ExampleGradients) -> bool:
        """Return whether the others are of bags, too."""
        return isinstance(other, BagGradients)

    def joined(self, others: Sequence["BagGradients"]) -> ExampleGradients:
        """Return the sums."""
        first, *rest = [bag._by_token() for bag in (self, *others)]
        return first.joined(rest)

    def _by_token(self) -> TableGradients:
        """Return the same gradients with a separate output gradient for each token."""
        grad = self._weights[..., None] * self._grad[:, None]
        return TableGradients(self._tokens, grad, self._num_rows)


class LargestGradients(ExampleGradients):
    """Gradients of a table from which each bag has taken the largest entries.

    Args:
        table: The table, ``(rows, d)``.
        tokens: ``(b, t)``.
        counts: Whether a token counts, ``(b, t)``.
        grad: The gradient at each bag, ``(b, d)``.
    """

    def __init__(
        self, table: Tensor, tokens: Tensor, counts: Tensor, grad: Tensor
    ) -> None:
        self._num_rows = len(table)
        self._grad = grad.masked_fill(~counts.any(1, keepdim=True), 0.0)
        if not tokens.shape[1]:
            self._chosen = torch.zeros_like(grad, dtype=torch.int64)
            return
        chosen = []
        for i in blocks(tokens, row_size=tokens.shape[1] * grad.shape[1]):
            entries = table.detach()[tokens[i]]
            entries = entries.masked_fill(~counts[i, :, None], -torch.inf)
            chosen.append(tokens[i].gather(1, entries.argmax(1)))
        self._chosen = torch.cat(chosen)  # (b, d)

    def compute_squares(self) -> Tensor:
        """Return squared norms: every entry of the gradient reaches one token."""
        return squared_lengths(self._grad)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the weighted sum, one table."""
        grad = scaled(self._grad, factors)
        sums = grad.new_zeros(self._num_rows, grad.shape[1])
        return sums.scatter_add_(0, self._chosen, grad)

    def form(self) -> Tensor:
        """Return one table for each example."""
        table = self._grad.new_zeros(
            len(self._grad), self._num_rows, self._grad.shape[1]
        )
        return table.scatter_(1, self._chosen[:, None], self._grad[:, None])
