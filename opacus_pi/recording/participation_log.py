"""Write every participation of a run to files, block by block, and join them again.

A long run has many participations, and it may be interrupted. So those since the last
block wait in memory, and each block is a file of its own that is never written again.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._validate import expect
from opacus_pi.files.arrays_file import Layout, read_arrays, write_arrays
from opacus_pi.files.kinds import PARTICIPATIONS
from opacus_pi.ledger.participation_record import ParticipationRecord
from opacus_pi.recording.run import UpdateSettings

_PREFIX = "participations-"
_SAMPLES = {"steps": "<i4", "indices": "<i4", "norms": "<f4"}
_SETTINGS = ("noise_std", "max_grad_norm", "sample_rates")
_UPDATES = {**dict.fromkeys(_SETTINGS, "<f8"), "num_unattributed": "<i8"}
_RATES, _CONDITIONS = "learning_rates", "conditions"
_TEXTS = ("sampling", "data_set", "run", "weights", "policy", "began")
_NUMBERS = ("num_examples", "sample_rate", "kept", "first", "num_steps")
_LAYOUT = Layout(
    {**_SAMPLES, **_UPDATES},
    (*_TEXTS, *_NUMBERS),
    more_arrays={_RATES: "<f8", _CONDITIONS: "<i8"},
)
_RESTORE = "Restore the directory from a copy, or use one directory for each run."


class ParticipationLog:
    """Collects the participations of a run, and writes them in blocks.

    Args:
        directory: Where the blocks are.
        facts: The facts that do not change in a run: ``num_examples``, ``sampling``,
            ``sample_rate``, ``data_set``, ``run``, ``policy``, ``began``.
    """

    def __init__(self, directory: Path, facts: Mapping[str, Any]) -> None:
        self.directory, self.facts = directory, dict(facts)
        self.num_steps = self._num_written = 0
        self._num_blocks, self._is_new = 0, False
        self._weights: str | None = None  # of the last block
        self._samples: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
        self._updates: list[UpdateSettings] = []
        self._rates: list[tuple[float, ...]] = []
        self._conditions: list[int] = []
        self._num_unattributed: dict[int, int] = {}

    def add(
        self,
        indices: NDArray[np.int64],
        norms: NDArray[np.float32] | None,
        steps: NDArray[np.int64],
    ) -> None:
        """Add samples whose example is known.

        Args:
            indices: int64 ``(b,)``.
            norms: float32 ``(b,)``; None if they were not measured.
            steps: int64 ``(b,)``: the update of each, from 1.
        """
        if norms is None:
            norms = np.full(len(indices), np.nan, dtype=np.float32)
        self._samples.append(
            (steps.astype(np.int32), indices.astype(np.int32), norms.copy())
        )
        self._is_new = True

    def add_unattributed(self, step: int, count: int) -> None:
        """Note samples of one update whose example is not known.

        Args:
            step: The update, from 1.
            count: How many.
        """
        self._num_unattributed[step] = self._num_unattributed.get(step, 0) + count
        self._is_new = True

    def count_step(
        self, settings: UpdateSettings, rates: tuple[float, ...], conditions: int = 0
    ) -> None:
        """Count one update.

        Args:
            settings: What it was run with.
            rates: Learning rate of each parameter group.
            conditions: A hash of what else it depends on; 0: not known; negative: hooks
                of the user were on the optimizer's steps.
        """
        self.num_steps += 1
        self._updates.append(settings)
        self._rates.append(rates)
        self._conditions.append(conditions)
        self._is_new = True

    def write(self, kept: tuple[int, ...], weights: str = "") -> None:
        """Write the samples and updates added since the last block, if there are any.

        A block is also written if the last one has another name of the weights: it was
        written within an update.

        Args:
            kept: Updates whose states are kept.
            weights: Name of the weights after the last update, if it is known.
        """
        if not self._is_new and self._weights in (None, weights):
            return
        self._weights = weights
        arrays, texts = self._arrays(), self._texts(kept, weights)
        self._num_blocks += 1
        path = self.directory / f"{_PREFIX}{self._num_blocks:08d}.safetensors"
        write_arrays(path, PARTICIPATIONS, arrays, texts)
        self._num_written, self._is_new = self.num_steps, False
        self._samples, self._updates = [], []
        self._rates, self._conditions = [], []

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of the next block."""
        columns = zip(*self._samples, strict=True) if self._samples else ((), (), ())
        arrays: dict[str, NDArray[Any]] = {
            name: np.concatenate([np.empty(0, dtype), *column])
            for (name, dtype), column in zip(_SAMPLES.items(), columns, strict=True)
        }
        table = np.array(self._updates, dtype=np.float64).reshape(-1, 3)
        arrays |= zip(_SETTINGS, table.T, strict=True)
        # samples may be reported after their update was counted and written
        arrays["num_unattributed"] = np.zeros(self.num_steps, dtype=np.int64)
        for step, count in self._num_unattributed.items():
            if step <= self.num_steps:
                arrays["num_unattributed"][step - 1] = count
        if len({len(rates) for rates in self._rates}) == 1 and self._rates[0]:
            arrays[_RATES] = np.array(self._rates, dtype=np.float64)
        arrays[_CONDITIONS] = np.array(self._conditions, dtype=np.int64)
        return arrays

    def _texts(self, kept: tuple[int, ...], weights: str) -> dict[str, str]:
        """Return the strings of the next block."""
        texts = {name: str(self.facts.get(name, "")) for name in _TEXTS}
        return texts | {
            "num_examples": str(self.facts["num_examples"]),
            "sample_rate": repr(float(self.facts["sample_rate"])),
            "kept": json.dumps(list(kept)),
            "first": str(self._num_written),
            "num_steps": str(self.num_steps),
            "weights": weights,
        }

    def resume(self, num_steps: int) -> None:
        """Go on after an update of a run that was saved.

        Blocks of later updates, which the resumed run will make again, are deleted. If
        updates are missing because they were not written, any example may have been in
        them.

        Args:
            num_steps: Updates of the saved run.
        """
        paths = blocks_in(self.directory)
        for number, path in paths.items():
            _, facts = read_arrays(path, PARTICIPATIONS, _LAYOUT)
            end = _whole(facts, "num_steps", self.directory)
            if end > num_steps:
                path.unlink()
            else:
                self._num_blocks, self.num_steps = number, end
        self._num_written = self.num_steps
        if self.num_steps:
            counts = record_in(self.directory).num_unattributed
            known = np.flatnonzero(counts)
            self._num_unattributed = {int(i) + 1: int(counts[i]) for i in known}
        for _ in range(num_steps - self.num_steps):
            # nothing is known of it; a policy refuses an update without noise
            self.count_step(UpdateSettings(0.0, 0.0, 0.0), ())
            self.add_unattributed(self.num_steps, self.facts["num_examples"])


