r"""Convolutions: linear layers on patches, and what is cheaper than unfolding them.

The gradient of the weight is :math:`\sum_t g_t p_t^\top` over output positions
:math:`t` with patches :math:`p_t`. Which exact route computes its norm is decided by
counting operations, never by timing, so that results repeat bit for bit.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_pi._torch_compat import both_sides_padding
from opacus_pi.gradients.parameter_gradients import (
    Formed,
    Gradients,
    Implied,
    scaled,
)
from opacus_pi.gradients.products import (
    at_least_float32,
    blocks,
    outer_product_squares,
    pair_squares,
    squared_lengths,
)
from opacus_pi.gradients.registry import (
    register_gradient_rule,
    register_norm_rule,
)

_SMALL_WEIGHT = 1 << 16  # below, one grouped call beats one call per example
_FEW_CHANNELS = 3  # up to these, unfolding beats the library's kernels
_ROWS = 8  # a round number of them
_KEPT = 4  # times the memory of input and output gradient


@dataclass(frozen=True)
class Window:
    """Which input positions an output position sees, per spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def is_point(self) -> bool:
        """Whether the kernel is a single position."""
        return max(self.kernel) == 1 and max(self.padding) == 0

    @property
    def is_dense(self) -> bool:
        """Whether neighbouring outputs see neighbouring inputs."""
        return max(self.stride) == 1 and max(self.dilation) == 1


Route = Callable[[Window, Tensor, Tensor], Tensor]


@register_norm_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def conv_squares(
    module: Any,
    x: Tensor,
    grad: Tensor,
    names: Collection[str],
) -> Tensor | None:
    """Squared norms for a convolution in one, two or three dimensions.

    Args:
        module: The layer.
        x: Its input, ``(b, channels, ...)``.
        grad: The gradient at its output, ``(b, channels, ...)``.
        names: Which of ``"weight"``, ``"bias"`` count.

    Returns:
        float64 ``(b,)``; ``None`` for an input without batch dimension.
    """
    if x.dim() != 2 + len(module.kernel_size):
        return None
    squares: Tensor | float = 0.0
    if "weight" in names:
        padded, window = window_of(module, x)
        squares = _route(window, padded, grad)(window, padded, grad)
    if "bias" in names:
        squares = squares + squared_lengths(grad.flatten(2).sum(2))
    return cast(Tensor, squares)


@register_gradient_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def conv_gradients(
    module: Any, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, Gradients] | None:
    """Gradients of weight and bias; arguments as above.

    Those of the weight are formed where they take less memory than what they follow
    from, which by the count of operations is also where forming them is cheapest, and
    kept where the norm's route forms them anyway and they take not much more.
    """
    if x.dim() != 2 + len(module.kernel_size):
        return None
    found: dict[str, Gradients] = {}
    if "weight" in names:
        found["weight"] = _weight_gradients(*window_of(module, x), grad)
    if "bias" in names:
        found["bias"] = Formed(grad.flatten(2).sum(2))
    return found


def _weight_gradients(x: Tensor, window: Window, grad: Tensor) -> Gradients:
    """Gradients of the weight."""
    size = grad.shape[1] * (x.shape[1] // window.groups) * math.prod(window.kernel)
    form, route = partial(per_example_weights, window, x, grad), _route(window, x, grad)
    needed = x[0].numel() + grad[0].numel()
    if size < needed or (route in _FORMING and size < _KEPT * needed):
        return Formed(form())

    def weighted(factors: Tensor) -> Tensor:
        return weight_gradient(window, x, scaled(grad, factors), window.groups)

    return Implied(route(window, x, grad), weighted, form)


def window_of(module: Any, x: Tensor) -> tuple[Tensor, Window]:
    """The input with any padding but symmetric zeros put on, and the window.

    Args:
        module: A convolution.
        x: Its input.
    """
    window = Window(
        module.kernel_size, module.stride, (), module.dilation, module.groups
    )
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return x, replace(window, padding=module.padding)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, both_sides_padding(module), mode=mode)
    return x, replace(window, padding=(0,) * len(window.kernel))


