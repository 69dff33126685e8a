"""Selective synaptic dampening: importances once, then one multiplication."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from opacus_pi._validate import positive
from opacus_pi.unlearning.methods import Batch, Method, Task
from opacus_pi.unlearning.rivals.gradients import mean_squared_gradient, trainable


@dataclass(frozen=True)
class SSD(Method):
    """Selective synaptic dampening: shrink weights that matter to the forget set only.

    Where I_forget > a I_all: θ ← min(λ I_all / I_forget, 1) θ. The importance I is the
    mean over batches of the squared gradient of the mean loss in evaluation mode, as in
    the authors' code. With batches of one example it is the Fisher diagonal of the
    paper. The method makes this one update, and the run ends.

    Args:
        selection_weight: a, above 0; a larger value changes fewer weights.
        dampening: λ, above 0; a smaller value shrinks more.

    Source: Foster et al. 2024 (arXiv:2308.07707), equations 4-6.
    """

    selection_weight: float = 10.0
    dampening: float = 1.0

    needs_forget_set: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive(
            selection_weight=self.selection_weight,
            dampening=self.dampening,
            remedy="Try selection_weight=10 and dampening=1, as in the paper.",
        )

    def prepare(self, task: Task) -> Method:
        """Compute each weight's factor; the only time that the data are used.

        Args:
            task: The model and the data.

        Returns:
            The method with the factors, each in [0, 1].
        """
        params = trainable(task.model)
        forget = mean_squared_gradient(task, params, task.forget_batches)
        everything = mean_squared_gradient(
            task, params, chain(task.retain_loader, task.forget_batches)
        )
        factors = [
            torch.where(
                f > self.selection_weight * d,
                (self.dampening * d / f).clamp(max=1.0),
                torch.ones_like(d),
            )
            for f, d in zip(forget, everything, strict=True)
        ]
        return _SSDRun(self.selection_weight, self.dampening, tuple(factors))

    def batches(
        self, task: Task, num_pass: int
    ) -> Iterator[tuple[Batch | None, Batch | None]]:
        """Yield a single update without a batch."""
        if num_pass == 0:
            yield None, None

    def pass_length(self, task: Task, num_pass: int) -> int:
        """Return 1: there is a single update."""
        return int(num_pass == 0)

    def loss(self, task: Task, retain: Batch | None, forget: Batch | None) -> None:
        """Return None: there is nothing to differentiate."""


@dataclass(frozen=True, eq=False)
class _SSDRun(SSD):
    """SSD with the factor of each weight."""

    factors: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def project_(self, params: Sequence[Tensor]) -> None:
        """Multiply each weight by its factor."""
        for p, factor in zip(params, self.factors, strict=True):
            p.mul_(factor)
