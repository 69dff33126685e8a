"""Save the state of a training run at chosen updates, so that it can be rewound.

A rewind takes a model back to a state from before some examples were used, and trains
the rest again without them. ``Checkpoints`` says where states are saved, how often, and
how much of the disk they may take. Pass it to a recorder:
``Recorder(checkpoints=Checkpoints("run/states", every=100))``.

A state holds the weights and buffers, the optimizer, the states of the random
generators, and the settings of the engine. The state before the first update is always
saved. Beside the states, every participation is recorded: which example was in which
update, with which norm.

Which states are kept depends on the numbers of the updates only, never on the data or
the weights. Otherwise a decision made at a state could depend on what happened later.

*Guarantee.* Training is the same to the bit with and without checkpoints. Files are
readable by their owner only, appear in one step, and run no code when they are read.

>>> thinned([0, 10, 20, 30, 35, 40], 4)
[0, 20, 30, 40]
"""

import os
import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from opacus_pi._validate import expect, positive, require
from opacus_pi.accounting.filtered_rewind import DeletionPolicy
from opacus_pi.ledger.participation_record import ParticipationRecord
from opacus_pi.recording.participation_log import (
    ParticipationLog,
    blocks_in,
    record_in,
)
from opacus_pi.recording.run import UpdateSettings
from opacus_pi.recording.schedule import checked_every
from opacus_pi.recording.state_file import read_state, write_state

__all__ = ["Checkpoints"]

_PREFIX = "state-"
_RESTORE = (
    "Restore the directory from a copy: without them, it is not known which examples "
    "the updates used. If the training is to go on, resume it from its checkpoint."
)
_BLOCK = 4096  # bytes
_PARTS = {
    "model": dict,
    "optimizer": dict,
    "optimizer_class": str,
    "parameters": list,
    "evaluating": list,
    "settings": dict,
    "random": dict,
}


class Training(Protocol):
    """A training run in progress, as far as its state can be saved."""

    def state(self, num_steps: int) -> dict[str, Any]:
        """Return the present state, which later updates do not change in place.

        Args:
            num_steps: Updates done.
        """

    def learning_rates(self) -> tuple[float, ...]:
        """Return the learning rate of each parameter group."""

    def conditions(self) -> int:
        """Return a hash of what else an update depends on, in [-2^63, 2^63).

        It is negative if hooks of the user changed what the optimizer's steps do, or
        may have changed it.
        """