def _route(window: Window, x: Tensor, grad: Tensor) -> Route:
    """The cheapest route, by number of operations."""
    num_in, num_out = x.shape[1], grad.shape[1]
    positions = grad[0, 0].numel()
    patch = num_in // window.groups * math.prod(window.kernel)
    direct = positions * patch * num_out
    if window.groups > 1:
        return _grouped if patch * num_out <= _SMALL_WEIGHT else _looped
    if window.is_point:
        return _point
    if window.is_dense and _pixel_operations(x, grad) <= direct:
        return _pixel_pairs
    gram = positions * positions * (patch + num_out)
    if x.is_cuda or num_in <= _FEW_CHANNELS or 2 * gram <= direct:
        return _unfolded
    return _grouped if patch * num_out <= _SMALL_WEIGHT else _looped


def _pixel_operations(x: Tensor, grad: Tensor) -> int:
    """Number of operations of ``_pixel_pairs``."""
    pixels, positions = x[0, 0].numel(), grad[0, 0].numel()
    return pixels**2 * x.shape[1] + positions**2 * grad.shape[1]


def _point(window: Window, x: Tensor, grad: Tensor) -> Tensor:
    """A 1 x 1 kernel: a linear layer on the pixels that the stride visits."""
    visited = (slice(None), slice(None), *(slice(None, None, s) for s in window.stride))
    return outer_product_squares(x[visited].flatten(2).mT, grad.flatten(2).mT)


def _unfolded(window: Window, x: Tensor, grad: Tensor) -> Tensor:
    """A linear layer on explicit patches."""
    patch, positions = x.shape[1] * math.prod(window.kernel), grad[0, 0].numel()
    return torch.cat(
        [
            outer_product_squares(patches(window, x[i]).mT, grad[i].flatten(2).mT)
            for i in blocks(x, row_size=patch * positions)
        ]
    )


def patches(window: Window, x: Tensor) -> Tensor:
    """Patches ``(b, channels * kernel, positions)``, by one strided copy."""
    x = F.pad(x, [p for pad in reversed(window.padding) for p in (pad, pad)])
    b, channels, *sizes = x.shape
    steps = x.stride()[2:]
    spans = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            sizes, window.kernel, window.stride, window.dilation, strict=True
        )
    ]
    view = x.as_strided(
        (b, channels, *window.kernel, *spans),
        (
            *x.stride()[:2],
            *(d * step for d, step in zip(window.dilation, steps, strict=True)),
            *(s * step for s, step in zip(window.stride, steps, strict=True)),
        ),
    )
    return view.reshape(b, channels * math.prod(window.kernel), -1)


def _pixel_pairs(window: Window, x: Tensor, grad: Tensor) -> Tensor:
    r"""Inner products of patches as sums of inner products of pixels.

    :math:`\langle p_t, p_s\rangle = \sum_\delta \langle x_{t+\delta},
    x_{s+\delta}\rangle`: a sum along the diagonals of the pixels' Gram matrix, which
    takes fewer operations than that of the patches by the size of the kernel.
    """
    sizes, spans = x.shape[2:], grad.shape[2:]
    found = []
    for i in blocks(x, row_size=math.prod(sizes) ** 2):
        pixels, g = x[i].flatten(2), grad[i].flatten(2)
        gram = at_least_float32(pixels.mT @ pixels).view(len(g), *sizes, *sizes)
        for k, (kernel, padding) in enumerate(
            zip(window.kernel, window.padding, strict=True)
        ):
            gram = _diagonal_sums(gram, 1 + k, 1 + k + len(sizes), kernel, padding)
        positions = math.prod(spans)
        found.append(pair_squares(gram.reshape(len(g), positions, positions), g.mT @ g))
    return torch.cat(found)


def _diagonal_sums(
    gram: Tensor, row: int, column: int, kernel: int, padding: int
) -> Tensor:
    r"""Sum :math:`G_{t+\delta, s+\delta}` over the kernel's :math:`\delta`."""
    size = gram.shape[row]
    span = size + 2 * padding - kernel + 1
    if kernel == 1 and padding == 0:
        return gram
    shape = list(gram.shape)
    shape[row] = shape[column] = span
    sums = gram.new_zeros(shape)
    for shift in range(-padding, kernel - padding):
        first, last = max(0, -shift), min(span, size - shift)
        if first < last:
            part = gram.narrow(row, first + shift, last - first)
            part = part.narrow(column, first + shift, last - first)
            into = sums.narrow(row, first, last - first)
            into.narrow(column, first, last - first).add_(part)
    return sums


