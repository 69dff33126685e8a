"""Which parameters of a model are measured by an exact rule, and which more slowly.

Gradient norms are always those of each example alone. How fast they are found depends
on whether each use of a parameter has a rule. Where one has none, a sweep warns once
for each model, and names the parameter and the operation or layer that uses it.
:func:`rule_coverage` tells the same beforehand, for one batch.
"""

from typing import Any

from torch import nn

from opacus_pi._quiet import quiet
from opacus_pi.gradients.norm_engine import NormEngine
from opacus_pi.models.no_trace import isolated
from opacus_pi.models.own_losses import Criterion


def rule_coverage(
    model: nn.Module, criterion: Criterion, x: Any, y: Any
) -> dict[str, str]:
    """Return how the gradients of each trainable parameter are measured.

    Ask before a long sweep: a parameter without an exact rule makes it several times
    slower. The batch is measured to find out; a batch of few examples is enough, but
    it should have at least two. The model stays as it is.

    Args:
        model: As for :func:`~opacus_pi.gradients.per_example_grad_norms`.
        criterion: The same.
        x: Inputs of a few examples.
        y: Their targets.

    Returns:
        By the parameter's name: ``"exact rule"``; or ``"torch.func"``, each example's
        gradient formed by ``torch.func.vmap``; or ``"one at a time"``, one backward
        pass for each example. A colon and the cause follow the latter two, such as the
        operation that uses the parameter.

    Raises:
        ValueError: As :func:`~opacus_pi.gradients.per_example_grad_norms` does.

    Example:
        >>> import torch
        >>> class Summed(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner, self.rates = (
        ...             nn.Linear(3, 3),
        ...             nn.Parameter(torch.ones(3)),
        ...         )
        ...
        ...     def forward(self, x):
        ...         return torch.tensordot(self.inner(x), self.rates, 1)
        >>> found = rule_coverage(
        ...     Summed(), lambda outputs, y: outputs, torch.ones(2, 3), torch.ones(2)
        ... )
        >>> found["inner.weight"], found["rates"]
        ('exact rule', 'torch.func: used by torch.functional.tensordot')
    """
    with isolated(), quiet():  # what warnings say is returned
        engine = NormEngine(model, criterion)
        engine.squares(x, y)
    return engine.ways
