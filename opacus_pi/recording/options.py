"""What a user asks of a recorder: what to measure, and when."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from opacus_pi._validate import expect, positive
from opacus_pi.recording.schedule import (
    checked_every,
    evenly_spaced_steps,
    stratified_steps,
)

R = TypeVar("R", bound="RecorderOptions")


class RecorderOptions:
    """The options of ``Recorder``, checked; it says what each of them means."""

    def __init__(
        self,
        mode: Literal["observed", "swept"] = "observed",
        every: float | Sequence[int] = 1.0,
        *,
        criterion: Callable[[Any, Any], Tensor] | None = None,
        strict: bool = False,
        verify: bool = True,
        weights_dir: str | os.PathLike[str] | None = None,
        batch_size: int = 64,
    ) -> None:
        expect(
            mode in ("observed", "swept"),
            "mode",
            repr(mode),
            'must be "observed" or "swept"',
            "It says how the norms are measured.",
        )
        positive(batch_size=batch_size, remedy="A sweep measures that many at once.")
        self.mode = mode
        self.every = checked_every(every)
        expect(
            mode == "swept" or not self._starts_with_a_row,
            "every",
            list(every) if isinstance(every, Sequence) else every,
            "must be above 0 where norms are observed",
            "Before the first update there is nothing to observe.",
        )
        self.criterion = criterion
        self.strict = strict
        self.verify = verify
        self.weights_dir = None if weights_dir is None else Path(weights_dir)
        self.batch_size = batch_size

    @classmethod
    def evenly_spaced(
        cls: type[R], num_checkpoints: int = 35, *, num_steps: int, **options: Any
    ) -> R:
        """A recorder whose rows are evenly spaced over a run of known length.

        Rows after ``round(num_steps * (i + 1) / num_checkpoints)`` updates, as in the
        paper, section 5.1 (there 35 checkpoints).

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
        """A recorder of swept rows drawn at random, one in each equal part of a run.

        With ``rule="stratified"`` sums over the rows are unbiased for sums over all
        updates, which no fixed choice of rows is. Losses that average several runs
        need their rows at the same steps: give each run a generator with one seed.

        Args:
            num_checkpoints: Number of rows, N.
            num_steps: Number of updates of the whole run, T; the rule refuses a run of
                another length.
            generator: Where the draws come from.
            **options: The other options of ``Recorder``.

        Raises:
            ValueError: If there are more rows than updates.
        """
        every = stratified_steps(num_checkpoints, num_steps, generator)
        return cls("swept", every, **options)

    @property
    def _starts_with_a_row(self) -> bool:
        """Whether a row is due before the first update."""
        return isinstance(self.every, tuple) and self.every[0] == 0
