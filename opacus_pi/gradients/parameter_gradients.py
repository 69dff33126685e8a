"""Each example's gradient by one parameter, for clipping: formed, or only implied.

Clipping needs two things of them, their lengths and one weighted sum:

>>> import torch
>>> gradients = Formed(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
>>> gradients.squares
tensor([25.,  1.], dtype=torch.float64)
>>> gradients.weighted(torch.tensor([1.0, 10.0]))
tensor([ 3., 14.])
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opacus_pi.gradients.products import (
    outer_product_squares,
    squared_lengths,
)


@dataclass(frozen=True)
class Formed:
    """Gradients that take no more memory than what they are computed from.

    Args:
        values: ``(b, ...)``, the parameter's entries in its order.
    """

    values: Tensor

    @property
    def squares(self) -> Tensor:
        """Squared norm of each, float64 ``(b,)``."""
        return squared_lengths(self._rows)

    def weighted(self, factors: Tensor) -> Tensor:
        """Their sum with these weights ``(b,)``, one tensor of the entries."""
        return factors.to(self.values) @ self._rows

    def form(self) -> Tensor:
        """The gradients themselves, ``(b, ...)``."""
        return self.values

    @property
    def _rows(self) -> Tensor:
        """One flat row for each example."""
        return self.values.flatten(1) if self.values.dim() > 1 else self.values[:, None]


@dataclass(frozen=True)
class Implied:
    """Gradients that follow from a layer's input and the gradient at its output.

    Args:
        squares: Squared norm of each, float64 ``(b,)``.
        weighted: Gives their sum with weights ``(b,)``.
        form: Gives the gradients themselves, ``(b, ...)``.
    """

    squares: Tensor
    weighted: Callable[[Tensor], Tensor]
    form: Callable[[], Tensor]


Gradients = Formed | Implied


def scaled(values: Tensor, factors: Tensor) -> Tensor:
    """Multiply each row of ``(b, ...)`` by its factor ``(b,)``."""
    return values * factors.to(values).view(-1, *[1] * (values.dim() - 1))


def outer_product_gradients(a: Tensor, g: Tensor) -> Gradients:
    r"""Gradients :math:`\sum_t g_t a_t^\top`, formed where that takes less memory.

    Args:
        a: Inputs, ``(b, t, d)``.
        g: Output gradients, ``(b, t, p)``.
    """

    def weighted(factors: Tensor) -> Tensor:
        return scaled(g, factors).flatten(0, 1).mT @ a.flatten(0, 1)

    def form() -> Tensor:
        return g.mT @ a

    (_, t, d), p = a.shape, g.shape[2]
    if d * p < t * (d + p):
        return Formed(form())
    return Implied(outer_product_squares(a, g), weighted, form)


def token_gradients(
    tokens: Tensor, grad: Tensor, size: int, squares: Tensor
) -> Implied:
    """Gradients of a table of which each token has chosen a row.

    Args:
        tokens: ``(b, t)``, from 0 to ``size - 1``.
        grad: The gradient at each token's row, ``(b, t, d)``.
        size: Rows of the table.
        squares: Their squared norms, float64 ``(b,)``.
    """

    def weighted(factors: Tensor) -> Tensor:
        sums = grad.new_zeros(size, grad.shape[2])
        return sums.index_add_(0, tokens.flatten(), scaled(grad, factors).flatten(0, 1))

    def form() -> Tensor:
        table = grad.new_zeros(len(grad), size, grad.shape[2])
        return table.scatter_add_(1, tokens[..., None].expand_as(grad), grad)

    return Implied(squares, weighted, form)


def summed(parts: list[Gradients]) -> Gradients:
    """Of a parameter that was used several times: formed, unless it is one part.

    Args:
        parts: One for each use, of the same examples in the same order.
    """
    if len(parts) == 1:
        return parts[0]
    total = torch.clone(parts[0].form())
    for part in parts[1:]:
        total += part.form().view_as(total)
    return Formed(total)
