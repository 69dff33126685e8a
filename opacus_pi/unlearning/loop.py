"""The one loop that runs every unlearning method."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

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
    """Update ``task.model`` in place, handing back control after each update.

    Args:
        method: What is added to fine-tuning.
        task: The model and the data.
        num_steps: Number of updates; fewer if the method has nothing left to do.
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
    """One update: see ``Method``."""
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
