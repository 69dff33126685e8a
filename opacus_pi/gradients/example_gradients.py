r"""Each example's gradient by one parameter, as a tensor or by a formula.

Norms and clipping need only two things of the gradients :math:`g_1, \dots, g_b` by a
parameter: their squared lengths, and one sum :math:`\sum_i c_i g_i` once the clip
factors are known. Both often follow from a layer's input and the gradient at its output
without the gradients themselves, which take b times the memory of the parameter. So a
layer's rule returns an object that can compute either:

>>> import torch
>>> gradients = ExplicitGradients(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
>>> gradients.squares
tensor([25.,  1.], dtype=torch.float64)
>>> gradients.weighted_sum(torch.tensor([1.0, 10.0]))
tensor([ 3., 14.])

Nothing is computed before it is needed, so that one rule serves both: a sweep reads the
squares and drops the object, clipping keeps it (:meth:`ExampleGradients.kept`). What
breaks it: tensors that are overwritten before that. The taps therefore compare the
version counters of a rule's inputs (:class:`opacus_pi.gradients.taps.SavedInputs`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from opacus_pi.gradients.products import squared_lengths, with_rounding


class ExampleGradients(ABC):
    """The gradients of b examples with respect to one parameter."""

    _squares: Tensor | None = None

    @property
    def squares(self) -> Tensor:
        """Squared L2 norm of each gradient, float64 ``(b,)``; computed once."""
        if self._squares is None:
            self._squares = self.compute_squares()
        return self._squares

    @abstractmethod
    def compute_squares(self) -> Tensor:
        """Return the squared L2 norm of each gradient, float64 ``(b,)``."""

    @abstractmethod
    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the sum of the gradients with these factors.

        Args:
            factors: ``(b,)``.

        Returns:
            One tensor with the entries of the parameter in their order, in any shape.
        """

    @abstractmethod
    def form(self) -> Tensor:
        """Return the gradients themselves, ``(b, ...)``."""

    def form_rows(self, rows: slice, num_rows: int) -> Tensor:
        """Return a part of the gradients: some rows of the parameter.

        A subclass overrides this if it need not form the rest.

        Args:
            rows: The rows, from ``start`` to ``stop``.
            num_rows: Length of the parameter's first dimension.

        Returns:
            ``(b, rows * entries of a row)``, in the order of the entries.
        """
        formed = self.form()
        return formed.reshape(len(formed), num_rows, -1)[:, rows].flatten(1)

    @property
    def num_entries(self) -> int:
        """Number of entries of the tensors from which the gradients follow."""
        tensors = _tensors(list(vars(self).values()))
        # Two attributes may be views of one tensor.
        sizes = {tensor.data_ptr(): tensor.numel() for tensor in tensors}
        return sum(sizes.values())

    def add_squares_to(self, total: Tensor) -> Tensor:
        """Return ``total + squares``; a subclass may do it in one operation.

        Args:
            total: Squared norms over other parameters, float64 ``(b,)``.

        Returns:
            float64 ``(b,)``.
        """
        return total + self.squares

    def kept(self) -> "ExampleGradients":
        """Return the form that takes the least memory until the clip factors are known.

        That is this object with its squares computed, or the gradients themselves if
        they take less memory than the tensors from which they are computed.
        """
        self._squares = self.squares
        return self

    def joins(self, other: "ExampleGradients") -> bool:
        """Return whether :meth:`joined` can add up these gradients and others.

        Args:
            other: The gradients of the same parameter from another use of it.
        """
        return False

    def joined(self, others: "Sequence[Any]") -> "ExampleGradients":
        """Return the sums of these gradients and those of other uses.

        Args:
            others: Gradients for which :meth:`joins` is true, at least one.
        """
        raise NotImplementedError

    def inner_products(self, other: "ExampleGradients") -> Tensor | None:
        """Return the inner product of each example's gradients from two uses.

        The uses are that of these gradients and another one of the same parameter.

        Args:
            other: The gradients of the same parameter from another use of it.

        Returns:
            ``(b,)``, in the type in which it was computed; ``None`` if there is no
            formula for such a pair.
        """
        return None


