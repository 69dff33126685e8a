"""Notice an optimizer whose state is not the one that was saved with the recorded run.

Momentum and other running values of an optimizer hold gradients of earlier updates. A
checkpoint goes back to the weights, the accountant and the ledger of an update. If the
optimizer does not go back with them, its state still has what later updates left there,
which nobody counts any more.

*Guarantee.* A checkpoint whose optimizer state was edited or belongs to another run is
refused. A checkpoint that is loaded without the optimizer, while the optimizer has a
state, leaves the link "weights" unchecked.

*What breaks it.* A state that the loop loads itself, by ``optimizer.load_state_dict``
after ``load_checkpoint``. Settings of the groups, such as the learning rate, are not
compared.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from opacus_pi.files.arrays_file import checksum
from opacus_pi.files.weights_file import described

__all__ = ["NOT_LOADED", "OTHER_STATE", "are_different", "has_state", "state_name"]

NOT_LOADED = (
    "A checkpoint was loaded without the optimizer, which has a state, such as "
    "momentum. If this is the state of updates that the checkpoint does not count, and "
    "training goes on, neither get_epsilon nor the ledger covers what these updates "
    "left in it. Pass optimizer=... to save_checkpoint and load_checkpoint."
)
OTHER_STATE = (
    "The optimizer's state in the checkpoint is not the one that was saved together "
    "with the recorded run: the file was edited, or put together from two checkpoints. "
    "The ledger does not cover what such a state holds. Resume from an unchanged "
    "checkpoint."
)


def state_name(state_dict: Mapping[str, Any]) -> str:
    """Return the types and a hash of the running values of an optimizer.

    Args:
        state_dict: What ``optimizer.state_dict()`` returned.
    """
    flat = dict(_flat(state_dict.get("state", {}), ""))
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    others = {name: repr(value) for name, value in flat.items() if name not in tensors}
    kinds = sorted({str(tensor.dtype) for tensor in tensors.values()})
    return f"{','.join(kinds)} {checksum(described(tensors), others)}"


def are_different(saved: Any, optimizer: Optimizer | None) -> bool:
    """Return whether an optimizer was given another state than the one that was saved.

    Args:
        saved: What ``state_name`` returned then; None: it is not known.
        optimizer: After it was loaded; None: it was not. Values of another type than
            the saved ones were rounded, and are not compared.
    """
    if not isinstance(saved, str) or optimizer is None:
        return False
    found = state_name(optimizer.state_dict())
    return found.split(" ")[0] == saved.split(" ")[0] and found != saved


def has_state(optimizer: Optimizer | None) -> bool:
    """Return whether an optimizer keeps any tensor from one update to the next.

    Args:
        optimizer: The optimizer; None: there is none.
    """
    if optimizer is None:
        return False
    return any(isinstance(value, Tensor) for _, value in _flat(optimizer.state, ""))


def _flat(values: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the values in nested containers, each with the path to it."""
    if isinstance(values, Mapping):
        for number, (key, value) in enumerate(values.items()):
            # The keys of ``optimizer.state`` are parameters.
            part = str(number) if isinstance(key, Tensor) else str(key)
            yield from _flat(value, f"{name}.{part}")
    elif isinstance(values, (list, tuple)):
        for number, value in enumerate(values):
            yield from _flat(value, f"{name}.{number}")
    else:
        yield name, values
