"""The weights of a row, kept on disk for what is computed after training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor, nn

from opacus_pi._validate import expect
from opacus_pi.atomic_file import replace_file


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


def saved_weights(directory: Path) -> dict[int, Path]:
    """The files that ``save_weights`` wrote to a directory, by number of updates.

    Args:
        directory: Where they are.

    Returns:
        In ascending order of the number of updates; empty if there are none.
    """
    found = sorted(directory.glob("weights-*.safetensors"))
    return {int(path.stem.removeprefix("weights-")): path for path in found}


def load_weights_(model: nn.Module, path: Path) -> None:
    """Give a model the weights of a file that ``save_weights`` wrote.

    Args:
        model: A model of the same architecture; changed in place.
        path: The file.

    Raises:
        ValueError: If the file's tensors are not those of this architecture.
    """
    try:
        missing, surplus = model.load_state_dict(load_file(path), strict=False)
    except RuntimeError as error:  # a tensor of another shape
        missing, surplus = [str(error)], []
    differing = [n for n in missing if not n.endswith("_extra_state")] + surplus
    expect(
        not differing,
        "model",
        type(model).__name__,
        f"to have the tensors of {path.name}; differing: {', '.join(differing)[:200]}",
        "Pass a model of the architecture that was trained.",
    )
