"""Loss barriers modulo permutation, and the baseline between oracles.

A barrier between two networks of different seeds is mostly one of naming: their hidden
units are in another order. What remains after matching them is compared with the
barriers between pairs of retrained models.

>>> import torch
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

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from opacus_pi._validate import expect
from opacus_pi.models.copies import independent_copy, unwrap
from opacus_pi.models.losses import Criterion
from opacus_pi.models.predictions import Data
from opacus_pi.symmetries.barriers import loss_barrier
from opacus_pi.symmetries.matching import weight_matching
from opacus_pi.symmetries.permutations import PermutationSpec, apply_permutation


def aligned(model_a: nn.Module, model_b: nn.Module, spec: PermutationSpec) -> nn.Module:
    """A copy of ``model_b`` whose hidden units are in the order of ``model_a``'s.

    Args:
        model_a: The model to match to.
        model_b: The model to permute; left as it is. Wrappers are taken off.
        spec: From ``permutation_spec`` of either.

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
    """Loss barriers between all pairs of models: among oracles, the baseline.

    Args:
        models: k models of one architecture.
        data_loader: The set S, as for ``loss_barrier``; it must bear several readings.
        criterion: As for ``loss_barrier``.
        spec: Match each pair first; ``None``: barriers as the weights are.
        **options: Further options of ``loss_barrier``.

    Returns:
        float64 ``(k (k - 1) / 2,)``, in the order of ``itertools.combinations``.

    Raises:
        ValueError: If there are fewer than 2 models.

    Source: paper, Section 5.2 and Figure 1 (right).
    """
    expect(len(models) >= 2, "models", len(models), "to be at least 2", "Train more.")
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