def blocks_in(directory: Path) -> dict[int, Path]:
    """Return the blocks in a directory, by their number, in order.

    Args:
        directory: Where they are.
    """
    found = sorted(directory.glob(f"{_PREFIX}*.safetensors"))
    names = {path: path.stem.removeprefix(_PREFIX) for path in found}
    return {int(name): path for path, name in names.items() if name.isdecimal()}


def record_in(directory: Path) -> ParticipationRecord:
    """Read the blocks in a directory and join them.

    Args:
        directory: Where they are.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a block is missing, damaged, or of another run.
    """
    paths = blocks_in(directory)
    if not paths:
        raise FileNotFoundError(
            f"No participations of a training run are in {directory}. Pass the "
            "directory of a run with Recorder(checkpoints=Checkpoints(directory)). If "
            "its files participations-*.safetensors were deleted, restore them from a "
            "copy."
        )
    blocks = [read_arrays(path, PARTICIPATIONS, _LAYOUT) for path in paths.values()]
    ends = [0, *(_whole(facts, "num_steps", directory) for _, facts in blocks)]
    runs = {facts["run"] for _, facts in blocks}
    expect(
        len(runs) == 1,
        "checkpoints",
        f"participations of {len(runs)} runs in {directory}",
        "must hold one run",
        _RESTORE,
    )
    firsts = [_whole(facts, "first", directory) for _, facts in blocks]
    expect(
        firsts == ends[:-1],
        "checkpoints",
        "files of the updates "
        + ", ".join(f"{a + 1}-{b}" for a, b in zip(firsts, ends[1:], strict=True)),
        "must cover all updates of the run, each once",
        f"Some participations are missing. {_RESTORE}",
    )
    arrays: dict[str, Any] = {
        name: np.concatenate([block[name] for block, _ in blocks])
        for name in (*_SAMPLES, *_SETTINGS)
    }
    arrays["num_unattributed"] = blocks[-1][0]["num_unattributed"]
    facts = blocks[-1][1]
    texts: dict[str, Any] = {name: facts[name] for name in _TEXTS}
    return ParticipationRecord(
        num_examples=_whole(facts, "num_examples", directory),
        sample_rate=_parsed(facts, "sample_rate", float, directory),
        learning_rates=_joined(blocks, _RATES, ends[-1], ndim=2),
        conditions=_joined(blocks, _CONDITIONS, ends[-1], ndim=1),
        kept=tuple(_parsed(facts, "kept", list, directory)),
        **texts,
        **arrays,
    )


def _joined(
    blocks: Sequence[tuple[Mapping[str, NDArray[Any]], Any]],
    name: str,
    num_steps: int,
    *,
    ndim: int,
) -> NDArray[Any] | None:
    """Return an array that blocks may lack; None if a block lacks it.

    Args:
        blocks: The arrays of each block, and its strings.
        name: The array's name.
        num_steps: How many updates all blocks have.
        ndim: Its number of dimensions; all but the first must have the same size.
    """
    parts = [arrays[name] for arrays, _ in blocks if name in arrays]
    alike = {part.ndim for part in parts} == {ndim}
    alike = alike and len({part.shape[1:] for part in parts}) == 1
    if not alike or sum(map(len, parts)) != num_steps:
        return None
    return np.concatenate(parts)


def _parsed(facts: Mapping[str, str], name: str, kind: type, directory: Path) -> Any:
    """Return a number or a list of numbers from the strings of a block, or refuse."""
    try:
        value = json.loads(facts[name])
    except (json.JSONDecodeError, RecursionError):
        value = None
    whole = isinstance(value, list) and all(type(item) is int for item in value)
    expect(
        type(value) is kind and (kind is not list or whole),
        f"{name} of the participations in {directory}",
        facts[name],
        f"must be {'a list of updates' if kind is list else 'a number'}",
        _RESTORE,
    )
    return value


def _whole(facts: Mapping[str, str], name: str, directory: Path) -> int:
    """Return a whole number from the strings of a block, or refuse."""
    expect(
        facts[name].isdecimal(),
        f"{name} of the participations in {directory}",
        facts[name],
        "must be a whole number",
        _RESTORE,
    )
    return int(facts[name])
