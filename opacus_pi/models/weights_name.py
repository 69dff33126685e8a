"""Name the weights of a model by a hash of its state dict.

A ledger stores this hash for the weights after its last update. So it can be checked
whether a model is the one that the ledger accounts for.
"""

from torch import Tensor, nn

from opacus_pi.files.arrays_file import checksum
from opacus_pi.files.weights_file import described
from opacus_pi.models.copies import unwrap

__all__ = ["weights_name"]


def weights_name(model: nn.Module) -> str:
    """Return the name of a model's parameters and buffers, a hash of their values.

    Wrappers and devices do not change the hash: it is computed from the state dict of
    the unwrapped model.

    Args:
        model: A module, plain or wrapped.

    Returns:
        ``"sha256:"`` and 64 hexadecimal digits.
    """
    state = {
        name.replace("_orig_mod.", ""): value  # the prefix of a compiled layer
        for name, value in unwrap(model).state_dict().items()
        if isinstance(value, Tensor)
    }
    return f"sha256:{checksum(described(state), {})}"
