"""The model that a sweep measures: only weights that the optimizer updates are trained.

A sweep differentiates with respect to every trainable weight of a model. If an
optimizer holds only some of them, such as those of the last layer, the update depends
on the gradients of these alone. The sweep is then given a copy in which the others are
frozen.

The weights of an optimizer may change during a run. Each sweep takes the present ones.
An update with other weights than those of the last sweep leaves the link ``"norm"``
unchecked; one with weights that are not the model's breaks it.

>>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
>>> optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
>>> measured = SweptModel(model, optimizer)()
>>> [p.requires_grad for p in measured.parameters()]
[False, False, True, True]
"""

import weakref

import torch
from torch import nn

from opacus_pi.custody import Chain
from opacus_pi.integration.held_weights import FOREIGN, holds_others, ids_held_by
from opacus_pi.models.copies import evaluation_copy, unwrap

__all__ = ["SweptModel"]

_CHANGED = (
    "The set of weights that the optimizer updates changed after the last sweep: "
    "requires_grad was changed, or weights were added to the optimizer or removed from "
    "it. The updates until the next sweep are recorded with the norms over the earlier "
    "set. Record more often (Recorder(every=...)), or begin a new run with the new set."
)


class SweptModel:
    """A model with the weights that an optimizer updates.

    Args:
        module: The model; referred to weakly.
        optimizer: Any torch optimizer, also one of Opacus's; referred to weakly.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._module, self._optimizer = weakref.ref(module), weakref.ref(optimizer)
        self._measured = self._updated(module)

    def __call__(self) -> nn.Module:
        """Return the model if all of its trainable weights are updated; else a copy.

        Raises:
            ReferenceError: If the model was deleted.
        """
        module = self._module()
        if module is None:
            raise ReferenceError(
                "The model was deleted, so it cannot be measured. Keep it in a "
                "variable."
            )
        self._measured = updated = self._updated(module)
        own = list(unwrap(module).parameters())
        if updated == tuple([p.requires_grad for p in own]):
            return module
        copied = evaluation_copy(module)
        for parameter, is_updated in zip(copied.parameters(), updated, strict=True):
            parameter.requires_grad_(is_updated)
        return copied

    def update_was_made(self, chain: Chain) -> None:
        """Compare the weights of an update with those of the last sweep.

        Before the first sweep they are compared with those of the start.

        Args:
            chain: The chain of custody of the run.
        """
        module, optimizer = self._module(), self._optimizer()
        if module is None or optimizer is None:
            return
        if self._updated(module) != self._measured:
            chain.leave_unchecked("norm", _CHANGED)
        if holds_others(optimizer, module):
            chain.break_link("norm", FOREIGN, rules_out_epsilon=False)

    def _updated(self, module: nn.Module) -> tuple[bool, ...]:
        """Return for each weight whether the optimizer updates it.

        If the optimizer was deleted, every trainable weight counts.

        Args:
            module: The model.
        """
        optimizer = self._optimizer()
        own = unwrap(module).parameters()
        if optimizer is None:
            return tuple([p.requires_grad for p in own])
        held = ids_held_by(optimizer)
        return tuple([p.requires_grad and id(p) in held for p in own])
