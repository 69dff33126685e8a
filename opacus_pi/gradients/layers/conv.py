r"""Convolutions as linear layers on patches, and formulas cheaper than unfolding them.

The gradient of the weight is :math:`\sum_t g_t p_t^\top` over output positions
:math:`t` with patches :math:`p_t` of the input. Several exact formulas give its norm:
from explicit patches, from the pixels' Gram matrix, or from the gradient itself. They
differ by orders of magnitude in cost, depending on sizes and strides.

Which of them is used is decided by counting operations, never by timing, so that
results repeat bit for bit. What breaks this: another version of torch, whose kernels
round differently, and a batch of another size where blocks are cut differently.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_pi._torch_compat import both_sides_padding
from opacus_pi.gradients.example_gradients import (
    ExampleGradients,
    ExplicitGradients,
    scaled,
)
from opacus_pi.gradients.layers.registry import register_layer_rule
from opacus_pi.gradients.products import (
    at_least_float32,
    blocks,
    outer_product_squares,
    pair_squares,
    squared_lengths,
)

# Measured on CPUs, one thread:
_SMALL_WEIGHT = 1 << 16  # entries up to which one grouped call beats one per example
_FEW_CHANNELS = 3  # input channels up to which unfolding beats the library's kernels
_ROWS = 8  # a block's number of examples is a multiple of this
# Explicit gradients are kept up to this many times the memory of input and output
# gradient, if the norm has to form them anyway.
_MAX_KEPT = 4


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution: the input positions that an output depends on.

    Each field but the last has one entry for each spatial dimension.

    Args:
        kernel: Number of positions.
        stride: Distance between neighbouring outputs, in input positions.
        padding: Zeros put before and after the input.
        dilation: Distance between neighbouring positions of the kernel.
        groups: Number of groups of channels that do not mix.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def is_point(self) -> bool:
        """Return whether the kernel is a single position."""
        return max(self.kernel) == 1 and max(self.padding) == 0

    @property
    def is_dense(self) -> bool:
        """Return whether neighbouring outputs depend on neighbouring inputs."""
        return max(self.stride) == 1 and max(self.dilation) == 1


# A formula: squared norms ``(b,)`` from window, padded input and output gradient.
SquaresOf = Callable[[Window, Tensor, Tensor], Tensor]


@register_layer_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution_gradients(
    module: Any, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, ExampleGradients] | None:
    """Gradients for a convolution in one, two or three dimensions.

    Args:
        module: The layer.
        x: Its input, ``(b, channels, ...)``.
        grad: The gradient at its output, ``(b, channels, ...)``.
        names: Which of ``"weight"``, ``"bias"`` are wanted.

    Returns:
        The gradients by parameter name; ``None`` for an input without a batch
        dimension.
    """
    return gradients_of(
        module,
        x,
        grad,
        names,
        lambda: ConvolutionGradients(*window_of(module, x), grad),
    )


def gradients_of(
    module: Any,
    x: Tensor,
    grad: Tensor,
    names: Collection[str],
    of_weight: Callable[[], ExampleGradients],
) -> dict[str, ExampleGradients] | None:
    """Gradients for a convolution, transposed or not.

    Args:
        module: The layer.
        x: Its input, ``(b, channels, ...)``.
        grad: The gradient at its output, ``(b, channels, ...)``.
        names: Which of ``"weight"``, ``"bias"`` are wanted.
        of_weight: Returns those of the weight.

    Returns:
        The gradients by parameter name; ``None`` for an input without a batch
        dimension.
    """
    if x.dim() != 2 + len(module.kernel_size):
        return None
    found: dict[str, ExampleGradients] = {}
    if "weight" in names:
        found["weight"] = of_weight()
    if "bias" in names:
        found["bias"] = ExplicitGradients(grad.flatten(2).sum(2))
    return found


class ConvolutionGradients(ExampleGradients):
    """Gradients of a convolution's weight.

    Args:
        x: The layer's padded input.
        window: The window of the convolution, from :func:`window_of`, as is ``x``.
        grad: The gradient at the layer's output.
    """

    def __init__(self, x: Tensor, window: Window, grad: Tensor) -> None:
        self._x, self._window, self._grad = x, window, grad
        self._formula = cheapest_formula(window, x, grad)

    def compute_squares(self) -> Tensor:
        """Return squared norms, by the exact formula of the fewest operations."""
        return self._formula(self._window, self._x, self._grad)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the weighted sum, by one call of the library's kernel."""
        grad = scaled(self._grad, factors)
        return weight_gradient(self._window, self._x, grad, self._window.groups)

    def form(self) -> Tensor:
        """Return the gradients themselves, flat: ``(b, num_out * patch)``."""
        return per_example_weights(self._window, self._x, self._grad)

    def form_rows(self, rows: slice, num_rows: int) -> Tensor:
        """Return some rows of the gradients: those of some output channels."""
        if self._window.groups > 1:
            return super().form_rows(rows, num_rows)
        return per_example_weights(self._window, self._x, self._grad[:, rows])

    def kept(self) -> ExampleGradients:
        """Return explicit gradients where that is cheaper.

        They are formed in two cases: where they take less memory than what they follow
        from (by the count of operations, forming them is then also the fastest way to
        the norm), and where the norm's formula forms them anyway and they do not take
        much more.
        """
        size = self._grad.shape[1] * _patch_size(self._window, self._x)
        needed = self._x[0].numel() + self._grad[0].numel()
        forms_them = self._formula in (squares_by_groups, squares_one_by_one)
        if size < needed or (forms_them and size < _MAX_KEPT * needed):
            return ExplicitGradients(self.form())
        return super().kept()


