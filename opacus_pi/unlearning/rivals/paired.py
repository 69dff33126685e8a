"""Methods whose every update uses a batch of each set."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from opacus_pi._validate import expect, in_range
from opacus_pi.models.batches import forward
from opacus_pi.unlearning.methods import (
    Batch,
    Method,
    Task,
    at_least_zero,
    mean_loss,
)


@dataclass(frozen=True)
class NegGradPlus(Method):
    """Descend on the retain set, ascend on the forget set.

    The loss is β L_retain - (1 - β) L_forget.

    Args:
        retain_weight: β in [0, 1].

    Source: Kurmanji et al. 2023 (arXiv:2302.09880), section 4 ("NegGrad+").
    """

    retain_weight: float = 0.95

    needs_forget_set: ClassVar[bool] = True

    def __post_init__(self) -> None:
        in_range(
            0,
            1,
            retain_weight=self.retain_weight,
            remedy=("Pass 1 for plain fine-tuning."),
        )

    def loss(self, task: Task, retain: Batch | None, forget: Batch | None) -> Tensor:
        """Return the weighted difference of the two mean losses."""
        keep = mean_loss(task, retain)
        drop = mean_loss(task, forget)
        return self.retain_weight * keep - (1 - self.retain_weight) * drop


@dataclass(frozen=True)
class RandomLabels(Method):
    """Fit wrong labels on the forget set: L_forget(x, y') + α L_retain, y' ≠ y uniform.

    For classifiers; the wrong labels are drawn anew for every batch.

    Args:
        retain_weight: α, at least 0.

    Source: Golatkar et al. 2020 (arXiv:1911.04933); the form of Fan et al. 2024
    (arXiv:2310.12508), section 4.
    """

    retain_weight: float = 1.0

    needs_forget_set: ClassVar[bool] = True

    def __post_init__(self) -> None:
        remedy = "Pass 0 to train on the forget set only."
        at_least_zero("retain_weight", self.retain_weight, remedy)

    def loss(self, task: Task, retain: Batch | None, forget: Batch | None) -> Tensor:
        """Return the loss of wrong labels plus the weighted loss on the retain set."""
        x, y = cast(Batch, forget)
        outputs = forward(task.model, x)
        wrong = other_labels(y, outputs.shape[-1], task.generator)
        drop = task.criterion(outputs, wrong).mean()
        return drop + self.retain_weight * mean_loss(task, retain)


def other_labels(y: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """Draw labels uniformly among the wrong ones.

    Args:
        y: int64 ``(b,)``, class numbers.
        num_classes: Number of classes, at least 2.
        generator: Source of the random labels.

    Raises:
        ValueError: If the targets are not class numbers, or there is only one class.
    """
    expect(
        y.dim() == 1 and not y.is_floating_point() and num_classes > 1,
        "targets",
        f"{y.dtype}{list(y.shape)} for {num_classes} outputs",
        "must be class numbers (b,) of two or more classes",
        "Use another method: random labels are for classifiers.",
    )
    shift = torch.randint(
        1, num_classes, y.shape, generator=generator, device=generator.device
    )
    return (y + shift.to(y.device)) % num_classes
