"""The weights of a run: kept on disk at the rows, and named after the last update.

Some bounds need gradients that training did not compute. They are computed afterwards,
from the weights that ``save_weights`` kept at every row.

``LastWeights`` names the weights that a ledger describes. A guarantee about a model is
void if the model was changed after its last recorded update, so the ledger holds a hash
of the weights, or says that they were changed. A ledger that is read while the model
has other weights says so in its link "weights", too.

>>> model = nn.Linear(2, 1)
>>> last = LastWeights(model)
>>> last.updated()
>>> last.name() == weights_name(model)
True
>>> _ = nn.init.zeros_(model.weight)
>>> last.name()
'changed'
"""

import weakref
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._torch_compat import counts_of_writes
from opacus_pi._validate import expect, require
from opacus_pi.custody.weights import WeightSnapshot
from opacus_pi.files.kinds import RECORDED_WEIGHTS
from opacus_pi.files.weights_file import read_weights, write_weights
from opacus_pi.ledger.checks import CHANGED
from opacus_pi.ledger.same_data import same_data_set
from opacus_pi.models.copies import unwrap
from opacus_pi.models.weights_name import weights_name


def save_weights(
    directory: Path,
    num_steps: int,
    state: Mapping[str, Any],
    data_set: str = "",
    row: str = "",
) -> Path:
    """Write a state dict to one safetensors file, atomically.

    Args:
        directory: Where to; made if missing.
        num_steps: Updates done, part of the file's name.
        state: Tensors by name. Tied tensors are written once per name; entries that
            are not tensors (a module's extra state) are left out.
        data_set: Fingerprint of the data set that was trained on.
        row: Hash of the gradient norms of the ledger's row, as ``row_hash`` returns it;
            empty if it is not known.

    Returns:
        The file, ``weights-00000123.safetensors`` after 123 updates.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"weights-{num_steps:08d}.safetensors"
    facts = {"num_steps": str(num_steps), "data_set": data_set, "row": row}
    write_weights(path, RECORDED_WEIGHTS, state, facts)
    return path


def saved_weights(directory: Path) -> dict[int, Path]:
    """Return the files that ``save_weights`` wrote, by number of updates.

    Args:
        directory: Where they are.

    Returns:
        In ascending order of the number of updates; empty if there are none.
    """
    found = sorted(directory.glob("weights-*.safetensors"))
    names = {path: path.stem.removeprefix("weights-") for path in found}
    return {int(name): path for path, name in names.items() if name.isdecimal()}


def load_weights_(model: nn.Module, path: Path, data_set: str | None = None) -> None:
    """Load the weights of a file that ``save_weights`` wrote into a model.

    Args:
        model: A model of the same architecture; changed in place.
        path: The file.
        data_set: Fingerprint of the data set that it must have been trained on;
            None: any data set.

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
        f"must have the same tensors as {path.name}",
        f"These differ: {', '.join(differing)[:200]}. Pass a model of the architecture "
        "that was trained.",
    )


def _check_facts(path: Path, facts: Mapping[str, str], data_set: str | None) -> None:
    """Refuse weights of another update or another run."""
    found = facts.get("num_steps", "")
    require(
        path.stem == f"weights-{found:0>8}",
        f"{path.name} has the weights after {found} updates, but its name says "
        "otherwise.",
        "Give the file its original name.",
    )
    require(
        data_set is None or same_data_set(facts.get("data_set", ""), data_set),
        f"{path.name} is from a run on another data set ({facts.get('data_set')}, not "
        f"{data_set}).",
        "Pass the data set of that run, or use a separate directory for every run.",
    )


OTHER_WEIGHTS = (
    "When the ledger was read, the model had other weights than those that the last "
    "recorded update left, and the numbers are about the latter. They hold for the new "
    "weights, too, if these were computed from weights of this run alone (averaged, "
    "rounded, or those of an earlier epoch), from random numbers or public data, and "
    "training data did not decide when. If the new weights were computed from training "
    "data, neither get_epsilon nor the ledger covers that: do not release the model, "
    "or add the privacy loss of the private training that made them."
)

_Marks = tuple[list[int], list[torch.dtype]]


class LastWeights:
    """Name of the weights after the last update, if the model still has them.

    After each update it notes autograd's count of writes to every tensor. This needs no
    pass over the weights; they are hashed only when their name is asked for. Writes
    that are not counted (to ``weight.data``) are found as far as
    :class:`~opacus_pi.custody.weights.WeightSnapshot` finds them.

    Args:
        model: The model in training, plain or wrapped; referred to weakly.
        snapshot: Of the model's parameters, taken after each update, and kept by the
            run's chain of custody; referred to weakly. None: one is taken here.
    """

    def __init__(
        self, model: nn.Module, snapshot: WeightSnapshot | None = None
    ) -> None:
        self._snapshot = None if snapshot is None else weakref.ref(snapshot)
        self._model = weakref.ref(unwrap(model))
        tensors = _tensors(unwrap(model))
        self._tensors = [weakref.ref(t) for t in tensors]
        self._parameters = list(map(weakref.ref, unwrap(model).parameters()))
        self._marks: _Marks | None = None
        covered = set() if snapshot is None else set(map(id, model.parameters()))
        rest = [t for t in tensors if id(t) not in covered]
        self._rest = WeightSnapshot()
        self._rest.watch(rest)
        weakref.finalize(unwrap(model), self._rest.watch, ()).atexit = False

    def updated(self) -> None:
        """Record that an update was made."""
        references = self._tensors
        self._marks = _marks([t for r in references if (t := r()) is not None])
        self._rest.take()

    def forget(self) -> None:
        """Forget the last update: other weights were loaded since."""
        self._marks = None

    def name(self) -> str | None:
        """Return the weights' name, or ``"changed"`` if the last update left others.

        Returns:
            None if no update was seen, or the model no longer exists.
        """
        model = self._model()
        if model is None or self._marks is None:
            return None
        return CHANGED if self._has_changed(model) else weights_name(model)

    def _has_changed(self, model: nn.Module) -> bool:
        """Return whether the model's tensors are others, or were written to."""
        present = _tensors(model)
        noted = [reference() for reference in self._tensors]
        if list(map(id, present)) != list(map(id, noted)):
            return True
        if _marks(present) != self._marks or self._rest.has_changed_now():
            return True
        snapshot = None if self._snapshot is None else self._snapshot()
        return snapshot is not None and snapshot.has_changed_now()

    def are_replaced(self) -> bool:
        """Return whether the model has other weights than the last update left.

        Unlike for ``name``, weights that were moved to another device are the same, and
        so are those that ``load_state_dict`` has brought back. Layers that were added
        are not seen, and buffers are not compared: forward passes may write to them.
        """
        model = self._model()
        snapshot = None if self._snapshot is None else self._snapshot()
        if model is None or self._marks is None or snapshot is None:
            return False
        present = set(map(id, model.parameters()))
        if not present.issuperset(id(reference()) for reference in self._parameters):
            return True
        return snapshot.has_other_values()

    def present(self) -> str | None:
        """Return the name of the weights as they are now; None without a model."""
        model = self._model()
        return None if model is None else weights_name(model)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Return parameters and buffers themselves, in the model's order."""
    live = model.state_dict(keep_vars=True).values()
    return [value for value in live if isinstance(value, Tensor)]


_TYPE = attrgetter("dtype")


def _marks(tensors: list[Tensor]) -> _Marks:
    """Return how often tensors were written to, and their types."""
    return counts_of_writes(tensors), list(map(_TYPE, tensors))
