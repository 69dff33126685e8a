"""The gradients that a backward pass brings to the outputs of a model.

A hook on the operation that computed an output sees them, without changing anything.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opacus_pi.models.batches import floating

__all__ = ["OutputGradients", "rows_by_example"]


class OutputGradients:
    """The gradients that the first backward pass brings to the outputs of a model.

    Ghost clipping has a second backward pass, with other weights of the examples. The
    gradients are those after all hooks that the loop has put on the outputs.

    Args:
        outputs: Tensors in any nesting; None: none.
    """

    def __init__(self, outputs: Any) -> None:
        self._found: dict[int, Tensor] = {}
        for place, tensor in enumerate(floating(outputs).values()):
            if tensor.grad_fn is not None:
                saw = partial(self._saw, place, tensor.output_nr)
                tensor.grad_fn.register_prehook(saw)

    def _saw(self, place: int, number: int, gradients: Sequence[Tensor | None]) -> None:
        """Keep a copy of the gradient of one output.

        Args:
            place: The position of the output.
            number: Its position among the results of the operation that computed it.
            gradients: The gradients of these results.
        """
        gradient = gradients[number]
        if gradient is not None:
            self._found.setdefault(place, gradient.detach().clone())

    def tensors(self) -> dict[int, Tensor]:
        """Return the gradients by the position of their output, as far as they came."""
        return self._found

    def by_example(self, size: int, dim: int) -> Tensor:
        """Return the gradients of all outputs, float64 ``(b, k)`` on the CPU.

        Args:
            size: The number of examples, b.
            dim: The dimension along which they are, as in ``rows_of``.
        """
        gradients = [gradient for _, gradient in sorted(self._found.items())]
        return rows_by_example([g.cpu().double() for g in gradients], size, dim)


def rows_by_example(gradients: Sequence[Tensor], size: int, dim: int) -> Tensor:
    """Return gradients of several outputs side by side, ``(b, k)``.

    Args:
        gradients: The gradients; those without a dimension of this size are left out.
        size: The number of examples, b.
        dim: The dimension along which they are, as in ``rows_of``.
    """
    parts = [torch.empty(size, 0, dtype=torch.float64)]
    for gradient in gradients:
        along = [d for d in (dim, 0, 1) if gradient.shape[d : d + 1] == (size,)]
        if along:
            parts.append(gradient.movedim(along[0], 0).reshape(size, -1))
    return torch.cat(parts[1:] or parts, dim=1)
