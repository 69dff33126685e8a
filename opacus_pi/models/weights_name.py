"""Name the weights of a model by a hash of its state dict.

A ledger stores this hash for the weights after its last update. So it can be checked
whether a model is the one that the ledger accounts for.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from opacus_pi.files.arrays_file import checksum
from opacus_pi.files.weights_file import described
from opacus_pi.models.copies import unwrap

__all__ = ["name_of_state", "weights_name"]


def weights_name(model: nn.Module) -> str:
    """Return the name of a model's parameters and buffers, a hash of their values.

    Wrappers and devices do not change the hash: it is computed from the state dict of
    the unwrapped model.

    Args:
        model: A module, plain or wrapped.

    Returns:
        ``"sha256:"`` and 64 hexadecimal digits.
    """
    return name_of_state(unwrap(model).state_dict())


def name_of_state(state: Mapping[str, Any]) -> str:
    """Return the name of the weights in a state dict, as ``weights_name``.

    Args:
        state: Of the unwrapped model; what is no tensor does not count.

    Returns:
        ``"sha256:"`` and 64 hexadecimal digits.
    """
    tensors = {
        name.replace("_orig_mod.", ""): value  # the prefix of a compiled layer
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    return f"sha256:{checksum(described(tensors), {})}"
