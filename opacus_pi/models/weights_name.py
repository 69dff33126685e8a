"""Name the weights of a model by a hash of its state dict."""

from torch import Tensor, nn

from opacus_pi.files.arrays_file import checksum
from opacus_pi.files.weights_file import described
from opacus_pi.models.copies import unwrap

__all__ = ["weights_name"]


def weights_name(model: nn.Module) -> str:
    """Name a model's parameters and buffers by what they are.

    Whatever wraps the model, and wherever it is: the name is that of its state dict.

    Args:
        model: A module, plain or wrapped.

    Returns:
        ``"sha256:"`` and 64 hexadecimal digits.
    """
    state = {
        name.replace("_orig_mod.", ""): value  # torch.compile's, of a layer
        for name, value in unwrap(model).state_dict().items()
        if isinstance(value, Tensor)
    }
    return f"sha256:{checksum(described(state), {})}"
