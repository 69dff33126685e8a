r"""Rules of operations: functions of torch that apply weights to a batch.

A layer's rule needs the layer; an operation's rule needs only the call of a function,
such as ``F.linear(x, weight)``. It serves every use of weights that is not a call of a
layer with a rule: free parameters, layers that override ``forward``, weights that are
computed from parameters. Most rules hand the arguments to the rule of the layer that
calls the same function.

Operations that act entry by entry (``x * scale``, ``torch.where(mask, x, token)``) need
no rule of their own: each example gets its own copy of the weight, and autograd returns
the gradient of each copy (:func:`is_pointwise`).

A rule is a function with the arguments of the operation, so that torch's own names and
defaults apply:

>>> use = operation_use(F.linear, (torch.ones(1, 3), torch.ones(2, 3)), {})
>>> use.batch.shape, use.weights["weight"].shape
(torch.Size([1, 3]), torch.Size([2, 3]))
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_pi.gradients.example_gradients import ExampleGradients
from opacus_pi.gradients.layers.activation import slope_gradients
from opacus_pi.gradients.layers.conv import convolution_gradients
from opacus_pi.gradients.layers.conv_transpose import transposed_convolution_gradients
from opacus_pi.gradients.layers.embedding import TableGradients
from opacus_pi.gradients.layers.linear import OuterProducts, linear_gradients
from opacus_pi.gradients.layers.normalisation import (
    batch_norm_gradients,
    group_norm_gradients,
    layer_norm_gradients,
    rms_norm_gradients,
)

Gradients = (
    Mapping[str, ExampleGradients]
    | Mapping[str, Tensor]
    | Mapping[str, ExampleGradients | Tensor]
    | None
)
# ``rule(x, grad, names)``: gradients by name; None where it does not apply
WeightRule = Callable[[Tensor, Tensor, Collection[str]], Gradients]


@dataclass(frozen=True)
class Use:
    """One application of weights to a batch.

    Attributes:
        batch: The operand with a row for each example.
        weights: The other operands, by name; ``None`` for absent ones.
        gradients: From the batch, the gradient at the output and the wanted names to
            each example's gradients by name.
    """

    batch: Any
    weights: Mapping[str, Any]
    gradients: WeightRule


UseOf = Callable[..., Use | None]
_USES: dict[Any, UseOf] = {}
_REFLECTED = {"__rsub__": "sub", "__rdiv__": "div", "__rpow__": "pow"}
_OF_CALLS = {"__get__", "__set__", "__getitem__", "__setitem__"}


def operation_use(
    operation: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Use | None:
    """Return what an operation does with its weights.

    Args:
        operation: A function of torch.
        args: The positional arguments of a call.
        kwargs: Its keyword arguments.

    Returns:
        ``None`` if there is no rule for this operation or for such arguments.
    """
    use_of = _USES.get(operation)
    if use_of is None:
        return None
    try:
        return use_of(*args, **kwargs)
    except TypeError:  # arguments that the rule does not know
        return None


@cache
def is_pointwise(operation: Callable[..., Any]) -> bool:
    """Return whether an operation acts entry by entry on operands of broadcast shapes.

    Torch itself marks such operations by a tag.

    Args:
        operation: A function of torch.
    """
    name = getattr(operation, "__name__", "")
    if name in _OF_CALLS:
        return False
    packet = getattr(torch.ops.aten, _REFLECTED.get(name, name.strip("_")), None)
    if packet is None:
        return False
    first = getattr(packet, packet.overloads()[0])
    return torch.Tag.pointwise in first.tags


def _use(*operations: Callable[..., Any]) -> Callable[[UseOf], UseOf]:
    """Register a function for operations whose arguments it has."""

    def register(use_of: UseOf) -> UseOf:
        _USES.update(dict.fromkeys(operations, use_of))
        return use_of

    return register


_PLAIN = nn.Module()  # for rules that read nothing of their layer


# The arguments below have the names that torch has given them.
@_use(F.linear)
def _linear(input: Any, weight: Tensor, bias: Any = None) -> Use | None:
    if weight.dim() != 2:
        return None

    def gradients(x: Tensor, grad: Tensor, names: Collection[str]) -> Gradients:
        return linear_gradients(_PLAIN, x, grad, names)

    return Use(input, {"weight": weight, "bias": bias}, gradients)


@_use(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _matmul(input: Tensor, other: Tensor) -> Use | None:
    """A batch times a weight, or the other way where the second one has more axes."""
    shared = other.dim() < input.dim() or other.dim() <= 2 or other.shape[0] == 1
    if shared and input.dim() >= max(2, other.dim()):
        return Use(input, {"weight": other}, _from_the_right(other))
    return Use(other, {"weight": input}, _from_the_left(input))


def _from_the_right(weight: Tensor) -> WeightRule:
    r"""Return the rule of :math:`y = x W`, with gradients :math:`\sum_t x_t g_t^\top`.

    Args:
        weight: ``(d,)``, ``(d, p)``, or ``(..., d, p)``, the same for all examples.
    """

    def gradients(x: Tensor, grad: Tensor, names: Collection[str]) -> Gradients:
        if weight.dim() == 2:
            a, g = (v.reshape(len(v), -1, v.shape[-1]) for v in (x, grad))
            return {"weight": OuterProducts(g, a)}
        if weight.dim() == 1:
            products = x * grad[..., None]
            return {"weight": products.reshape(len(x), -1, x.shape[-1]).sum(1)}
        return {"weight": _summed(x.mT @ grad, weight.shape)}

    return gradients


def _from_the_left(weight: Tensor) -> WeightRule:
    r"""Return the rule of :math:`y = W x`, with gradients :math:`\sum_t g_t x_t^\top`.

    Args:
        weight: ``(p, d)`` or ``(..., p, d)``, the same for all examples.
    """

    def gradients(x: Tensor, grad: Tensor, names: Collection[str]) -> Gradients:
        if weight.dim() == 2 and x.dim() > 2:
            a, g = (v.mT.reshape(len(v), -1, v.shape[-2]) for v in (x, grad))
            return {"weight": OuterProducts(a, g)}
        is_shared = weight.dim() < x.dim() or weight.shape[0] == 1
        if 2 < weight.dim() <= x.dim() and is_shared:
            return {"weight": _summed(grad @ x.mT, weight.shape)}
        return None

    return gradients


@_use(torch.einsum, torch.functional.einsum)
def _einsum(equation: str, *operands: Any) -> Use | None:
    """Einstein sums of a batch and a weight, with the batch's axis first.

    Each letter of the weight must occur in the batch or in the result. Where the weight
    has letters of one of them only, it is the matrix of a linear layer.
    """
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    sides = equation.replace(" ", "").split("->")
    terms = sides[0].split(",")
    if len(sides) != 2 or len(terms) != 2 or len(operands) != 2 or "." in equation:
        return None
    result = sides[1]
    # The batch's letter is the first of the result, and occurs in one operand only.
    place = next((i for i in (0, 1) if terms[i][:1] == result[:1]), 0)
    batch, weight = terms[place], terms[1 - place]
    letters = set(batch) | set(result)
    is_plain = all(len(set(term)) == len(term) for term in (*terms, result))
    is_known = result and batch[:1] == result[0] and result[0] not in weight
    if not (is_plain and is_known and set(weight) <= letters):
        return None

    def gradients(x: Tensor, grad: Tensor, names: Collection[str]) -> Gradients:
        return {"weight": _einsum_gradients(x, grad, batch, weight, result)}

    return Use(operands[place], {"weight": operands[1 - place]}, gradients)


def _einsum_gradients(
    x: Tensor, grad: Tensor, batch: str, weight: str, result: str
) -> ExampleGradients | Tensor:
    """Return the gradients of the weight of an Einstein sum.

    Args:
        x: The batch.
        grad: The gradient at the result.
        batch: The letters of the batch.
        weight: The letters of the weight.
        result: The letters of the result.
    """
    one = result[0]
    left = "".join(c for c in weight if c not in batch)  # axes of the result only
    right = "".join(c for c in weight if c not in result)  # axes that are summed over
    positions = "".join(c for c in batch[1:] if c in result and c not in weight)
    if sorted(left + right) != sorted(weight) or not (left and right):
        return torch.einsum(f"{batch},{result}->{one}{weight}", x, grad)
    a = torch.einsum(f"{batch}->{one}{positions}{right}", x)
    g = torch.einsum(f"{result}->{one}{positions}{left}", grad)
    start = 1 + len(positions)
    a = a.flatten(start).reshape(len(x), -1, a[0].numel() // _size(a, positions))
    g = g.flatten(start).reshape(len(x), -1, g[0].numel() // _size(g, positions))
    if weight == left + right:
        return OuterProducts(a, g)
    if weight == right + left:
        return OuterProducts(g, a)
    return torch.einsum(f"{batch},{result}->{one}{weight}", x, grad)


def _size(values: Tensor, positions: str) -> int:
    """Return the number of positions of an example, at least 1."""
    return max(1, values.shape[1 : 1 + len(positions)].numel())


@_use(F.conv1d, F.conv2d, F.conv3d)
def _convolution(
    input: Any,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Use | None:
    if isinstance(padding, str) and padding != "valid":
        return None
    padding = 0 if padding == "valid" else padding
    like = _convolution_layer(weight, stride, padding, dilation, groups)

    def gradients(x: Tensor, grad: Tensor, names: Collection[str]) -> Gradients:
        return convolution_gradients(like, x, grad, names)

    return Use(input, {"weight": weight, "bias": bias}, gradients)


@_use(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _transposed_convolution(
    input: Any,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Use:
    like = _convolution_layer(weight, stride, padding, dilation, groups)

    def gradients(x: Tensor, grad: Tensor, names: Collection[str]) -> Gradients:
        return transposed_convolution_gradients(like, x, grad, names)

    return Use(input, {"weight": weight, "bias": bias}, gradients)


def _convolution_layer(
    weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> SimpleNamespace:
    """Return what the rules read of a convolution with these arguments."""
    kernel = tuple(weight.shape[2:])

    def for_each_axis(value: Any) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values if len(values) == len(kernel) else values * len(kernel)

    return SimpleNamespace(
        kernel_size=kernel,
        stride=for_each_axis(stride),
        padding=for_each_axis(padding),
        dilation=for_each_axis(dilation),
        groups=groups,
        padding_mode="zeros",
    )


@_use(F.embedding)
def _embedding(
    input: Any,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use | None:
    if max_norm is not None or scale_grad_by_freq:
        return None
    ignored = None if padding_idx is None else padding_idx % len(weight)

    def gradients(x: Tensor, grad: Tensor, names: Collection[str]) -> Gradients:
        grad = grad.reshape(len(x), -1, weight.shape[1])
        tokens = x.reshape(len(x), -1)
        if ignored is not None:
            grad = grad.masked_fill((tokens == ignored)[..., None], 0.0)
        return {"weight": TableGradients(tokens, grad, len(weight))}

    return Use(input, {"weight": weight}, gradients)


@_use(Tensor.__getitem__)
def _rows(table: Tensor, index: Any) -> Use | None:
    """Rows of a table, ``table[tokens]``."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        return None

    def gradients(x: Tensor, grad: Tensor, names: Collection[str]) -> Gradients:
        tokens = x.reshape(len(x), -1) % len(table)
        rows = grad.reshape(*tokens.shape, -1)
        return {"weight": TableGradients(tokens, rows, len(table))}

    return Use(index, {"weight": table}, gradients)


