"""Read the state dict in a file of safetensors or of ``torch.save``, by its content.

>>> import tempfile
>>> path = tempfile.mkdtemp() + "/weights.pt"
>>> torch.save({"weight": torch.ones(2)}, path)
>>> read_state_dict(path)["weight"]
tensor([1., 1.])
"""

import os
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from opacus_pi.files.regular_file import require_regular
from opacus_pi.files.torch_file import read_torch_file
from opacus_pi.files.weights_file import read_plain_weights

__all__ = ["read_state_dict", "tensors_of"]

_CHECKPOINT_STATE = "module_state_dict"  # in a checkpoint of Opacus


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a file by name, without running code from it.

    Args:
        path: A safetensors file, or one of ``torch.save`` with a state dict or an
            Opacus checkpoint. Its name does not matter.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds anything else.
    """
    require_regular(path)
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # a length, then JSON
        return read_plain_weights(path)
    try:
        state = tensors_of(read_torch_file(path, map_location="cpu"))
    except torch.OutOfMemoryError:
        raise
    except (ValueError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"path must be a file of weights, got {os.fspath(path)}, which is neither "
            "a safetensors file nor one of torch.save. Pass the file of "
            "safetensors.torch.save_file(model.state_dict(), path)."
        ) from error
    if state is None:
        raise ValueError(
            f"path must be a file of weights, got {os.fspath(path)}, which holds more "
            "than a state dict. Save model.state_dict()."
        )
    return state


def tensors_of(content: Any) -> dict[str, Tensor] | None:
    """Return the state dict in what ``torch.save`` wrote; None if it is something else.

    Args:
        content: A state dict, or a checkpoint of Opacus with one.
    """
    if isinstance(content, dict) and isinstance(content.get(_CHECKPOINT_STATE), dict):
        content = content[_CHECKPOINT_STATE]
    if not isinstance(content, dict):
        return None
    if not all(isinstance(value, Tensor) for value in content.values()):
        return None
    return content
