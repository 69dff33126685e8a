"""Choose, check and run the way in which a model's gradient norms are measured."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from opacus_pi.gradients.batches import forward, rows
from opacus_pi.gradients.criterion import Criterion
from opacus_pi.gradients.fallback import looped_squares, vmapped_squares
from opacus_pi.gradients.objective import float64_losses, unit_cotangents
from opacus_pi.gradients.skeleton import check_separate, evaluation_copy

_TOLERANCE = 1e-3  # relative, of a norm against plain autograd; float32 stays below


class NormEngine:
    """Squared per-example gradient norms, and the outputs they came with.

    The first batch is checked: the example with the largest norm is differentiated
    alone by plain autograd. Where that disagrees (examples influence each other, or
    the model is random in evaluation mode) every example is differentiated alone.
    To be made and used inside :func:`~opacus_pi.gradients.isolation.isolated`.

    Args:
        model: The live model, plain or wrapped; it is copied (sharing its weights).
        criterion: ``criterion(outputs, targets)``.
    """

    def __init__(self, model: nn.Module, criterion: Criterion) -> None:
        self._live = list(model.parameters())
        self._model = evaluation_copy(model)
        self._losses = float64_losses(criterion)
        self._trainable = {
            name: p for name, p in self._model.named_parameters() if p.requires_grad
        }
        self._vectorised, self._together, self._checked = True, True, False

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self._trainable.values())).device

    def squares(self, x: Any, y: Any) -> tuple[Tensor, Any]:
        """Return the squared norms, float64 ``(b,)``, and the detached outputs.

        Args:
            x: Inputs of ``b`` examples, on the model's device.
            y: Their targets.
        """
        if self._together:
            squares, outputs = self._batched(x, y)
            if self._checked or self._agrees(squares, x, y):
                return squares, outputs
            self._together = False
        squares, outputs = self._looped(x, y)
        return squares, pytree.tree_map(lambda *parts: torch.cat(parts), *outputs)

    def _batched(self, x: Any, y: Any) -> tuple[Tensor, Any]:
        """Measure the examples of a batch together."""
        outputs = forward(self._model, x)
        if not self._checked:
            check_separate(outputs, self._live)
        cotangents, scales = unit_cotangents(self._losses, outputs, y)
        outputs = pytree.tree_map_only(Tensor, Tensor.detach, outputs)
        if self._vectorised:
            try:
                found = vmapped_squares(self._model, self._trainable, x, cotangents)
                return found * scales.square(), outputs
            except (RuntimeError, ValueError, NotImplementedError):
                self._vectorised = False  # this model takes no part in vmap
        return self._looped(x, y)[0], outputs

    def _looped(self, x: Any, y: Any) -> tuple[Tensor, list[Any]]:
        """Measure one example after the other."""
        parameters = list(self._trainable.values())
        return looped_squares(self._model, parameters, self._losses, x, y)

    def _agrees(self, squares: Tensor, x: Any, y: Any) -> bool:
        """Whether plain autograd gives the largest of the squared norms as well."""
        self._checked = True
        place = int(squares.argmax())
        alone, _ = self._looped(rows(x, place, place + 1), rows(y, place, place + 1))
        there, truth = squares[place].sqrt(), alone[0].sqrt()
        close = torch.isclose(there, truth, rtol=_TOLERANCE, atol=0.0, equal_nan=True)
        if not close:
            warnings.warn(
                "The examples of a batch influence each other, or the model is random "
                "in evaluation mode: each example is differentiated alone, slowly.",
                stacklevel=4,
            )
        return bool(close)