def window_of(module: Any, x: Tensor) -> tuple[Tensor, Window]:
    """Return the input, padded, and the window that moves over it.

    Symmetric padding with zeros stays a property of the window, because the library's
    kernels do it themselves; any other padding is added to the input.

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


def cheapest_formula(window: Window, x: Tensor, grad: Tensor) -> SquaresOf:
    """Return the exact formula for squared norms that takes the fewest operations.

    Args:
        window: The window of the convolution.
        x: The padded input, ``(b, channels, ...)``.
        grad: The gradient at the output, ``(b, channels, ...)``.
    """
    num_in, num_out = x.shape[1], grad.shape[1]
    positions = grad[0, 0].numel()
    patch = _patch_size(window, x)
    direct = positions * patch * num_out
    forming = (
        squares_by_groups if patch * num_out <= _SMALL_WEIGHT else squares_one_by_one
    )
    if window.groups > 1:
        return forming
    if window.is_point:
        return squares_of_points
    if window.is_dense and _pixel_operations(x, grad) <= direct:
        return squares_by_pixel_pairs
    gram = positions * positions * (patch + num_out)
    if x.is_cuda or num_in <= _FEW_CHANNELS or 2 * gram <= direct:
        return squares_of_patches
    return forming


def _patch_size(window: Window, x: Tensor) -> int:
    """Return the number of inputs of one output: the entries of one filter."""
    return x.shape[1] // window.groups * math.prod(window.kernel)


def _pixel_operations(x: Tensor, grad: Tensor) -> int:
    """Return the number of operations of ``squares_by_pixel_pairs``."""
    pixels, positions = x[0, 0].numel(), grad[0, 0].numel()
    return pixels**2 * x.shape[1] + positions**2 * grad.shape[1]


def squares_of_points(window: Window, x: Tensor, grad: Tensor) -> Tensor:
    """Squares for a 1 x 1 kernel: a linear layer on the pixels that it visits."""
    visited = (slice(None), slice(None), *(slice(None, None, s) for s in window.stride))
    return outer_product_squares(x[visited].flatten(2).mT, grad.flatten(2).mT)


def squares_of_patches(window: Window, x: Tensor, grad: Tensor) -> Tensor:
    """Squares of a linear layer on explicit patches."""
    patch, positions = x.shape[1] * math.prod(window.kernel), grad[0, 0].numel()
    return torch.cat(
        [
            outer_product_squares(patches(window, x[i]).mT, grad[i].flatten(2).mT)
            for i in blocks(x, row_size=patch * positions)
        ]
    )


def patches(window: Window, x: Tensor) -> Tensor:
    """Return patches ``(b, channels * kernel, positions)``, by one strided copy."""
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


def squares_by_pixel_pairs(window: Window, x: Tensor, grad: Tensor) -> Tensor:
    r"""Squares by inner products of pixels, which those of patches are sums of.

    :math:`\langle p_t, p_s\rangle = \sum_\delta \langle x_{t+\delta},
    x_{s+\delta}\rangle`: a sum along the diagonals of the pixels' Gram matrix. That
    matrix takes fewer operations than the patches' own, by a factor of the kernel's
    size, because neighbouring patches share most of their pixels.
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
    r"""Sum :math:`G_{t+\delta, s+\delta}` over the kernel's :math:`\delta`.

    One spatial dimension at a time: a kernel of k x k takes 2 k shifted additions.

    Args:
        gram: Inner products of pixels, with two axes for each spatial dimension.
        row: The axis of t in this dimension.
        column: The axis of s.
        kernel: Size of the kernel in this dimension.
        padding: Padding in this dimension; pixels outside the input count as 0.
    """
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