@_use(F.layer_norm)
def _layer_norm(
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Use | None:
    given = weight if weight is not None else bias
    like: Any = SimpleNamespace(
        normalized_shape=normalized_shape, eps=eps, weight=given
    )

    def gradients(x: Tensor, grad: Tensor, names: Collection[str]) -> Gradients:
        return layer_norm_gradients(like, x, grad, names)

    return Use(input, {"weight": weight, "bias": bias}, gradients)


@_use(F.rms_norm)
def _rms_norm(
    input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Use:
    like: Any = SimpleNamespace(
        normalized_shape=normalized_shape, eps=eps, weight=weight
    )

    def gradients(x: Tensor, grad: Tensor, names: Collection[str]) -> Gradients:
        return rms_norm_gradients(like, x, grad, names)

    return Use(input, {"weight": weight}, gradients)


@_use(F.group_norm)
def _group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Use:
    like: Any = SimpleNamespace(num_groups=num_groups, eps=eps)

    def gradients(x: Tensor, grad: Tensor, names: Collection[str]) -> Gradients:
        return group_norm_gradients(like, x, grad, names)

    return Use(input, {"weight": weight, "bias": bias}, gradients)


@_use(F.batch_norm)
def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Use | None:
    if training:
        return None
    like: Any = SimpleNamespace(
        running_mean=running_mean, running_var=running_var, training=False, eps=eps
    )

    def gradients(x: Tensor, grad: Tensor, names: Collection[str]) -> Gradients:
        return batch_norm_gradients(like, x, grad, names)

    return Use(input, {"weight": weight, "bias": bias}, gradients)


@_use(F.prelu, torch.prelu, Tensor.prelu)
def _prelu(input: Any, weight: Tensor) -> Use:
    like: Any = SimpleNamespace(num_parameters=weight.numel())

    def gradients(x: Tensor, grad: Tensor, names: Collection[str]) -> Gradients:
        return slope_gradients(like, x, grad, names)

    return Use(input, {"weight": weight}, gradients)


def _summed(values: Tensor, shape: torch.Size) -> Tensor:
    """Sum each example's values over the axes that a weight lacks or has once.

    Args:
        values: ``(b, ...)``, of at least as many axes as the weight.
        shape: The shape of the weight.
    """
    aligned = (1,) * (values.dim() - len(shape)) + tuple(shape)
    shared = [i for i in range(1, values.dim()) if aligned[i] < values.shape[i]]
    return values.sum(shared) if shared else values
