"""Gradients over whole sets, for methods that need them before the first update."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from opacus_pi.models.backward_gradients import gradients_by_backward
from opacus_pi.models.batches import inputs_and_targets, to_device
from opacus_pi.unlearning.methods import Batch, Task, mean_loss


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that may change."""
    return [p for p in model.parameters() if p.requires_grad]


def _gradients(
    task: Task, params: list[nn.Parameter], loader: Iterable[Batch]
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield size and mean-loss gradient of each batch, in evaluation mode.

    Evaluation mode makes the gradient a function of the data alone: no dropout, and no
    example changes the normalisation of another one.

    Args:
        task: The model and its criterion.
        params: The weights to differentiate with respect to; a weight that a batch does
            not use has gradient 0.
        loader: The batches.
    """
    task.model.eval()
    for batch in loader:
        moved = to_device(inputs_and_targets(batch), params[0].device)
        loss = mean_loss(task, moved)
        found = gradients_by_backward(loss, params)
        pairs = zip(params, found, strict=True)
        yield (
            len(moved[1]),
            tuple(torch.zeros_like(p) if g is None else g for p, g in pairs),
        )


def mean_gradient(task: Task, params: list[nn.Parameter]) -> list[Tensor]:
    """Return the gradient of the forget set's mean loss.

    Args:
        task: The model and the data.
        params: The weights to differentiate with respect to.

    Returns:
        One tensor per weight, of its shape. Batches count by their size, so a short
        last batch does not weigh more than its examples.
    """
    total, size = [torch.zeros_like(p) for p in params], 0
    for num, gradients in _gradients(task, params, task.forget_batches):
        size += num
        for t, g in zip(total, gradients, strict=True):
            t.add_(g, alpha=num)
    return [t / size for t in total]


def mean_squared_gradient(
    task: Task, params: list[nn.Parameter], loader: Iterable[Batch]
) -> list[Tensor]:
    """Return the squared mean-loss gradient of a batch, averaged over batches.

    Args:
        task: The model; its loss is that of evaluation mode.
        params: The weights to differentiate with respect to.
        loader: The batches. With batches of one example the result is the diagonal of
            the empirical Fisher matrix; larger ones are faster and give less.
    """
    total, num_batches = [torch.zeros_like(p) for p in params], 0
    for _, gradients in _gradients(task, params, loader):
        num_batches += 1
        for t, g in zip(total, gradients, strict=True):
            t.add_(g.square())
    return [t / num_batches for t in total]