def _grouped(window: Window, x: Tensor, grad: Tensor) -> Tensor:
    """Explicit weight gradients: the examples of a block as groups of one call."""
    return torch.cat([squared_lengths(w) for w in _grouped_weights(window, x, grad)])


def _looped(window: Window, x: Tensor, grad: Tensor) -> Tensor:
    """Explicit weight gradients: one call of the library's kernel per example."""
    return torch.cat([squared_lengths(w) for w in _looped_weights(window, x, grad)])


_FORMING: tuple[Route, ...] = (_grouped, _looped)


def _grouped_weights(window: Window, x: Tensor, grad: Tensor) -> Iterator[Tensor]:
    """Each example's weight gradient, flat, by blocks of rows.

    The library compiles a kernel for every number of rows that it meets, so the last
    block is made up to a round number by rows of the one before.
    """
    num_out, patch = (
        grad.shape[1],
        x.shape[1] // window.groups * math.prod(window.kernel),
    )
    done = 0
    for i in blocks(x, row_size=num_out * patch):
        left = min(i.stop, len(x)) - i.start
        rows = min(-(-left // _ROWS) * _ROWS, i.stop - i.start, len(x))
        start = min(i.start, len(x) - rows)
        a, g = (v[start : start + rows].reshape(1, -1, *v.shape[2:]) for v in (x, grad))
        weight = weight_gradient(window, a, g, rows * window.groups).view(rows, -1)
        yield weight[done - start :]
        done = start + rows


def _looped_weights(window: Window, x: Tensor, grad: Tensor) -> Iterator[Tensor]:
    """The same, by rows."""
    for i in range(len(x)):
        a, g = x[i : i + 1], grad[i : i + 1]
        yield weight_gradient(window, a, g, window.groups).view(1, -1)


def _unfolded_weights(window: Window, x: Tensor, grad: Tensor) -> Iterator[Tensor]:
    """The same, from explicit patches."""
    patch, positions = x.shape[1] * math.prod(window.kernel), grad[0, 0].numel()
    for i in blocks(x, row_size=patch * positions):
        yield (grad[i].flatten(2) @ patches(window, x[i]).mT).flatten(1)


def per_example_weights(window: Window, x: Tensor, grad: Tensor) -> Tensor:
    """Each example's weight gradient, flat: ``(b, num_out * patch)``.

    Args:
        window: What an output position sees.
        x: The layer's padded input, both from :func:`window_of`.
        grad: The gradient at its output.
    """
    patch = x.shape[1] // window.groups * math.prod(window.kernel)
    unfolds = x.is_cuda or window.is_point or x.shape[1] <= _FEW_CHANNELS
    by_block = _looped_weights
    if window.groups == 1 and unfolds:
        by_block = _unfolded_weights
    elif patch * grad.shape[1] <= _SMALL_WEIGHT:
        by_block = _grouped_weights
    found, done = x.new_empty(len(x), patch * grad.shape[1]), 0
    for weights in by_block(window, x, grad):  # at once: the blocks share memory
        found[done : done + len(weights)] = weights
        done += len(weights)
    return found


def weight_gradient(window: Window, x: Tensor, grad: Tensor, groups: int) -> Tensor:
    """The weight gradient summed over the rows, by the library's kernel.

    Args:
        window: What an output position sees.
        x: The padded input, both from :func:`window_of`.
        grad: The gradient at the output.
        groups: Those of the window; more where examples were folded into channels.
    """
    weight = x.new_empty(grad.shape[1], x.shape[1] // groups, *window.kernel)
    gradient: Tensor = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        window.stride,
        window.padding,
        window.dilation,
        False,
        [0] * len(window.kernel),
        groups,
        [False, True, False],
    )[1]
    return gradient
