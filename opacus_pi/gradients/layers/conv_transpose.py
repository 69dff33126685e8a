r"""Transposed convolutions: convolutions with input and output exchanged.

A transposed convolution is the derivative of a convolution by its input, so
:math:`\langle g, \mathrm{convT}_W(x)\rangle = \langle \mathrm{conv}_W(g), x\rangle`.
The gradient of the weight is therefore the one of a convolution with the same weight,
whose input is the gradient g at our output, and whose output gradient is our input x.
Groups, strides and dilation are the same on both sides.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from opacus_pi.gradients.example_gradients import ExampleGradients
from opacus_pi.gradients.layers.conv import ConvolutionGradients, Window, gradients_of
from opacus_pi.gradients.layers.registry import register_layer_rule


@register_layer_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution_gradients(
    module: Any, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, ExampleGradients] | None:
    """Gradients for a transposed convolution in one, two or three dimensions.

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
        lambda: ConvolutionGradients(*_mirrored(module, x, grad), x),
    )


def _mirrored(module: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Window]:
    """Return the mirrored convolution's input and window.

    ``output_padding`` appends positions to the output, which the last window may not
    reach. If they are fewer than the stride, a convolution ignores them by itself.
    Otherwise (dilation may exceed the stride) it would find room for a further window,
    so the gradient is cut or padded to exactly the positions that the windows cover.

    Args:
        module: The layer.
        x: Its input.
        grad: The gradient at its output.
    """
    window = Window(
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
    )
    spans = [
        (size - 1) * stride + dilation * (kernel - 1) + 1
        for size, stride, dilation, kernel in zip(
            x.shape[2:], window.stride, window.dilation, window.kernel, strict=True
        )
    ]
    # what is missing after the output, as the windows reach ``padding`` beyond it
    behind = [
        span - padding - size
        for span, padding, size in zip(
            spans, window.padding, grad.shape[2:], strict=True
        )
    ]
    appended = [
        padding - missing
        for padding, missing in zip(window.padding, behind, strict=True)
    ]
    if all(n < s for n, s in zip(appended, window.stride, strict=True)):
        return grad, window
    pads = zip(reversed(window.padding), reversed(behind), strict=True)
    grad = F.pad(grad, [n for pair in pads for n in pair])
    return grad, replace(window, padding=(0,) * len(window.kernel))
