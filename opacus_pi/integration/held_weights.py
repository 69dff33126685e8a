"""The weights that an optimizer holds, and whether they are all weights of one model.

Norms and sweeps are over the parameters of a model that the optimizer of a run updates.
Weights that are added to this optimizer later (``add_param_group``) change what an
update is. If they belong to the model, the next norms are over them, too. Weights that
are not the model's are trained on examples, but no norm covers them.

>>> import torch
>>> model, other = nn.Linear(2, 1), nn.Linear(1, 1)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> len(held_by(optimizer)), holds_others(optimizer, model)
(2, False)
>>> optimizer.add_param_group({"params": other.parameters()})
>>> len(held_by(optimizer)), holds_others(optimizer, model)
(4, True)
"""

from torch import nn
from torch.optim import Optimizer

__all__ = ["FOREIGN", "held_by", "holds_others", "ids_held_by"]

FOREIGN = (
    "The optimizer was given weights that are not weights of the model that was "
    "prepared. They are trained on the examples, but no recorded norm is over them, so "
    "the ledger does not cover the update. Make these weights a part of the model "
    "before make_private or make_monitored, or train them with an optimizer of their "
    "own on other data."
)


def held_by(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters of all groups of an optimizer, in their order.

    Args:
        optimizer: Any torch optimizer, also one of Opacus's.
    """
    return [p for group in optimizer.param_groups for p in group["params"]]


def ids_held_by(optimizer: Optimizer) -> set[int]:
    """Return the ids of the parameters of an optimizer.

    Args:
        optimizer: As for ``held_by``.
    """
    return set(map(id, held_by(optimizer)))


def holds_others(optimizer: Optimizer, module: nn.Module) -> bool:
    """Return whether an optimizer holds a trainable weight that is not a module's.

    Args:
        optimizer: As for ``held_by``.
        module: The module.
    """
    own = set(map(id, module.parameters()))
    return any(p.requires_grad and id(p) not in own for p in held_by(optimizer))
