"""Save an unlearning run after each pass, and continue it after a crash.

``RunFile`` writes one file that has everything which later updates depend on: weights,
optimizer, scheduler, evaluations and the states of all random number generators. If the
same call is made again, the run continues from the file and ends with the same weights
and evaluations as an unbroken run.

*Guarantee.* They are equal bit for bit where the operations of torch are deterministic.
*What breaks it:* random numbers in worker processes of the caller's own loaders, and a
method that changes an attribute of its own between updates.

What a method computed in ``prepare`` is not saved. It is computed again, from the model
and the random states with which the run began.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from opacus_pi._validate import expect
from opacus_pi.evaluation.trace import UnlearningTrace
from opacus_pi.files.atomic_file import replacing
from opacus_pi.files.torch_file import read_torch_file
from opacus_pi.ledger.same_data import same_data_set, same_transforms
from opacus_pi.recording.random_states import RandomStates
from opacus_pi.unlearning.loop import Updates

__all__ = ["RunFile", "SavedRun"]

_FORMAT = "opacus_pi.UnfinishedUnlearning.v1"
_FIELDS = {"format", "weights", "record", "begun", "random", "updates", "trace"}
_NEW_AT_EVERY_START = ("seed", "started")
_REMEDY = (
    "Repeat the call that wrote the file, with an Unlearner made from the same trained "
    "model, or remove the file to begin anew."
)


@dataclass(frozen=True)
class SavedRun:
    """A run as it was after one of its passes.

    Args:
        weights: Name of the weights that the run began with.
        record: What was run, as in ``UnlearningResult.record``.
        begun: Random states from before the method was prepared.
        random: Random states after the pass.
        updates: ``Updates.state_dict()`` after the pass.
        trace: The evaluations until then, and the seconds spent, as a dict.
    """

    weights: str
    record: dict[str, Any]
    begun: dict[str, Any]
    random: dict[str, Any]
    updates: dict[str, Any]
    trace: dict[str, Any]


class RunFile:
    """The file of one unlearning run.

    Args:
        path: The file's name. It is as sensitive as the result: it has the weights, the
            forgotten examples and the evaluations. Only its owner can read it.
        weights: Name of the weights that the run begins with.
        record: What is to be run.

    Attributes:
        record: That, or what the saved run recorded at its start.
    """

    def __init__(
        self, path: str | os.PathLike[str], weights: str, record: Mapping[str, Any]
    ) -> None:
        self.path = Path(path)
        self._weights, self.record = weights, dict(record)
        self._begun: dict[str, Any] = {}

    def read(self) -> SavedRun | None:
        """Return what an earlier call saved; None if there is no file.

        Raises:
            ValueError: If the file is damaged, or is of another run.
        """
        if not self.path.exists():
            return None
        found = read_torch_file(self.path, map_location="cpu", remedy=_REMEDY)
        expect(
            isinstance(found, dict)
            and set(found) == _FIELDS
            and found["format"] == _FORMAT,
            "checkpoint",
            self.path,
            f"must be a file of the format {_FORMAT}",
            "Name a file that an earlier call of unlearn wrote, or a new one.",
        )
        del found["format"]
        saved = SavedRun(**found)
        for name, value in self.record.items():
            expect(
                name in _NEW_AT_EVERY_START
                or _same(name, saved.record.get(name), value),
                "checkpoint",
                f"a run with {name}={saved.record.get(name)!r} in {self.path}",
                f"must be of a run with {name}={value!r}",
                _REMEDY,
            )
        expect(
            saved.weights == self._weights,
            "checkpoint",
            f"a run that began with other weights in {self.path}",
            "must be of a run of this model",
            _REMEDY,
        )
        return saved

    def begin(self, random: RandomStates, saved: SavedRun | None) -> None:
        """Note the random states before the method is prepared, or restore saved ones.

        Args:
            random: All generators of the run. They are set to the states with which the
                saved run began, if there is one.
            saved: What ``read`` returned.
        """
        if saved is not None:
            self.record = saved.record
            random.restore(saved.begun)
        self._begun = random.collect()

    def write(
        self, random: RandomStates, updates: Updates, trace: UnlearningTrace
    ) -> None:
        """Replace the file by the current state of the run, in one step.

        Args:
            random: All generators of the run.
            updates: The updates, between two passes.
            trace: The evaluations so far.
        """
        state = SavedRun(
            self._weights,
            self.record,
            self._begun,
            random.collect(),
            updates.state_dict(),
            asdict(trace),
        )
        with replacing(self.path) as file:
            # ``read`` loads it with weights_only=True.
            torch.save({"format": _FORMAT, **vars(state)}, file)

    def remove(self) -> None:
        """Remove the file of a run that has ended: the result takes its place."""
        self.path.unlink(missing_ok=True)


def _same(name: str, saved: Any, value: Any) -> bool:
    """Return whether a run that continues has the setting of the saved run.

    Data sets are compared in what both fingerprints have, transforms included.

    Args:
        name: The setting.
        saved: Its value in the saved run.
        value: Its value now.
    """
    if name == "data_set" and isinstance(saved, str):
        alike = same_transforms(saved, value) is not False
        return alike and same_data_set(saved, value)
    return bool(saved == value)