def squares_by_groups(window: Window, x: Tensor, grad: Tensor) -> Tensor:
    """Squares of explicit gradients: the examples of a block as groups of one call."""
    return torch.cat([squared_lengths(w) for w in _grouped_weights(window, x, grad)])


def squares_one_by_one(window: Window, x: Tensor, grad: Tensor) -> Tensor:
    """Squares of explicit gradients: one call of the library's kernel per example."""
    return torch.cat([squared_lengths(w) for w in _looped_weights(window, x, grad)])


def _grouped_weights(window: Window, x: Tensor, grad: Tensor) -> Iterator[Tensor]:
    """Yield each example's weight gradient, flat, by blocks of examples.

    The library compiles a kernel for every number of examples that it meets, so the
    last block is made up to a round number by examples of the block before.
    """
    num_out, patch = grad.shape[1], _patch_size(window, x)
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
    """Yield each example's weight gradient, flat, one example at a time."""
    for i in range(len(x)):
        a, g = x[i : i + 1], grad[i : i + 1]
        yield weight_gradient(window, a, g, window.groups).view(1, -1)


def _unfolded_weights(window: Window, x: Tensor, grad: Tensor) -> Iterator[Tensor]:
    """Yield each example's weight gradient, flat, from explicit patches."""
    patch, positions = x.shape[1] * math.prod(window.kernel), grad[0, 0].numel()
    for i in blocks(x, row_size=patch * positions):
        yield (grad[i].flatten(2) @ patches(window, x[i]).mT).flatten(1)


def per_example_weights(window: Window, x: Tensor, grad: Tensor) -> Tensor:
    """Return each example's weight gradient, flat: ``(b, num_out * patch)``.

    Args:
        window: The window of the convolution.
        x: The layer's padded input, both from :func:`window_of`.
        grad: The gradient at its output.
    """
    patch = _patch_size(window, x)
    unfolds = x.is_cuda or window.is_point or x.shape[1] <= _FEW_CHANNELS
    by_block = _looped_weights
    if window.groups == 1 and unfolds:
        by_block = _unfolded_weights
    elif patch * grad.shape[1] <= _SMALL_WEIGHT:
        by_block = _grouped_weights
    found, done = x.new_empty(len(x), patch * grad.shape[1]), 0
    for weights in by_block(
        window, x, grad
    ):  # copied at once, because the blocks share memory
        found[done : done + len(weights)] = weights
        done += len(weights)
    return found


def weight_gradient(window: Window, x: Tensor, grad: Tensor, groups: int) -> Tensor:
    """Return the weight gradient summed over the examples, by the library's kernel.

    Args:
        window: The window of the convolution.
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
