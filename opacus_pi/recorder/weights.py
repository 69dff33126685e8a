"""The weights of a row, kept on disk for what is computed after training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from opacus_pi.accounting.storage import replace_file


def save_weights(directory: Path, num_steps: int, state: Mapping[str, Any]) -> Path:
    """Write a state dict to one safetensors file, atomically.

    Args:
        directory: Where to; made if missing.
        num_steps: Updates done, part of the file's name.
        state: Tensors by name. Tied tensors are written once per name; entries that
            are no tensors (a module's extra state) are left out.

    Returns:
        The file, ``weights-00000123.safetensors`` after 123 updates.
    """
    tensors = {  # a clone each, because safetensors refuses tensors that share memory
        name: value.detach().cpu().contiguous().clone()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"weights-{num_steps:08d}.safetensors"
    replace_file(path, save(tensors, metadata={"num_steps": str(num_steps)}))
    return path
