"""Choose, check and run the way in which a model's gradient norms are measured."""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._torch_compat import pytree
from opacus_pi._validate import expect
from opacus_pi.gradients.bare import BareParameters
from opacus_pi.gradients.fallback import looped_squares, vmapped_squares
from opacus_pi.gradients.layers.attention import tap_attention
from opacus_pi.gradients.shared_rows import weights_of_shared_rows
from opacus_pi.gradients.tapped_layer import tap_layers
from opacus_pi.gradients.taps import Taps
from opacus_pi.models.batches import (
    arguments,
    forward,
    give_only_logits,
    map_tensors,
    reached,
    rows,
)
from opacus_pi.models.copies import evaluation_copy, require_own_parameters
from opacus_pi.models.losses import Criterion, float64_losses, unit_cotangents

_SLOW = (
    "The examples of a batch influence each other, or the model is random in "
    "evaluation mode: each example is differentiated alone, which is slow."
)


class NormEngine:
    """Squared per-example gradient norms, and the outputs they came with.

    Taps measure what they can in one backward pass; per-example gradients are formed
    only of the parameters left over. The first batch is checked: the example with the
    largest norm is differentiated alone by plain autograd. Where that disagrees (the
    first dimension of a layer's input does not count examples) the taps are given up;
    where it still does, every example is differentiated alone.
    To be made and used inside :func:`~opacus_pi.models.no_trace.isolated`.

    Args:
        model: The live model, plain or wrapped; it is copied (sharing its weights).
        criterion: ``criterion(outputs, targets)``.
    """

    def __init__(self, model: nn.Module, criterion: Criterion) -> None:
        self._live = list(model.parameters())
        expect(
            any(p.requires_grad for p in self._live),
            "model",
            type(model).__name__,
            "must have a trainable parameter",
            "Set requires_grad on the parameters to measure.",
        )
        self._model = evaluation_copy(model)
        self._model.register_forward_hook(give_only_logits)
        self._losses = float64_losses(criterion)
        self._trainable = {
            name: p for name, p in self._model.named_parameters() if p.requires_grad
        }
        self._taps = Taps(self._model)
        tapped = tap_attention(self._taps, self._model)
        tapped |= tap_layers(self._taps, self._model)
        bare = set(self._trainable.values()) - tapped
        self._bare_taps = BareParameters(self._taps) if bare else nullcontext()
        self._vectorised, self._together, self._checked = True, True, False
        self._knows_rows = False  # that are no example's

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
            if not self._knows_rows and len(y) > 1:
                self._knows_rows = True
                self._taps.leave_over(
                    weights_of_shared_rows(self._model, arguments(x), len(y))
                )
            squares, outputs = self._batched(x, y)
            if self._checked or self._checks(squares, x, y):
                return squares, outputs
            self._taps.give_up()
            squares, outputs = self._batched(x, y)
            if self._checks(squares, x, y):
                return squares, outputs
            self._together = False
            warnings.warn(_SLOW, stacklevel=4)
        squares, outputs = self._looped(self._trainable, x, y)
        return squares, pytree.tree_map(lambda *parts: torch.cat(parts), *outputs)

    def _batched(self, x: Any, y: Any) -> tuple[Tensor, Any]:
        """Measure the examples of a batch together."""
        settled = False
        while not settled:
            with self._taps.listening(len(y)):
                outputs = self._forward(x)
                if not self._checked:
                    require_own_parameters(outputs, self._live)
                cotangents, scales = unit_cotangents(self._losses, outputs, y)
                ends, units = reached(outputs, cotangents)
                if ends:
                    torch.autograd.backward(ends, units)
            settled = self._taps.settle()
        squares = self._taps.squares(like=scales) * scales.square()
        if self._taps.leftover:
            squares = squares + self._leftover_squares(x, y, cotangents, scales)
        return squares, map_tensors(Tensor.detach, outputs)

    def _forward(self, x: Any) -> Any:
        """The outputs; once more if giving positions to each example was wrong."""
        try:
            with self._bare_taps:
                return forward(self._model, x)
        except Exception:
            if not self._taps.stop_spreading():
                raise
        return self._forward(x)

    def _leftover_squares(
        self, x: Any, y: Any, cotangents: dict[int, Tensor], scales: Tensor
    ) -> Tensor:
        """Squares of what the taps do not account for, by per-example gradients."""
        names = sorted(self._taps.leftover)
        leftover = {name: self._trainable[name] for name in names}
        if self._vectorised:
            try:
                found = vmapped_squares(self._model, leftover, x, cotangents)
                return found * scales.square()
            except Exception:  # vmap refuses this model in one of many ways
                self._vectorised = False
        return self._looped(leftover, x, y)[0]

    def _looped(
        self, parameters: Mapping[str, Tensor], x: Any, y: Any
    ) -> tuple[Tensor, list[Any]]:
        """Measure one example after the other."""
        return looped_squares(
            self._model, list(parameters.values()), self._losses, x, y
        )

    def _checks(self, squares: Tensor, x: Any, y: Any) -> bool:
        """Whether plain autograd gives the largest of the squared norms as well."""
        place = int(squares.argmax())
        alone, _ = self._looped(
            self._trainable, rows(x, place, place + 1), rows(y, place, place + 1)
        )
        there, truth = squares[place].sqrt(), alone[0].sqrt()
        close = torch.allclose(
            there, truth, rtol=self._tolerance(), atol=0.0, equal_nan=True
        )
        self._checked = close and bool(truth > 0)
        return close

    def _tolerance(self) -> float:
        """Relative difference of norms that rounding may cause."""
        kinds = [p.dtype for p in self._trainable.values()]
        rounding = max(torch.finfo(kind).eps for kind in kinds)
        return max(1e-3 if self.device.type == "cpu" else 1e-2, 32 * rounding)
