"""Detect an optimizer that has made updates before the first recorded one.

A training may be continued by hand: weights and the optimizer's state are loaded, and
then a new run is recorded. Its ledger has the updates since only, although the model
depends on the earlier ones, too.

*What is found.* An optimizer with a count of steps above 0, or with a momentum or
another average that is not 0. *What is not:* weights that are loaded without such a
state.

>>> weight = torch.ones(1, requires_grad=True)
>>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
>>> has_made_updates(optimizer)
False
>>> weight.sum().backward()
>>> optimizer.step()
>>> has_made_updates(optimizer)
True
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from opacus_pi.custody import Chain
from opacus_pi.recording import Recorder

__all__ = ["has_made_updates", "say_earlier_updates"]

_EARLIER = (
    "Before the first recorded update the optimizer had made updates already: its "
    "momentum or its count of steps is not 0. If those used the training data, neither "
    "get_epsilon nor the ledger covers the model: resume with engine.save_checkpoint "
    "and engine.load_checkpoint, which keep what was recorded. If they used public "
    "data only, nothing needs to be done."
)


def say_earlier_updates(optimizer: Optimizer, recorder: Recorder, chain: Chain) -> None:
    """Leave the link "weights" unchecked if a run begins with a used optimizer.

    Args:
        optimizer: The optimizer that is about to make an update.
        recorder: Its run; nothing is said if it has updates already.
        chain: The chain of custody of the run.
    """
    if not recorder.num_steps and has_made_updates(optimizer):
        chain.leave_unchecked("weights", _EARLIER)


def has_made_updates(optimizer: Optimizer) -> bool:
    """Return whether the state of an optimizer shows that it has made updates.

    Args:
        optimizer: Any optimizer of torch; it is only read. Some make their state before
            the first update, with a count of 0.
    """
    return any(map(_is_used, optimizer.state.values()))


def _is_used(state: Any) -> bool:
    """Return whether the state of one parameter is that after an update."""
    if not isinstance(state, dict):
        return False
    if "step" in state:
        return bool(torch.as_tensor(state["step"]).any())
    tensors = (value for value in state.values() if isinstance(value, Tensor))
    return any(bool(tensor.any()) for tensor in tensors)
