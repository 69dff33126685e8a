"""SCRUB: a student that selectively disobeys its teacher."""

from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from opacus_pi._validate import positive
from opacus_pi.models.batches import forward
from opacus_pi.models.copies import training_copy
from opacus_pi.unlearning.methods import Batch, Method, Task, at_least_zero, one_pass


@dataclass(frozen=True)
class SCRUB(Method):
    """Obey the trained model on the retain set, disobey it on the forget set.

    The first ``num_max_passes`` passes begin with the forget set and descend on
    -KL(teacher ‖ student) there. Every pass then goes over the retain set and descends
    on α KL(teacher ‖ student) + γ L. KL is that of softmax(logits / τ), times τ².

    Args:
        num_max_passes: Passes that begin with the forget set.
        kl_weight: α, at least 0.
        loss_weight: γ, at least 0.
        temperature: τ, above 0.

    Source: Kurmanji et al. 2023 (arXiv:2302.09880), equation 3 and Algorithm 1, with
    the constants of the released code (meghdadk/SCRUB).
    """

    num_max_passes: int = 2
    kl_weight: float = 0.001
    loss_weight: float = 0.99
    temperature: float = 4.0

    needs_forget_set: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("num_max_passes", "kl_weight", "loss_weight"):
            at_least_zero(name, getattr(self, name), "Pass 0 to switch this part off.")
        positive(temperature=self.temperature, remedy="Pass 1 for the plain softmax.")

    def prepare(self, task: Task) -> Method:
        """Keep a copy of the model as the teacher.

        Args:
            task: The model as trained, before the first update.

        Returns:
            The method with its teacher.
        """
        teacher = training_copy(task.model).eval().requires_grad_(False)
        settings = (self.num_max_passes, self.kl_weight, self.loss_weight)
        return _SCRUBRun(*settings, self.temperature, teacher)

    def batches(
        self, task: Task, num_pass: int
    ) -> Iterator[tuple[Batch | None, Batch | None]]:
        """Yield the forget set in the first passes, and the retain set in all."""
        if num_pass < self.num_max_passes:
            yield from ((None, batch) for batch in task.forget_batches)
        yield from ((batch, None) for batch in one_pass(task.retain_loader, "retain"))

    def pass_length(self, task: Task, num_pass: int) -> int:
        """Count the batches of a pass: of both sets first, later of the retain set."""
        of_retain_set = super().pass_length(task, num_pass)
        if num_pass >= self.num_max_passes:
            return of_retain_set
        return len(cast(Sized, task.forget_loader)) + of_retain_set


@dataclass(frozen=True, eq=False)
class _SCRUBRun(SCRUB):
    """SCRUB with its teacher, the model before the run."""

    teacher: nn.Module = field(default_factory=nn.Identity)

    def loss(self, task: Task, retain: Batch | None, forget: Batch | None) -> Tensor:
        """Return the loss of a step away from the teacher, or of one towards it.

        Args:
            task: The student and the data.
            retain: Batch of the retain set: towards the teacher. None: away from it.
            forget: Batch of the forget set if ``retain`` is None, else None.
        """
        if retain is None:
            x, _ = cast(Batch, forget)
            return -self._distance(forward(task.model, x), x)
        x, y = retain
        outputs = forward(task.model, x)
        fit = task.criterion(outputs, y).mean()
        return self.kl_weight * self._distance(outputs, x) + self.loss_weight * fit

    def _distance(self, outputs: Tensor, x: Tensor) -> Tensor:
        """Return τ² KL(teacher ‖ student), averaged over the batch.

        The factor τ² keeps the gradient's size nearly the same whatever the
        temperature.

        Args:
            outputs: Logits of the student on the batch.
            x: The inputs, on which the teacher is evaluated here.
        """
        with torch.no_grad():
            teacher = functional.log_softmax(
                forward(self.teacher, x) / self.temperature, dim=-1
            )
        student = functional.log_softmax(outputs / self.temperature, dim=-1)
        distance = functional.kl_div(
            student, teacher, reduction="batchmean", log_target=True
        )
        return distance * self.temperature**2
