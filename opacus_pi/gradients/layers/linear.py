r"""Linear layers: the gradient of the weight is a sum of outer products.

For :math:`y_t = W a_t + b` with output gradients :math:`g_t`, where t runs over the
positions of one example (tokens), :math:`\nabla W = \sum_t g_t a_t^\top` and
:math:`\nabla b = \sum_t g_t`.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from opacus_pi.gradients.example_gradients import (
    ExampleGradients,
    ExplicitGradients,
    scaled,
)
from opacus_pi.gradients.layers.registry import register_layer_rule
from opacus_pi.gradients.products import outer_product_squares
from opacus_pi.gradients.taps import Call


@register_layer_rule(nn.Linear)
def linear_gradients(
    module: nn.Module, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, ExampleGradients] | None:
    """Gradients of weight and bias.

    Args:
        module: The layer.
        x: Its input, ``(b, ..., d)``.
        grad: The gradient at its output, ``(b, ..., p)``.
        names: Which of ``"weight"``, ``"bias"`` are wanted.

    Returns:
        The gradients by parameter name; ``None`` for an input without a batch
        dimension.
    """
    if x.dim() < 2:
        return None
    found: dict[str, ExampleGradients] = {}
    if x.dim() == 2:
        outputs = ExplicitGradients(grad)
        weight = SingleOuterProducts(ExplicitGradients(x), outputs)
        found = {"weight": weight, "bias": outputs}
        return {name: found[name] for name in found if name in names}
    a, g = (v.reshape(len(v), -1, v.shape[-1]) for v in (x, grad))
    if "weight" in names:
        found["weight"] = OuterProducts(a, g)
    if "bias" in names:
        found["bias"] = ExplicitGradients(g.sum(1))
    return found


@register_layer_rule(nn.Bilinear, whole_call=True)
def bilinear_gradients(
    module: nn.Bilinear, call: Call, grad: Tensor, names: Collection[str]
) -> dict[str, ExampleGradients] | None:
    """Gradients of a bilinear layer: a linear layer on the products of two inputs.

    Args:
        module: The layer.
        call: Its arguments, ``(b, ..., d)`` and ``(b, ..., e)``.
        grad: The gradient at its output, ``(b, ..., p)``.
        names: Which of ``"weight"``, ``"bias"`` are wanted.

    Returns:
        By name; ``None`` for inputs without a batch dimension.
    """
    args, kwargs = call
    left, right = (*args, *(kwargs[n] for n in ("input1", "input2") if n in kwargs))
    products = (left[..., :, None] * right[..., None, :]).flatten(-2)
    return linear_gradients(module, products, grad, names)


class OuterProducts(ExampleGradients):
    r"""Gradients :math:`\sum_t g_t a_t^\top`.

    Args:
        a: Inputs, ``(b, t, d)``.
        g: Output gradients, ``(b, t, p)``.

    Attributes:
        a: Inputs.
        g: Output gradients.
    """

    def __init__(self, a: Tensor, g: Tensor) -> None:
        self.a, self.g = a, g

    def joins(self, other: ExampleGradients) -> bool:
        """Return whether the others are outer products, too."""
        return isinstance(other, OuterProducts)

    def joined(self, others: Sequence["OuterProducts"]) -> "OuterProducts":
        """Return the sums: a use of the weight at more positions."""
        parts = [self, *others]
        a = torch.cat([part.a for part in parts], 1)
        return OuterProducts(a, torch.cat([part.g for part in parts], 1))

    def compute_squares(self) -> Tensor:
        """Return squared norms, by whichever exact formula takes fewer operations."""
        return outer_product_squares(self.a, self.g)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the weighted sum, one product of matrices, ``(p, d)``."""
        return scaled(self.g, factors).flatten(0, 1).mT @ self.a.flatten(0, 1)

    def form(self) -> Tensor:
        """Return the gradients themselves, ``(b, p, d)``."""
        return self.g.mT @ self.a

    def form_rows(self, rows: slice, num_rows: int) -> Tensor:
        """Return some rows of the gradients: those of some outputs."""
        return (self.g[..., rows].mT @ self.a).flatten(1)

    def kept(self) -> ExampleGradients:
        """Return explicit gradients where they are smaller than inputs and outputs."""
        (_, t, d), p = self.a.shape, self.g.shape[2]
        return ExplicitGradients(self.form()) if d * p < t * (d + p) else super().kept()


class SingleOuterProducts(OuterProducts):
    r"""Gradients :math:`g a^\top` of a single position: :math:`\|g\|^2 \|a\|^2`.

    Args:
        inputs: ``(b, d)``.
        outputs: Output gradients, ``(b, p)``. They are the bias's gradients, too, whose
            squares are computed once for both.
    """

    def __init__(self, inputs: ExplicitGradients, outputs: ExplicitGradients) -> None:
        super().__init__(inputs.values[:, None], outputs.values[:, None])
        self._inputs, self._outputs = inputs, outputs

    def compute_squares(self) -> Tensor:
        """Return squared norms."""
        return self._outputs.squares * self._inputs.squares

    def add_squares_to(self, total: Tensor) -> Tensor:
        """Return ``total + squares`` by one operation."""
        return torch.addcmul(total, self._outputs.squares, self._inputs.squares)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the weighted sum, one product of matrices, ``(p, d)``."""
        return scaled(self._outputs.values, factors).mT @ self._inputs.values
