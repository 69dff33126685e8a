"""Loss barriers: how far the loss rises on the straight line between two models.

Two networks trained with different seeds list their hidden units in different orders,
and most of the barrier between them comes from that. ``aligned`` permutes the second
network to match the first, so that what remains is a barrier *modulo permutation*.
``pairwise_barriers`` among retrained models is the baseline to compare with.

>>> import torch
>>> model = torch.nn.Linear(2, 2)
>>> batches = [(torch.zeros(3, 2), torch.tensor([0, 1, 1]))]
>>> loss_barrier(model, model, batches, torch.nn.CrossEntropyLoss())
0.0

The barriers of all pairs of three models, modulo permutation:

>>> from opacus_pi.symmetries.permutations import permutation_spec
>>> models = [
...     torch.nn.Sequential(
...         torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
...     )
...     for _ in range(3)
... ]
>>> spec = permutation_spec(models[0], torch.randn(4, 2))
>>> batches = [(torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0]))]
>>> pairwise_barriers(models, batches, torch.nn.CrossEntropyLoss(), spec=spec).shape
(3,)
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from opacus_pi._torch_compat import BatchNormBase
from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range
from opacus_pi.models.batches import (
    batches_of,
    device_of,
    forward,
    inputs_and_targets,
    num_examples,
    to_device,
)
from opacus_pi.models.copies import independent_copy, unwrap
from opacus_pi.models.losses import float64_losses
from opacus_pi.models.no_trace import evaluating, random_state_untouched
from opacus_pi.models.own_losses import Criterion
from opacus_pi.models.predictions import Data
from opacus_pi.symmetries.matching import weight_matching
from opacus_pi.symmetries.permutations import PermutationSpec, apply_permutation

__all__ = [
    "aligned",
    "loss_barrier",
    "pairwise_barriers",
    "path_losses",
    "reset_batch_norm_",
]

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
        data_loader: The set S on which the loss is measured: a data set, or batches
            ``(inputs, labels)``. It is read once and kept in memory, so that every
            point uses the same examples. A fixed subset of 2,000 is usually enough.
        criterion: ``criterion(outputs, labels)``, one loss per example.
        num_points: Number of grid points, at least 2; 1/2 is added if missing.
        reset_bn: Whether to recompute the running statistics of BatchNorm on S at every
            point. Interpolated statistics fit neither model, which alone can make a
            barrier.
        refine: Whether to continue the search between the neighbours of the best grid
            point (golden section with Brent's parabolic steps).

    Returns:
        The barrier, in the unit of the loss.

    Raises:
        ValueError: If the models differ in architecture, S is empty, or there are
            fewer than 2 points.

    Source: paper, equation (2); Frankle et al. 2020; reset: Jordan et al. 2023
    (arXiv:2211.08403).
    """
    expect(num_points >= 2, "num_points", num_points, "must be at least 2", "Try 11.")
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
    """Compute the mean loss at points of the straight line between two models.

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
    in_range(
        0,
        1,
        remedy="Pass 1 for model_a, 0 for model_b, or a number between.",
        alphas=alphas,
    )
    path = _Path(model_a, model_b, data_loader, criterion, reset_bn)
    return np.array([path.loss(alpha) for alpha in np.ravel(alphas)])


def aligned(model_a: nn.Module, model_b: nn.Module, spec: PermutationSpec) -> nn.Module:
    """Return a copy of ``model_b`` with its hidden units in the order of ``model_a``.

    Args:
        model_a: The model to match to.
        model_b: The model to permute; not changed. Wrappers are removed in the copy.
        spec: The result of ``permutation_spec`` for either model.

    Returns:
        A model in evaluation mode that computes the same function as ``model_b``.

    Raises:
        ValueError: If a model does not fit the spec.
    """
    twin = independent_copy(model_b)
    state = twin.state_dict()
    found = weight_matching(spec, unwrap(model_a).state_dict(), state)
    twin.load_state_dict(apply_permutation(spec, found, state))
    return twin


def pairwise_barriers(
    models: Sequence[nn.Module],
    data_loader: Data,
    criterion: Criterion,
    *,
    spec: PermutationSpec | None = None,
    **options: Any,
) -> NDArray[np.float64]:
    """Compute the loss barriers between all pairs of models.

    Among retrained models this is the baseline for the barrier of an unlearned model.

    Args:
        models: k models of one architecture.
        data_loader: As for ``loss_barrier``; it is read once for each pair.
        criterion: As for ``loss_barrier``.
        spec: If given, each pair is aligned first; ``None`` compares the weights in
            their own order.
        **options: Further options of ``loss_barrier``.

    Returns:
        float64 ``(k (k - 1) / 2,)``, in the order of ``itertools.combinations``.

    Raises:
        ValueError: If there are fewer than 2 models.

    Source: paper, Section 5.2 and Figure 1 (right).
    """
    expect(
        len(models) >= 2,
        "models",
        len(models),
        "must contain at least 2 models",
        "Pass models that were trained with different seeds.",
    )
    return np.array(
        [
            loss_barrier(
                a,
                b if spec is None else aligned(a, b, spec),
                data_loader,
                criterion,
                **options,
            )
            for a, b in combinations(models, 2)
        ]
    )


class _Path:
    """The straight line between two models, and the mean loss on it.

    The data are read once and the model is copied once; each point of the line only
    loads new weights. Keeping the batches in memory is what makes losses at different
    points comparable: a shuffled or augmented loader would give each point other
    examples.

    Args:
        model_a: The model at alpha 1.
        model_b: The model at alpha 0, of the same architecture.
        data: A data set or batches.
        criterion: One loss per example.
        reset_bn: Whether to recompute the BatchNorm statistics at every point.

    Raises:
        ValueError: If the models differ in architecture or there are no data.
    """

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
        """Return the mean loss at alpha times the first plus the rest of the second.

        Args:
            alpha: Weight of the first model, in [0, 1].
        """
        b, a = self._ends
        self._model.load_state_dict({k: _between(b[k], a[k], alpha) for k in b})
        if self._reset_bn:
            reset_batch_norm_(self._model, self._batches)
        return _mean_loss(self._model, self._batches, self._losses)


def reset_batch_norm_(model: nn.Module, batches: Batches) -> None:
    """Recompute the running statistics of every BatchNorm layer, as means over batches.

    The layers run in training mode, so each is normalised by the batch statistics of
    the interpolated weights before it. Everything else runs in evaluation mode (no
    dropout).

    Args:
        model: Changed in place; a model without BatchNorm does not change.
        batches: Pairs ``(inputs, labels)`` on the model's device.
    """
    layers = _with_running_statistics(model)
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


def _with_running_statistics(model: nn.Module) -> list[BatchNormBase]:
    """Return the BatchNorm layers that have running statistics to recompute.

    A layer without them normalises by the batch in evaluation mode, too.
    """
    layers = [m for m in model.modules() if isinstance(m, BatchNormBase)]
    return [layer for layer in layers if layer.track_running_stats]


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, without wrappers."""
    return {k: v.detach().cpu() for k, v in unwrap(model).state_dict().items()}


