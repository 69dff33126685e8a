"""The loop that runs every unlearning method, and the rule that may end it early.

Methods differ in their batches, losses, penalties and perturbations; the order of one
update is always the same, so it is written once, here.

>>> trace = UnlearningTrace([0, 1, 2], {"forget_loss": [0.1, 0.5, 0.58]})
>>> StopWhen("forget_loss", target=0.6).reached(trace)
True
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opacus_pi._validate import expect, in_range
from opacus_pi.evaluation.trace import UnlearningTrace, arrived
from opacus_pi.models.batches import inputs_and_targets, to_device
from opacus_pi.unlearning.methods import Batch, Method, Task

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]


def updates(
    method: Method,
    task: Task,
    num_steps: int,
    make_optimizer: MakeOptimizer,
    make_scheduler: MakeScheduler | None = None,
) -> Iterator[int]:
    """Update ``task.model`` in place, and return control after each update.

    Args:
        method: The unlearning method.
        task: The model and the data.
        num_steps: Number of updates; fewer if a pass of the method has none.
        make_optimizer: ``params -> Optimizer``.
        make_scheduler: ``optimizer -> scheduler``, stepped after each pass.

    Returns:
        An iterator over 1, 2, ..., the updates done.
    """
    params = [p for p in task.model.parameters() if p.requires_grad]
    optimizer = make_optimizer(params)
    scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    method = method.prepare(task)
    step = num_pass = 0
    while step < num_steps:
        start = step
        for batches in method.batches(task, num_pass):
            _update(method, task, batches, params, optimizer, start / num_steps)
            step += 1
            yield step
            if step == num_steps:
                return
        if step == start:
            return
        num_pass += 1
        if scheduler is not None:
            scheduler.step()


def _update(
    method: Method,
    task: Task,
    batches: tuple[Batch | None, Batch | None],
    params: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: float,
) -> None:
    """Make one update, in the order that ``Method`` documents.

    A method may return neither a loss nor a penalty. The weights then have no gradients
    (unless ``perturb_`` sets some), and the optimizer leaves weights without a gradient
    as they are. ``SSD`` works this way: it changes the weights in ``project_``.

    Args:
        method: The method, after ``prepare``.
        task: The model and the data.
        batches: Batch of the retain set and batch of the forget set; None for a set
            that this update does not use.
        params: The trainable weights.
        optimizer: Of these weights.
        progress: Fraction of the updates done before the current pass, in [0, 1).
    """
    device = params[0].device
    retain, forget = (
        None if b is None else to_device(inputs_and_targets(b), device) for b in batches
    )
    task.model.train()
    optimizer.zero_grad(set_to_none=True)
    loss = method.loss(task, retain, forget)
    penalty = method.penalty(params, progress)
    if penalty is not None:
        loss = penalty if loss is None else loss + penalty
    if loss is not None:
        loss.backward()
    method.perturb_(params, task.generator)
    optimizer.step()
    method.project_(params)


@dataclass(frozen=True)
class StopWhen:
    """Stop once a metric has been near its target for some evaluations in a row.

    "Near" means the same as in ``time_to_unlearn``: within the tolerance. If the metric
    uses the forget set, the number of updates depends on that set. Unlearning is then
    more than a post-processing of the trained model, and its guarantee is empirical.

    Args:
        metric: Name of a number that ``evaluate`` returns.
        target: The value of retrained models, or another goal.
        tolerance: Largest distance from the target, at least 0.
        patience: Evaluations in a row that must be within it, at least 1.

    Raises:
        ValueError: If a number leaves its range.
    """

    metric: str
    target: float
    tolerance: float = 0.05
    patience: int = 1

    def __post_init__(self) -> None:
        expect(
            math.isfinite(self.target),
            "target",
            self.target,
            "must be finite",
            "Use the metric's mean over retrained models.",
        )
        in_range(0, math.inf, tolerance=self.tolerance, remedy="0.05 is usual.")
        in_range(
            1,
            math.inf,
            patience=self.patience,
            remedy="Pass 1 to stop at the first evaluation that reaches the target.",
        )

    def reached(self, trace: UnlearningTrace) -> bool:
        """Return whether the latest evaluations are all near the target.

        Args:
            trace: The evaluations so far.

        Raises:
            ValueError: If the metric was not evaluated.
        """
        near = arrived(trace, self.target, metric=self.metric, tolerance=self.tolerance)
        return len(near) >= self.patience and bool(near[-self.patience :].all())
