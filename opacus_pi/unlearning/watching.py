"""Evaluation, callbacks, progress and saving while ``Unlearner.unlearn`` runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from opacus_pi._validate import expect
from opacus_pi.evaluation.trace import UnlearningTrace
from opacus_pi.recording.random_states import RandomStates
from opacus_pi.unlearning.callbacks import Callback, Watched
from opacus_pi.unlearning.loop import StopRule, Updates
from opacus_pi.unlearning.resuming import RunFile, SavedRun

__all__ = ["Watch"]

Evaluate = Callable[[nn.Module], dict[str, float]]


@dataclass
class Watch:
    """The evaluation, stop rule, callbacks and file of one unlearning run.

    Args:
        evaluate: ``model -> dict`` of numbers, or None.
        stop: The rule that may end the run early, or None.
        callbacks: Objects that are called at the start, after each epoch and at the
            end.
        progress: Whether to show a bar; None: in a terminal only.
        file: Where the run is saved after each pass, or None.

    Attributes:
        saved: The run to continue, if the file holds one; else None.

    Raises:
        ValueError: If ``evaluate`` is not a function, a callback is of another class,
            or the file is of another run.
    """

    evaluate: Evaluate | None
    stop: StopRule | None
    callbacks: Sequence[Callback]
    progress: bool | None
    file: RunFile | None

    def __post_init__(self) -> None:
        expect(
            self.evaluate is None or callable(self.evaluate),
            "evaluate",
            repr(self.evaluate),
            "must be a function of the model that returns a dict of numbers",
            'Pass for example lambda model: {"test_accuracy": test(model)}.',
        )
        for callback in self.callbacks:
            expect(
                isinstance(callback, Callback),
                "callbacks",
                repr(callback),
                "must be objects of subclasses of Callback",
                "Pass for example [LogMetrics(logger)].",
            )
        self.saved: SavedRun | None = None if self.file is None else self.file.read()
        self._has_updates = False

    @property
    def seconds_before(self) -> float:
        """Seconds that the saved run took until it was saved."""
        return 0.0 if self.saved is None else float(self.saved.trace["cost"]["seconds"])

    def save(self, random: RandomStates, run: Updates, trace: UnlearningTrace) -> None:
        """Save the run if that was asked for."""
        if self.file is not None:
            self.file.write(random, run, trace)

    def restore(self, run: Updates, random: RandomStates) -> None:
        """Bring a run that has just begun to where it was saved."""
        if self.saved is not None:
            run.load_state_dict(self.saved.updates)
            random.restore(self.saved.random)
            self._has_updates = True

    def updated(self) -> None:
        """Note that the run has made an update: from now on a failure leaves it."""
        self._has_updates = True

    @contextmanager
    def all_or_nothing(
        self, unlearner: object, generator: torch.Generator
    ) -> Iterator[None]:
        """Context that undoes everything if the run fails before its first update.

        The updates are made on a copy of the model, so putting back the attributes
        leaves no trace of the run. A saved run counts as updated once it is restored.

        Args:
            unlearner: Gets its attributes back.
            generator: The unlearner's; it and the global ones get their states back.
        """
        attributes, random = dict(vars(unlearner)), RandomStates({"own": generator})
        states = random.collect()
        try:
            yield
        except BaseException:
            if not self._has_updates:
                vars(unlearner).update(attributes)
                random.restore(states)
            raise

    def bar(self, done: int, total: int) -> Any:
        """Return the progress bar of a run, by updates."""
        hidden = None if self.progress is None else not self.progress
        return tqdm(
            total=total, initial=done, desc="unlearning", unit="update", disable=hidden
        )

    def end(self, unlearner: Watched) -> None:
        """Tell the callbacks, and remove the file of a run that is complete."""
        for callback in self.callbacks:
            callback.on_end(unlearner)
        if self.file is not None:
            self.file.remove()
