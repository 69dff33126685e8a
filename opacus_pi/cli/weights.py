"""State dicts on the disk: safetensors, or ``torch.save`` read without running code."""

from pathlib import Path
from pickle import UnpicklingError

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from opacus_pi.cli.errors import BadInput, about, one_line

_WRAPPED = "_module."  # Opacus's GradSampleModule puts it before every name
_REMEDY = "Save one with safetensors.torch.save_file(model.state_dict(), path)."


def load_weights(flag: str, path: str, model: nn.Module) -> nn.Module:
    """Put a state dict from a file into a model.

    Args:
        flag: The argument that names the file.
        path: A ``.safetensors``, ``.pt`` or ``.pth`` file. The names may be those of a
            model that Opacus wrapped.
        model: Changed in place.

    Returns:
        The model.

    Raises:
        BadInput: If the file cannot be read or its weights do not fit.
    """
    with about(flag, _REMEDY):
        state = _read(flag, path)
    wrapped = bool(state) and all(name.startswith(_WRAPPED) for name in state)
    if wrapped and not all(name.startswith(_WRAPPED) for name in model.state_dict()):
        state = {name.removeprefix(_WRAPPED): value for name, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise BadInput(
            f"{flag}: {path} does not fit the model: {one_line(error)[:300]} "
            "Name the architecture that the weights were trained with."
        ) from error
    return model


def _read(flag: str, path: str) -> dict[str, Tensor]:
    """The tensors by name."""
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".pt", ".pth"):
        raise BadInput(f"{flag}: {path} is not .safetensors, .pt or .pth. {_REMEDY}")
    if Path(path).is_dir():
        raise BadInput(f"{flag}: {path} is a directory. {_REMEDY}")
    try:
        if suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        first = one_line(error).split(". ")[0]
        raise BadInput(
            f"{flag}: {path} is no readable file of tensors ({first[:160]}). {_REMEDY}"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise BadInput(
            f"{flag}: {path} holds more than a state dict. "
            "Save model.state_dict(), not a checkpoint of everything."
        )
    return state
