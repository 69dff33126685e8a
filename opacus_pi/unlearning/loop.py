"""The loop that runs every unlearning method, and the rules that may end it early.

Methods differ in their batches, losses, penalties and perturbations; the order of one
update is always the same, so it is written once, here.

>>> trace = UnlearningTrace([0, 1, 2], {"forget_loss": [0.1, 0.5, 0.58]})
>>> StopWhen("forget_loss", target=0.6).reached(trace)
True
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from opacus_pi._validate import expect, in_range, positive
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
        num_steps: Number of updates; fewer if a pass makes no update.
        make_optimizer: ``params -> Optimizer``.
        make_scheduler: ``optimizer -> scheduler``, stepped after each pass.

    Returns:
        An iterator over 1, 2, ..., the updates done.
    """
    yield from Updates(method, task, num_steps, make_optimizer, make_scheduler)


class Updates:
    """The updates of one run, pass by pass; iterating over it makes them.

    Args:
        method: The unlearning method; it is prepared here.
        task: The model and the data.
        num_steps: Number of updates; fewer if a pass makes no update.
        make_optimizer: ``params -> Optimizer``.
        make_scheduler: ``optimizer -> scheduler``, stepped after each pass.
        after_pass: Called after each pass but the last one, when no batch of it is left
            and the scheduler has stepped. A run can be continued from there.

    Attributes:
        step: Updates done.
        num_pass: Passes done.
    """

    def __init__(
        self,
        method: Method,
        task: Task,
        num_steps: int,
        make_optimizer: MakeOptimizer,
        make_scheduler: MakeScheduler | None = None,
        after_pass: Callable[["Updates"], None] | None = None,
    ) -> None:
        self._params = [p for p in task.model.parameters() if p.requires_grad]
        self._optimizer = make_optimizer(self._params)
        self._scheduler = (
            None if make_scheduler is None else make_scheduler(self._optimizer)
        )
        self._method, self._task = method.prepare(task), task
        self._num_steps, self._after_pass = num_steps, after_pass
        self.step = self.num_pass = 0

    def __iter__(self) -> Iterator[int]:
        while self.step < self._num_steps:
            start = self.step
            progress = start / self._num_steps
            for batches in self._method.batches(self._task, self.num_pass):
                _update(
                    self._method,
                    self._task,
                    batches,
                    self._params,
                    self._optimizer,
                    progress,
                )
                self.step += 1
                yield self.step
                if self.step == self._num_steps:
                    return
            if self.step == start:
                return
            self.num_pass += 1
            if self._scheduler is not None:
                self._scheduler.step()
            if self._after_pass is not None:
                self._after_pass(self)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later updates depend on, between two passes.

        Random states are not in it, nor what ``Method.prepare`` computed: a new object
        prepares its method itself.
        """
        scheduler = self._scheduler
        return {
            "step": self.step,
            "num_pass": self.num_pass,
            "model": self._task.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that ``state_dict`` returned, with the same arguments.

        Args:
            state: The state.
        """
        self.step, self.num_pass = state["step"], state["num_pass"]
        self._task.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])


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
        ValueError: If a number is outside its range.
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


@dataclass(frozen=True)
class StopAtPlateau:
    """Stop once a metric has stayed the same for some evaluations.

    No target is needed. As with ``StopWhen``, a metric that uses the forget set makes
    the guarantee empirical.

    Args:
        metric: Name of a number that ``evaluate`` returns.
        patience: Evaluations in a row after which it must still be the same, at least
            1.
        min_change: Difference between the largest and the smallest of these values up
            to which they count as the same, at least 0.

    Raises:
        ValueError: If a number is outside its range.
    """

    metric: str
    patience: int = 3
    min_change: float = 0.01

    def __post_init__(self) -> None:
        positive(
            patience=self.patience,
            remedy="Pass 3 to stop when three more evaluations have brought no change.",
        )
        in_range(0, math.inf, min_change=self.min_change, remedy="0.01 is usual.")

    def reached(self, trace: UnlearningTrace) -> bool:
        """Return whether the latest ``patience + 1`` values are the same.

        Args:
            trace: The evaluations so far.

        Raises:
            ValueError: If the metric was not evaluated.
        """
        values = trace[self.metric][-self.patience - 1 :]
        return len(values) > self.patience and bool(np.ptp(values) <= self.min_change)


StopRule = StopWhen | StopAtPlateau


def stop_rule(facts: Mapping[str, Any]) -> StopRule:
    """Return the rule that ``dataclasses.asdict`` described.

    Args:
        facts: The rule's fields.

    Raises:
        TypeError: If they are those of no rule.
    """
    return (StopAtPlateau if "min_change" in facts else StopWhen)(**facts)
