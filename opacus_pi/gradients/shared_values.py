"""Values that a model computes from its parameters alone, and gradients through them.

A model may use a parameter as it is, or reshape it, cut a part out of it, or compute
with it first: ``weight[:, None, None]``, ``weight.T``, ``table[:length]``,
``log_rate.exp()``. The result is the same for every example of a batch, so a rule can
return each example's gradient with respect to the result. This file turns it into the
gradient with respect to the parameter:

* where the value has the parameter's entries in their order, or is its transpose, the
  gradient is the same one;
* where the value is a part of the parameter, the gradient has the same norm, and is
  zero outside of the part;
* otherwise the value is computed once more, and all examples' gradients are pulled back
  through that computation together.

The guarantee: gradients are exact. What breaks it: a computation that draws random
numbers, or whose constants are overwritten before the gradient arrives.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_pi._torch_compat import num_writes, pytree
from opacus_pi.gradients.example_gradients import ExampleGradients, ExplicitGradients
from opacus_pi.gradients.layers.embedding import TableGradients
from opacus_pi.gradients.layers.linear import OuterProducts
from opacus_pi.gradients.products import at_least_float32, squared_lengths

# Of ``F.embedding``; with any of them gradients are not those of the rows
_OPTIONS = ("padding_idx", "max_norm", "scale_grad_by_freq")


class SharedValue:
    """A tensor that depends on parameters and constants, but not on the examples.

    Attributes:
        tensor: The value, with its autograd graph.
        parameters: The live parameters that it is computed from.

    Args:
        tensor: The value.
        operation: The function that returned it; ``None`` for a parameter itself.
        args: Its positional and keyword arguments, in which a ``SharedValue`` stands
            for each tensor that depends on parameters.
        place: The place of the value in a tuple of results; ``None`` for a single one.
    """

    def __init__(
        self,
        tensor: Tensor,
        operation: Callable[..., Any] | None = None,
        args: tuple[Any, ...] = (),
        place: int | None = None,
    ) -> None:
        self.tensor = tensor
        self._operation, self._args, self._place = operation, args, place
        self._num_writes = num_writes(tensor)
        self._parents = [
            leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, SharedValue)
        ]
        self.parameters: tuple[nn.Parameter, ...]
        if isinstance(tensor, nn.Parameter) and operation is None:
            self.parameters = (tensor,)
        else:
            found = [p for parent in self._parents for p in parent.parameters]
            self.parameters = tuple(dict.fromkeys(found))

    @property
    def is_unchanged(self) -> bool:
        """Return whether the value was not written to since it was computed."""
        return num_writes(self.tensor) == self._num_writes

    @property
    def is_parameter(self) -> bool:
        """Return whether the value is a parameter itself."""
        return self._operation is None

    @property
    def first_row(self) -> "SharedValue":
        """The value's first row: what each example gets of rows that are all equal."""
        return SharedValue(self.tensor[0], Tensor.select, ((self, 0, 0), {}))

    def computed_again(self, parameters: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """Return the value, computed from other tensors in place of the parameters.

        Args:
            parameters: For each parameter of the value, the tensor to compute with.
        """
        return self._computed(dict(parameters), {})

    def _computed(
        self, parameters: dict[nn.Parameter, Tensor], done: "dict[SharedValue, Tensor]"
    ) -> Tensor:
        """Return the value; ``done`` keeps the values that it is computed from."""
        if self._operation is None:
            return parameters[self.parameters[0]]
        if self not in done:
            for parent in self._parents:
                done[parent] = parent._computed(parameters, done)
            args, kwargs = pytree.tree_map(
                lambda leaf: done[leaf] if isinstance(leaf, SharedValue) else leaf,
                self._args,
            )
            result = self._operation(*args, **kwargs)
            done[self] = result if self._place is None else result[self._place]
        return done[self]

    def is_cut_from(self, parameter: nn.Parameter) -> bool:
        """Return whether norms by a parameter follow from those by its entries here."""
        return _is_part(self.tensor, parameter) or self.looked_up(parameter) is not None

    def looked_up(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the row numbers, if the value consists of rows of a parameter.

        Args:
            parameter: The parameter.
        """
        if self._operation is not F.embedding:
            return None
        (numbers, table), options = self._args[0][:2], self._args[1]
        given = [options.get(name) for name in _OPTIONS]
        is_plain = len(self._args[0]) == 2 and all(
            v is None or v is False for v in given
        )
        is_table = isinstance(table, SharedValue) and table.tensor is parameter
        is_known = is_plain and is_table and isinstance(numbers, Tensor)
        return numbers if is_known else None


def through(
    value: SharedValue, parameter: nn.Parameter, inner: ExampleGradients
) -> ExampleGradients:
    """Return gradients by a parameter that follow from those by a shared value.

    Args:
        value: The value.
        parameter: One of the parameters that it is computed from.
        inner: Each example's gradient with respect to the value.
    """
    if _has_the_same_entries(value.tensor, parameter):
        return inner
    if isinstance(inner, OuterProducts) and _is_transpose(value.tensor, parameter):
        return OuterProducts(inner.g, inner.a)
    numbers = value.looked_up(parameter)
    if numbers is not None:
        grad = inner.form()
        tokens = numbers.flatten().expand(len(grad), -1)
        rows = grad.reshape(*tokens.shape, parameter.shape[1])
        return TableGradients(tokens, rows, len(parameter))
    return PulledBack(value, parameter, inner)


class PulledBack(ExampleGradients):
    """Gradients by a parameter, pulled back from a value that is computed from it.

    Args:
        value: The value.
        parameter: The parameter.
        inner: Each example's gradient with respect to the value.
    """

    def __init__(
        self, value: SharedValue, parameter: nn.Parameter, inner: ExampleGradients
    ) -> None:
        self._value, self._parameter, self._inner = value, parameter, inner
        self._is_part = _is_part(value.tensor, parameter)

    def compute_squares(self) -> Tensor:
        """Return squared norms; those of a part are the same as for the parameter."""
        if self._is_part:
            return self._inner.squares
        return squared_lengths(self.form().flatten(1))

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the weighted sum, in the shape of the parameter."""
        return self._pulled(self._inner.weighted_sum(factors)[None])[0]

    def form(self) -> Tensor:
        """Return the gradients themselves, ``(b, *parameter.shape)``."""
        return self._pulled(self._inner.form())

    def joins(self, other: ExampleGradients) -> bool:
        """Return whether the others are gradients by the same part, and join."""
        return (
            isinstance(other, PulledBack)
            and self._is_part
            and other._is_part
            and _geometry(self._value.tensor) == _geometry(other._value.tensor)
            and self._inner.joins(other._inner)
        )

    def joined(self, others: Sequence["PulledBack"]) -> "PulledBack":
        """Return the sums: gradients by the same part."""
        inner = self._inner.joined([other._inner for other in others])
        return PulledBack(self._value, self._parameter, inner)

    def inner_products(self, other: ExampleGradients) -> Tensor | None:
        """Return zeros for parts without a common entry."""
        if not isinstance(other, PulledBack) or not (self._is_part and other._is_part):
            return None
        if _overlap(self._value.tensor, other._value.tensor, self._parameter):
            return None
        return torch.zeros_like(self.squares)

    def _pulled(self, grads: Tensor) -> Tensor:
        """Return vector-Jacobian products of the computation of the value.

        Args:
            grads: Gradients with respect to the value, ``(k, ...)``.

        Returns:
            ``(k, *parameter.shape)``.
        """
        with torch.enable_grad():
            values = {p: at_least_float32(p.detach()) for p in self._value.parameters}
            own = values[self._parameter].requires_grad_()
            again = self._value.computed_again(values)
        grads = grads.reshape(len(grads), *again.shape).to(again.dtype)
        (found,) = torch.autograd.grad(again, own, grads, is_grads_batched=True)
        return found


def as_gradients(found: Tensor | ExampleGradients) -> ExampleGradients:
    """Return a rule's result as gradients: a tensor is the gradients themselves."""
    return ExplicitGradients(found) if isinstance(found, Tensor) else found


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    """Return which entries of its storage a tensor shows, and in which order."""
    return tensor.storage_offset(), tensor.shape, tensor.stride()


def _shows(tensor: Tensor, parameter: nn.Parameter) -> bool:
    """Return whether a tensor shows entries of a parameter, unchanged."""
    return (
        tensor.dtype == parameter.dtype
        and tensor.untyped_storage().data_ptr()
        == parameter.untyped_storage().data_ptr()
    )


def _has_the_same_entries(tensor: Tensor, parameter: nn.Parameter) -> bool:
    """Return whether a tensor has the entries of a parameter in their order."""
    return (
        _shows(tensor, parameter)
        and tensor.numel() == parameter.numel()
        and tensor.is_contiguous()
        and parameter.is_contiguous()
    )


def _is_transpose(tensor: Tensor, parameter: nn.Parameter) -> bool:
    """Return whether a tensor is the transpose of a matrix."""
    return (
        _shows(tensor, parameter)
        and parameter.dim() == 2
        and tensor.shape == parameter.shape[::-1]
        and tensor.stride() == parameter.stride()[::-1]
    )


def _is_part(tensor: Tensor, parameter: nn.Parameter) -> bool:
    """Return whether a tensor shows entries of a parameter, each at most once."""
    if not _shows(tensor, parameter):
        return False
    reach = 0
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(axis for axis in axes if axis[1] > 1):
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def _overlap(one: Tensor, other: Tensor, parameter: nn.Parameter) -> bool:
    """Return whether two parts of a parameter have an entry in common."""
    size = parameter.untyped_storage().nbytes() // parameter.element_size()
    seen = torch.zeros(size, dtype=torch.bool)
    _strided(seen, one).fill_(True)
    return bool(_strided(seen, other).any())


def _strided(flat: Tensor, like: Tensor) -> Tensor:
    """Return the entries of a flat tensor that another tensor shows of its storage."""
    return flat.as_strided(like.shape, like.stride(), like.storage_offset())
