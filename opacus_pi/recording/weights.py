"""The weights of a row, kept on disk for what is computed after training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from opacus_pi._validate import expect
from opacus_pi.files.kinds import RECORDED_WEIGHTS
from opacus_pi.files.weights_file import read_weights, write_weights
from opacus_pi.ledger.fingerprint import same_data_set


def save_weights(
    directory: Path, num_steps: int, state: Mapping[str, Any], data_set: str = ""
) -> Path:
    """Write a state dict to one safetensors file, atomically.

    Args:
        directory: Where to; made if missing.
        num_steps: Updates done, part of the file's name.
        state: Tensors by name. Tied tensors are written once per name; entries that
            are no tensors (a module's extra state) are left out.
        data_set: Fingerprint of the data set that was trained on.

    Returns:
        The file, ``weights-00000123.safetensors`` after 123 updates.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"weights-{num_steps:08d}.safetensors"
    facts = {"num_steps": str(num_steps), "data_set": data_set}
    write_weights(path, RECORDED_WEIGHTS, state, facts)
    return path


def saved_weights(directory: Path) -> dict[int, Path]:
    """The files that ``save_weights`` wrote to a directory, by number of updates.

    Args:
        directory: Where they are.

    Returns:
        In ascending order of the number of updates; empty if there are none.
    """
    found = sorted(directory.glob("weights-*.safetensors"))
    names = {path: path.stem.removeprefix("weights-") for path in found}
    return {int(name): path for path, name in names.items() if name.isdecimal()}


def load_weights_(model: nn.Module, path: Path, data_set: str | None = None) -> None:
    """Give a model the weights of a file that ``save_weights`` wrote.

    Args:
        model: A model of the same architecture; changed in place.
        path: The file.
        data_set: Fingerprint of the data set that it must have been trained on;
            None: of any.

    Raises:
        ValueError: If the file is damaged, not of the updates its name says or of
            another data set, or its tensors are not those of this architecture.
    """
    state, facts = read_weights(path, RECORDED_WEIGHTS)
    _check_facts(path, facts, data_set)
    try:
        missing, surplus = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a tensor of another shape
        missing, surplus = [str(error)], []
    differing = [n for n in missing if not n.endswith("_extra_state")] + surplus
    expect(
        not differing,
        "model",
        type(model).__name__,
        f"must have the tensors of {path.name}",
        f"These differ: {', '.join(differing)[:200]}. Pass a model of the architecture "
        "that was trained.",
    )


def _check_facts(path: Path, facts: Mapping[str, str], data_set: str | None) -> None:
    """Refuse weights of another moment or another run."""
    found = facts.get("num_steps", "")
    expect(
        path.stem == f"weights-{found:0>8}",
        "path",
        path.name,
        f"must be named after its {found} updates",
        "Give the file its own name back.",
    )
    expect(
        data_set is None or same_data_set(facts.get("data_set", ""), data_set),
        "path",
        f"{facts.get('data_set')} in {path.name}",
        f"must be of the data set {data_set}",
        "Use a directory of its own for every run.",
    )