class Checkpoints:
    """The saved states of a training run, with the rule that says when one is saved.

    Args:
        directory: Where the states and the record of participations are. Use one
            directory for each run; it is made if it is missing.
        every: A whole number: updates from state to state. A sequence: states after
            exactly these updates. The state before the first update is always saved.
        max_bytes: The most that the states may take on the disk. Beyond it, states are
            deleted so that the kept ones stay evenly spread; the first is always kept.
            None: no limit.
        deletion_policy: The guarantee that deletions by a filtered rewind must give. It
            is fixed here, before training, and stored with the record. None: only exact
            rewinds are possible.

    Raises:
        ValueError: If an option is outside its domain.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        every: int | Sequence[int] = 100,
        *,
        max_bytes: int | None = None,
        deletion_policy: DeletionPolicy | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.every = _checked_every(every)
        if max_bytes is not None:
            positive(max_bytes=max_bytes, remedy="Pass None for no limit.")
        self.max_bytes = max_bytes
        expect(
            isinstance(deletion_policy, DeletionPolicy | None),
            "deletion_policy",
            repr(deletion_policy),
            "must be a DeletionPolicy or None",
            "Import DeletionPolicy from opacus_pi.accounting.",
        )
        self.deletion_policy = deletion_policy
        self._log: ParticipationLog | None = None
        self._training: Training | None = None
        self._fetch: Callable[[], Callable[[], str] | None] = lambda: None
        self._is_started = False

    # ------------------------------------------------------------------- what was saved
    @property
    def steps(self) -> tuple[int, ...]:
        """The updates whose states are in the directory, in increasing order."""
        return tuple(self._files())

    def load(self, step: int) -> dict[str, Any]:
        """Return the state after an update.

        Args:
            step: One of ``steps``.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If its file is damaged, or of another run or update.
        """
        path = self._path(step)
        state = read_state(path)
        run = self.record.run
        expect(
            state.get("num_steps") == step and state.get("run") == run,
            "checkpoints",
            f"a state of update {state.get('num_steps')} of run {state.get('run')}",
            f"must hold update {step} of run {run} in {path.name}",
            "Use one directory for each run, and do not rename its files.",
        )
        wrong = [
            name for name, kind in _PARTS.items() if type(state.get(name)) is not kind
        ]
        expect(
            not wrong,
            "checkpoints",
            f"a state without {wrong}",
            f"must hold the whole state of a training in {path.name}",
            "Restore it from a copy, or rewind to an earlier state.",
        )
        return state

    def size(self, step: int) -> int:
        """Return the length of a state's file in bytes.

        Args:
            step: One of ``steps``.
        """
        return self._path(step).stat().st_size

    @property
    def record(self) -> ParticipationRecord:
        """Every participation up to now, from the files in the directory.

        In the process that trains, what still waits in memory is written first.

        Raises:
            FileNotFoundError: If the directory has no record.
            ValueError: If a file is missing, damaged, or of another run.
        """
        self.flush()
        require(
            bool(blocks_in(self.directory)) or max(self.steps, default=0) == 0,
            f"checkpoints: {self.directory} has states of a training, and no "
            "participations-*.safetensors.",
            f"These files are missing. {_RESTORE}",
        )
        return record_in(self.directory)

    def require_whole(self, record: ParticipationRecord) -> None:
        """Refuse a record that ends before the last saved state: a file is missing.

        Args:
            record: The participations in the directory.

        Raises:
            ValueError: If it ends earlier.
        """
        last, end = max(self.steps, default=0), record.num_steps
        require(
            last <= end,
            f"checkpoints: {self.directory} has a state of update {last}, but its "
            f"participations end after update {end}. Their last file "
            "participations-*.safetensors is missing, or was not written because the "
            "training was interrupted.",
            _RESTORE,
        )

    def flush(self) -> None:
        """Write the participations that still wait in memory.

        Call it after the last update, if another process is going to rewind the model.
        """
        if self._log is None or not self._is_started:
            return
        fetch = self._fetch()
        weights = fetch() if fetch is not None else ""
        self._log.write(self.steps, weights)

    # ---------------------------------------------------------- what the recorder does
    def begin(
        self,
        *,
        facts: Mapping[str, Any],
        training: Training,
        fetch: Callable[[], str],
    ) -> str:
        """Begin a run; nothing is written before its first update.

        Args:
            facts: ``num_examples``, ``sampling``, ``sample_rate`` and ``data_set``.
            training: The training run, whose state is saved.
            fetch: A method that adds the waiting reports to this object and returns the
                hash of the present weights; held by a weak reference.

        Returns:
            A new random name for the run.
        """
        run, policy = secrets.token_hex(16), self.deletion_policy
        facts = {
            **facts,
            "run": run,
            "policy": "" if policy is None else policy.to_json(),
            "began": datetime.now(timezone.utc).isoformat(),
        }
        self._log = ParticipationLog(self.directory, facts)
        self._training, self._fetch = training, weakref.WeakMethod(fetch)
        self._is_started = False
        return run

    def resume(self, run: str, num_steps: int) -> None:
        """Go on with a run that was saved, instead of a new one.

        States and participations that were saved after update ``num_steps`` are
        deleted: the resumed run writes them again.

        Args:
            run: Name of the run.
            num_steps: Updates that the run had made.

        Raises:
            ValueError: As ``require_resumable``.
        """
        before, log = self.require_resumable(run, num_steps), self._log
        if before is None or log is None:
            return
        log.facts |= {"run": run, "policy": before.policy, "began": before.began}
        log.resume(num_steps)
        for step, path in self._files().items():
            if step > num_steps:
                path.unlink()
        self._is_started = True

    def require_resumable(self, run: str, num_steps: int) -> ParticipationRecord | None:
        """Refuse to go on with a run that is not the one in the directory.

        Args:
            run: Name of the run.
            num_steps: Updates that the run had made.

        Returns:
            What the directory holds; None if nothing was saved, or nothing begun.

        Raises:
            ValueError: If the directory holds another run, or the run began with
                another policy.
        """
        log = self._log
        if log is None or not num_steps:
            return None
        require(
            bool(blocks_in(self.directory)),
            f"checkpoints: {self.directory} has no participations-*.safetensors, which "
            "the run that is resumed has written.",
            "Resume with the directory of the saved run. If files were deleted, "
            "restore them from a copy.",
        )
        before = record_in(self.directory)
        require(
            before.run == run,
            f"checkpoints: {self.directory} has the participations of another run than "
            "the one that is resumed.",
            "Resume with the directory of the saved run.",
        )
        old, new = policy_in(before.policy), policy_in(log.facts["policy"])
        expect(
            old == new,
            "deletion_policy",
            new,
            f"must be the policy with which the run began, {old}",
            "Resume with that policy: one that is made or changed during a run "
            "certifies nothing.",
        )
        return before

    def begin_update(self) -> None:
        """Save the state before the first update.

        Raises:
            ValueError: If the directory holds states of another run.
        """
        if self._is_started or self._log is None:
            return
        expect(
            self.directory.is_dir() or not self.directory.exists(),
            "checkpoints",
            self.directory,
            "must be a directory, or a name that is free",
            "It is a file. Name another directory.",
        )
        self.directory.mkdir(parents=True, exist_ok=True)
        found = [*self._files().values(), *blocks_in(self.directory).values()]
        require(
            not found,
            f"checkpoints: {self.directory} contains {len(found)} files of an "
            "earlier run, and this is a new one.",
            "Name another directory, or delete these files if no rewind will need "
            "them. To go on with the earlier run, load its checkpoint first.",
        )
        self._is_started = True
        self._save()

    def add(
        self,
        indices: NDArray[np.int64],
        norms: NDArray[np.float32] | None,
        steps: NDArray[np.int64],
    ) -> None:
        """Add samples whose example is known.

        Args:
            indices: int64 ``(b,)``.
            norms: float32 ``(b,)``; None: not measured.
            steps: int64 ``(b,)``: the update of each.
        """
        if self._log is not None:
            self._log.add(indices, norms, steps)

    def add_unattributed(self, step: int, count: int) -> None:
        """Note unattributed samples of an update.

        Args:
            step: The update.
            count: How many.
        """
        if self._log is not None:
            self._log.add_unattributed(step, count)

    def count_step(self, settings: UpdateSettings) -> None:
        """Count an update, and save the state after it if one is due.

        Args:
            settings: The settings of the update.
        """
        if self._log is None or self._training is None:
            return
        rates = self._training.learning_rates()
        self._log.count_step(settings, rates, self._training.conditions())
        step = self._log.num_steps
        every = self.every
        if step in every if isinstance(every, tuple) else step % every == 0:
            self._save()
            self.flush()

    def _save(self) -> None:
        """Save the present state, and delete others if the disk budget is exceeded."""
        if self._log is None or self._training is None:
            return
        step = self._log.num_steps
        state = {
            **self._training.state(step),
            "num_steps": step,
            "run": self._log.facts["run"],
        }
        size = write_state(self._path(step), state)
        if self.max_bytes is None:
            return
        expect(
            size <= self.max_bytes or step > 0,
            "max_bytes",
            self.max_bytes,
            f"must be at least the size of one state, {size} bytes",
            "Allow more bytes, or pass None for no limit.",
        )
        # whole blocks: a few bytes more or less must not decide which states stay
        blocks = -(-max(map(self.size, self.steps)) // _BLOCK)
        files = self._files()
        kept = thinned(list(files), max(1, self.max_bytes // (_BLOCK * blocks)))
        for other in set(files) - set(kept):
            files[other].unlink()

    def _files(self) -> dict[int, Path]:
        """Return the files of states, by number of updates, in order."""
        found = sorted(self.directory.glob(f"{_PREFIX}*.pt"))
        names = {path: path.stem.removeprefix(_PREFIX) for path in found}
        steps = {int(n): path for path, n in names.items() if n.isdecimal()}
        return {step: path for step, path in steps.items() if path == self._path(step)}

    def _path(self, step: int) -> Path:
        """Return the name of a state's file."""
        return self.directory / f"{_PREFIX}{step:08d}.pt"