def _check_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Raise unless two states have the same names and shapes.

    Equal shapes do not prove equal architectures (two activation functions have no
    weights), but without them there is no line between the weights.
    """
    shapes = [{k: tuple(v.shape) for k, v in state.items()} for state in (a, b)]
    differing = [
        k for k in shapes[0] | shapes[1] if shapes[0].get(k) != shapes[1].get(k)
    ]
    expect(
        not differing,
        "model_a, model_b",
        f"models that differ in {differing[:3]}",
        "must have the same architecture",
        "Pass two models with the same layers: there is a straight line only between "
        "weights of the same shapes.",
    )


def _between(b: Tensor, a: Tensor, alpha: float) -> Tensor:
    """Return a point of the line, exact at both ends; integers are taken from a.

    Args:
        b: The tensor at alpha 0.
        a: The tensor at alpha 1. Integers are counters of batches, which no computation
            in evaluation mode uses.
        alpha: Weight of ``a``, in [0, 1].
    """
    return torch.lerp(b, a, float(alpha)) if a.is_floating_point() else a


def _read(data: Data, device: torch.device) -> Batches:
    """Read all batches to the device.

    The random state is restored afterwards, so that a loader that shuffles does not
    change the caller's later draws.

    Raises:
        ValueError: If there is no batch.
    """
    loader = batches_of(data, 256)
    with random_state_untouched():
        batches = [to_device(inputs_and_targets(batch), device) for batch in loader]
    expect(
        bool(batches),
        "data_loader",
        "[]",
        "must contain at least one example",
        "Pass a data set or loader that is not empty.",
    )
    return batches


def _mean_loss(
    model: nn.Module, batches: Batches, losses: Callable[..., Tensor]
) -> float:
    """Return the mean loss over all examples, in float64."""
    with evaluating(model):
        total = sum(
            float(losses(forward(model, x), y).double().sum()) for x, y in batches
        )
    return total / sum(num_examples(y) for _, y in batches)
