"""The options of a recorder, and schedules of rows that are made from them.

>>> from opacus_pi import Recorder
>>> Recorder.evenly_spaced(4, num_steps=10).every
(2, 5, 8, 10)
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from opacus_pi._validate import expect, positive
from opacus_pi.recording.checkpoints import Checkpoints
from opacus_pi.recording.schedule import (
    checked_every,
    evenly_spaced_steps,
    stratified_steps,
)

__all__ = ["RecorderOptions"]

R = TypeVar("R", bound="RecorderOptions")

_EVERY = {"observed": 0.2, "swept": 1.0}  # epochs from row to row


class RecorderOptions:
    """The options of ``Recorder``, checked; ``Recorder`` documents them."""

    checkpoints: Checkpoints | None = None  # copies of a recorder have none

    def __init__(
        self,
        mode: Literal["observed", "swept"] = "observed",
        every: float | Sequence[int] | None = None,
        *,
        criterion: Callable[[Any, Any], Tensor] | None = None,
        strict: bool = False,
        verify: bool = True,
        probe_model: bool = True,
        weights_dir: str | os.PathLike[str] | None = None,
        batch_size: int = 64,
        unattributed: Literal["refuse", "worst_case"] = "refuse",
        checkpoints: Checkpoints | None = None,
    ) -> None:
        expect(
            unattributed in ("refuse", "worst_case"),
            "unattributed",
            repr(unattributed),
            'must be "refuse" or "worst_case"',
            'With "refuse" the run has no ledger if more than 1 % of the samples are '
            'unattributed; "worst_case" charges unobserved examples at the clip norm.',
        )
        expect(
            mode in ("observed", "swept"),
            "mode",
            repr(mode),
            'must be "observed" or "swept"',
            'Pass "observed" to record the norms of sampled examples, "swept" to '
            "measure all examples.",
        )
        positive(
            batch_size=batch_size,
            remedy="Pass the number of examples that a sweep measures at once.",
        )
        self.mode = mode
        self.every = checked_every(_EVERY[mode] if every is None else every)
        expect(
            mode == "swept" or not self._starts_with_a_row,
            "every",
            list(every) if isinstance(every, Sequence) else every,
            'must be above 0 if mode is "observed"',
            "Leave out row 0: no norm is observed before the first update.",
        )
        self.criterion = criterion
        self.strict, self.verify = strict, verify
        self.probe_model = probe_model
        self.weights_dir = None if weights_dir is None else Path(weights_dir)
        self.batch_size = batch_size
        self.unattributed = unattributed
        self.checkpoints = _checked_checkpoints(checkpoints)

    @classmethod
    def evenly_spaced(
        cls: type[R], num_checkpoints: int = 35, *, num_steps: int, **options: Any
    ) -> R:
        """Return a recorder whose rows are evenly spaced over a run of known length.

        Rows are written after ``round(num_steps * (i + 1) / num_checkpoints)`` updates,
        as in section 5.1 of the paper, which uses 35 rows.

        Args:
            num_checkpoints: Number of rows, N.
            num_steps: Number of updates of the whole run, T.
            **options: The other options of ``Recorder``.

        Raises:
            ValueError: If there are more rows than updates.
        """
        return cls(every=evenly_spaced_steps(num_checkpoints, num_steps), **options)

    @classmethod
    def stratified(
        cls: type[R],
        num_checkpoints: int = 35,
        *,
        num_steps: int,
        generator: torch.Generator,
        **options: Any,
    ) -> R:
        """Return a recorder that sweeps at a random update in each part of a run.

        With ``rule="stratified"``, sums over these rows are unbiased for sums over all
        updates; sums over a fixed choice of rows are not. ``privacy_losses`` of
        several runs needs rows at the same updates: give each run a generator with the
        same seed. ``trajectory_limits`` needs rows that are drawn independently: give
        each run another seed.

        Args:
            num_checkpoints: Number of rows, N.
            num_steps: Number of updates of the whole run, T; the rule refuses a run of
                another length.
            generator: Source of the random draws.
            **options: The other options of ``Recorder``.

        Raises:
            ValueError: If there are more rows than updates.
        """
        every = stratified_steps(num_checkpoints, num_steps, generator)
        return cls("swept", every, **options)

    @property
    def _starts_with_a_row(self) -> bool:
        """Return whether a row is due before the first update."""
        return isinstance(self.every, tuple) and self.every[0] == 0


# Python's error about a misspelt option then names the class that the user wrote.
RecorderOptions.__init__.__qualname__ = "Recorder.__init__"


def _checked_checkpoints(checkpoints: Checkpoints | None) -> Checkpoints | None:
    """Return the option, or refuse what is no ``Checkpoints``, such as a directory."""
    expect(
        isinstance(checkpoints, Checkpoints | None),
        "checkpoints",
        repr(checkpoints),
        "must be a Checkpoints object or None",
        "Pass Checkpoints(directory).",
    )
    return checkpoints