def policy_in(text: str) -> DeletionPolicy | None:
    """Return the policy in the text of a record, or None if it is empty.

    Args:
        text: JSON of a policy, or nothing.
    """
    return DeletionPolicy.from_json(text) if text else None


def thinned(steps: Sequence[int], most: int) -> list[int]:
    """Return which states to keep: at most so many, evenly spread, the first always.

    States are dropped one at a time, each time the one whose neighbours are closest to
    each other. For the last state, twice the distance from the one before is used.

    Args:
        steps: Increasing numbers of updates.
        most: How many may stay, at least 1.
    """
    kept = list(steps)
    while len(kept) > most:
        ends = [*kept[2:], 2 * kept[-1] - kept[-2]]
        gaps = [after - before for before, after in zip(kept, ends, strict=False)]
        del kept[1 + int(np.argmin(gaps))]
    return kept


def _checked_every(every: int | Sequence[int]) -> int | tuple[int, ...]:
    """Return the option ``every``, checked."""
    checked = checked_every(
        every,
        remedy="Pass one number, the updates from one state to the next, or a list of "
        "the updates after which to save a state.",
    )
    if isinstance(checked, tuple):
        return checked
    expect(
        isinstance(every, int) and not isinstance(every, bool),
        "every",
        every,
        "must be a whole number of updates, or a sequence of them",
        "Checkpoints(every=...) counts updates, unlike Recorder(every=...), which "
        "counts epochs.",
    )
    return int(checked)