class ExplicitGradients(ExampleGradients):
    """Gradients that are given as a tensor.

    Args:
        values: ``(b, ...)``, the parameter's entries in its order.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def compute_squares(self) -> Tensor:
        """Return the squared L2 norm of each gradient, float64 ``(b,)``."""
        values = self.values
        return squared_lengths(values if values.dim() > 1 else values[:, None])

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the sum of the gradients, each times its factor.

        Args:
            factors: ``(b,)``, converted to the type of the gradients.

        Returns:
            The sum, flat: one entry for each entry of the parameter.
        """
        rows = self.values.flatten(1) if self.values.dim() > 1 else self.values[:, None]
        return factors.to(self.values) @ rows

    def form(self) -> Tensor:
        """Return the gradients themselves, ``(b, ...)``."""
        return self.values

    def kept(self) -> ExampleGradients:
        """Return this object; its squares are computed when they are needed."""
        return self

    def joins(self, other: ExampleGradients) -> bool:
        """Return whether the others are explicit, too."""
        return isinstance(other, ExplicitGradients)

    def joined(self, others: Sequence[Any]) -> ExampleGradients:
        """Return the sums, as explicit gradients."""
        return _formed([self, *others])


class SummedGradients(ExampleGradients):
    r"""Sums of gradients from uses of different kinds, with known inner products.

    For an embedding whose table is also the weight of the output layer, the squared
    norm is :math:`\|E + W\|^2 = \|E\|^2 + \|W\|^2 + 2 \langle E, W\rangle`.

    Args:
        parts: The gradients from each kind of use.
        cross: The sum over pairs of parts of their inner products, ``(b,)``, in the
            type in which it was computed.
    """

    def __init__(self, parts: Sequence[ExampleGradients], cross: Tensor) -> None:
        self._parts, self._cross = parts, cross

    def compute_squares(self) -> Tensor:
        """Return squared norms.

        Where the parts nearly cancel, the possible rounding error is added, so that
        clipping still bounds the example (see
        :func:`~opacus_pi.gradients.products.with_rounding`).
        """
        squares = torch.stack([part.squares for part in self._parts])
        size = squares.sqrt().sum(0).square()
        found = squares.sum(0) + 2 * self._cross
        return with_rounding(found, size, self._cross.dtype)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the weighted sum, flat."""
        sums = [part.weighted_sum(factors).flatten() for part in self._parts]
        return torch.stack(sums).sum(0)

    def form(self) -> Tensor:
        """Return the gradients themselves, ``(b, ...)``."""
        return _formed(self._parts).values

    def form_rows(self, rows: slice, num_rows: int) -> Tensor:
        """Return some rows of the gradients."""
        parts = [part.form_rows(rows, num_rows) for part in self._parts]
        return torch.stack(parts).sum(0)


def joint_squares(gradients: Sequence[ExampleGradients]) -> Tensor:
    """Return squared norms over several parameters of one layer, float64 ``(b,)``.

    Args:
        gradients: One for each parameter, at least one.

    Returns:
        float64 ``(b,)``.
    """
    # Starting at the last parameter, usually the bias: a weight's squares may follow
    # from those of the bias, and are added by one operation then.
    *others, last = gradients
    total = last.squares
    for one in reversed(others):
        total = one.add_squares_to(total)
    return total


def add_up(parts: Sequence[ExampleGradients]) -> ExampleGradients:
    """Return the gradients of a parameter that was used several times.

    The squared length of a sum does not follow from those of its parts. Uses of one
    kind are joined to one use at more positions; uses of different kinds need their
    inner products. Only if a pair has no formula are the gradients formed and added.

    Args:
        parts: One for each use, of the same examples in the same order.
    """
    left, found = list(parts), []
    while left:
        first, *rest = left
        same = [part for part in rest if first.joins(part)]
        left = [part for part in rest if not first.joins(part)]
        found.append(first.joined(same) if same else first)
    if len(found) == 1:
        return found[0]
    cross: list[Tensor] = []
    for one, other in combinations(found, 2):
        product = one.inner_products(other)
        product = other.inner_products(one) if product is None else product
        if product is None:
            return _formed(found)
        cross.append(product)
    return SummedGradients(found, torch.stack(cross).sum(0))


def _formed(parts: Sequence[ExampleGradients]) -> ExplicitGradients:
    """Return the sums of gradients, formed."""
    total = torch.clone(parts[0].form())
    for part in parts[1:]:
        total += part.form().view_as(total)
    return ExplicitGradients(total)


def scaled(values: Tensor, factors: Tensor) -> Tensor:
    """Multiply each row of ``(b, ...)`` by its factor ``(b,)``."""
    return values * factors.to(values).view(-1, *[1] * (values.dim() - 1))


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Yield all tensors among an object's attributes."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, ExampleGradients):
            yield from _tensors(list(vars(value).values()))
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
