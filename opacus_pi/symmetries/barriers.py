"""Loss barriers: how far the loss rises on the straight line between two models.

>>> import torch
>>> model = torch.nn.Linear(2, 2)
>>> batches = [(torch.zeros(3, 2), torch.tensor([0, 1, 1]))]
>>> loss_barrier(model, model, batches, torch.nn.CrossEntropyLoss())
0.0
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range
from opacus_pi.models.batches import device_of, forward, inputs_and_targets, to_device
from opacus_pi.models.copies import independent_copy, unwrap
from opacus_pi.models.losses import Criterion, float64_losses
from opacus_pi.models.no_trace import evaluating, random_state_untouched
from opacus_pi.models.predictions import Data

Batches = Sequence[tuple[Tensor, Tensor]]
_REFINEMENTS = 12


def loss_barrier(
    model_a: nn.Module,
    model_b: nn.Module,
    data_loader: Data,
    criterion: Criterion,
    *,
    num_points: int = 11,
    reset_bn: bool = False,
    refine: bool = False,
) -> float:
    r"""Largest rise of the loss above the chord between two models.

    :math:`\max_{\alpha \in [0,1]} L(\alpha w + \bar\alpha w') - \alpha L(w) -
    \bar\alpha L(w')` with :math:`\bar\alpha = 1 - \alpha`, over an even grid that
    includes 0, 1/2 and 1: never negative, and a lower estimate of the maximum over all
    of [0, 1].

    Args:
        model_a: w, plain or wrapped by Opacus.
        model_b: w', of the same architecture.
        data_loader: The set S: a data set or batches ``(inputs, labels)``. It is read
            once and held in memory, so that every point sees the same examples; a
            fixed subset of 2,000 is usually enough.
        criterion: ``criterion(outputs, labels)``, one loss per example.
        num_points: Number of grid points, at least 2; 1/2 is added if missing.
        reset_bn: Whether to recompute BatchNorm's running statistics on S at every
            point. Between models they fit neither, which alone can make a barrier.
        refine: Whether to search on between the neighbours of the best grid point
            (golden section, with Brent's parabolic steps).

    Returns:
        The barrier, in the loss's units.

    Raises:
        ValueError: If the models differ in architecture, S is empty, or there are
            fewer than 2 points.

    Source: paper, equation (2); Frankle et al. 2020; reset: Jordan et al. 2023
    (arXiv:2211.08403).
    """
    expect(num_points >= 2, "num_points", num_points, "at least 2", "11 is usual.")
    path = _Path(model_a, model_b, data_loader, criterion, reset_bn)
    alphas = np.union1d(np.linspace(0, 1, num_points), 0.5)
    losses = np.array([path.loss(alpha) for alpha in alphas])

    def rise(alpha: Any, loss: Any) -> Any:
        return (loss - losses[0]) - alpha * (losses[-1] - losses[0])

    rises = rise(alphas, losses)
    best = int(np.argmax(rises))
    barrier = float(rises[best])
    if refine:
        low, high = alphas[max(best - 1, 0)], alphas[min(best + 1, len(alphas) - 1)]
        found = minimize_scalar(
            lambda alpha: -rise(alpha, path.loss(alpha)),
            bounds=(low, high),
            method="bounded",
            options={"maxiter": _REFINEMENTS},
        )
        barrier = max(barrier, -float(found.fun))
    return barrier


def path_losses(
    model_a: nn.Module,
    model_b: nn.Module,
    data_loader: Data,
    criterion: Criterion,
    alphas: ArrayLike,
    *,
    reset_bn: bool = False,
) -> NDArray[np.float64]:
    """Mean loss at points of the straight line between two models.

    Args:
        model_a: The model at alpha 1.
        model_b: The model at alpha 0.
        data_loader: As for :func:`loss_barrier`.
        criterion: As for :func:`loss_barrier`.
        alphas: Weights of ``model_a``, ``(k,)`` in [0, 1].
        reset_bn: As for :func:`loss_barrier`.

    Returns:
        float64 ``(k,)``.

    Raises:
        ValueError: As :func:`loss_barrier`, or if an alpha leaves [0, 1].
    """
    in_range(0, 1, remedy="They are weights of model_a.", alphas=alphas)
    path = _Path(model_a, model_b, data_loader, criterion, reset_bn)
    return np.array([path.loss(alpha) for alpha in np.ravel(alphas)])


class _Path:
    """The straight line between two models, and the mean loss on it."""

    def __init__(
        self,
        model_a: nn.Module,
        model_b: nn.Module,
        data: Data,
        criterion: Criterion,
        reset_bn: bool,
    ) -> None:
        self._ends = [_state(model_b), _state(model_a)]
        _check_same(*self._ends)
        self._model = independent_copy(model_a)
        self._batches = _read(data, device_of(self._model))
        self._losses = float64_losses(criterion)
        self._reset_bn = reset_bn

    def loss(self, alpha: float) -> float:
        """Mean loss at ``alpha`` times the first model plus the rest of the second."""
        b, a = self._ends
        self._model.load_state_dict({k: _between(b[k], a[k], alpha) for k in b})
        if self._reset_bn:
            reset_batch_norm_(self._model, self._batches)
        return _mean_loss(self._model, self._batches, self._losses)


def reset_batch_norm_(model: nn.Module, batches: Batches) -> None:
    """Recompute the running statistics of every BatchNorm layer, as means over batches.

    Args:
        model: Changed in place; a model without BatchNorm is left as it is.
        batches: Pairs ``(inputs, labels)`` on the model's device.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    layers = [layer for layer in layers if layer.track_running_stats]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    with evaluating(model):
        for layer in layers:
            layer.reset_running_stats()
            layer.train()
            layer.momentum = None  # cumulative mean
        for inputs, _ in batches:
            forward(model, inputs)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, without wrappers."""
    return {k: v.detach().cpu() for k, v in unwrap(model).state_dict().items()}


def _check_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Raise unless two states can be mixed."""
    shapes = [{k: tuple(v.shape) for k, v in state.items()} for state in (a, b)]
    differing = [
        k for k in shapes[0] | shapes[1] if shapes[0].get(k) != shapes[1].get(k)
    ]
    expect(
        not differing,
        "model_a, model_b",
        f"models that differ in {differing[:3]}",
        "to have one architecture",
        "There is a straight line only between weights of the same shapes.",
    )


def _between(b: Tensor, a: Tensor, alpha: float) -> Tensor:
    """A point of the line; exact at both ends; counters are the first model's."""
    return torch.lerp(b, a, float(alpha)) if a.is_floating_point() else a


def _read(data: Data, device: torch.device) -> Batches:
    """All batches, on the device."""
    loader = DataLoader(data, 256) if isinstance(data, Dataset) else data
    with random_state_untouched():
        batches = [to_device(inputs_and_targets(batch), device) for batch in loader]
    expect(bool(batches), "data_loader", "[]", "to hold an example", "Check the data.")
    return batches


def _mean_loss(
    model: nn.Module, batches: Batches, losses: Callable[..., Tensor]
) -> float:
    """Mean loss over all examples, in float64."""
    with evaluating(model):
        total = sum(
            float(losses(forward(model, x), y).double().sum()) for x, y in batches
        )
    return total / sum(len(y) for _, y in batches)
