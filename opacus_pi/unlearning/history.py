"""The runs of unlearning that a model went through, as far as a claim depends on them.

A deletion log carries out one request after the other, by runs of several kinds, and
what may be said about the last weights depends on all of them. A rewind starts from a
saved state of the training, so what was run before it no longer counts.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from opacus_pi.files.plain_json import plain_json
from opacus_pi.unlearning.loop import StopRule, stop_rule
from opacus_pi.unlearning.methods import Method

Runs = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class History:
    """The runs that a model went through, as far as a guarantee depends on them.

    A run that used the forget set, or that an evaluation could end early, weakens every
    later claim about the model, by whatever method the next run is. So does a run that
    was fine-tuned on an example that is to be forgotten now.

    >>> from opacus_pi.unlearning.methods import FineTune
    >>> ran = History().after(FineTune(), None).begun("a", 1, "FineTune()").ended("b")
    >>> ran.updated, ran.trained, ran.left, ran.runs
    (True, 'a', 'b', (('FineTune()', 1),))

    Args:
        stop: The rule that could have ended one of them early, or None.
        looked: Why a run may have used the forget set, as evidence for the reader;
            empty if no run did.
        updated: Whether a run changed the weights, and so was fine-tuned on all
            examples that were not forgotten before that run.
        num_used: How many of the forgotten examples an earlier run was fine-tuned on,
            because they were requested later.
        trained: Name of the weights from which the first run started; empty: no run,
            or a rewind came before it, which starts from a saved state.
        left: Name of the weights that the last run left; empty if there was no run, or
            it did not end.
        runs: The runs since the training, or those with and since the last rewind:
            what was run, and how many times in a row, oldest first. None: not known,
            because an earlier release wrote the file of the weights, or they were
            changed between two runs.
    """

    stop: StopRule | None = None
    looked: str = ""
    updated: bool = False
    num_used: int = 0
    trained: str = ""
    left: str = ""
    runs: Runs | None = ()

    @property
    def keeps_exact(self) -> bool:
        """Whether examples that an exact rewind forgot are still forgotten exactly.

        That is so if every run since is the same random map of the weights, whatever
        these examples are: it did not use them, and no evaluation could end it.
        """
        blind = not self.looked and self.stop is None
        return blind and self.began_with_rewind and self.runs is not None

    @property
    def rewound(self) -> bool:
        """Whether a rewind left the present weights, and no run changed them since."""
        return self.began_with_rewind and not self.updated

    @property
    def began_with_rewind(self) -> bool:
        """Whether the runs are those since a rewind."""
        return bool(self.left) and not self.trained

    def after(self, method: Method, stop: StopRule | None) -> "History":
        """Return the history with one more run.

        Args:
            method: The method of that run.
            stop: The rule that could end it early, or None.
        """
        looks = f"{type(method).__name__} uses it" if method.needs_forget_set else ""
        return replace(self, stop=stop or self.stop, looked=looks or self.looked)

    def used(self, num_fresh: int) -> int:
        """Return how many examples earlier runs used, once more are forgotten.

        Args:
            num_fresh: How many examples are to be forgotten for the first time.
        """
        return self.num_used + (num_fresh if self.updated else 0)

    def begun(self, trained: str, num_fresh: int, run: str) -> "History":
        """Return the history of a model that a run is about to change.

        Args:
            trained: Name of the weights that the run starts from.
            num_fresh: How many examples it forgets for the first time.
            run: What is run; empty if it makes no update.
        """
        is_first = not (self.left or self.trained or self.updated)
        is_known = self.runs is not None and (is_first or self.left == trained)
        return replace(
            self,
            updated=self.updated or bool(run),
            num_used=self.used(num_fresh),
            trained=self.trained or ("" if self.left or self.updated else trained),
            left="",
            runs=_with(self.runs or (), run) if is_known else None,
        )

    def ended(self, left: str) -> "History":
        """Return the history after a run has ended.

        Args:
            left: Name of the weights that it left.
        """
        return replace(self, left=left)

    def joined(self, other: "History") -> "History":
        """Return the history of a model that went through the runs of both.

        Args:
            other: The other history. Where both name a rule or a reason, the other's is
                kept: one of them is enough to weaken the claim. The model has the
                weights that the other left.
        """
        return History(
            other.stop or self.stop,
            other.looked or self.looked,
            self.updated or other.updated,
            max(self.num_used, other.num_used),
            self.trained or other.trained,
            other.left,
            other.runs,
        )

    @property
    def text(self) -> str:
        """Return the history as JSON."""
        return json.dumps(asdict(self))


def runs_in_words(runs: Sequence[Sequence[Any]]) -> str:
    """Return what was run, such as ``exact rewind, FineTune() (2 times)``.

    Args:
        runs: As in ``History``, or as read from JSON.
    """
    return ", ".join(
        f"{what} ({number} times)" if number > 1 else str(what) for what, number in runs
    )


def _with(runs: Runs, run: str) -> Runs:
    """Return runs with one more; unchanged if it made no update.

    Args:
        runs: As in ``History``.
        run: What is run; empty if it makes no update.
    """
    if not run:
        return runs
    if runs and runs[-1][0] == run:
        return (*runs[:-1], (run, runs[-1][1] + 1))
    return (*runs, (run, 1))


UNKNOWN = History(looked="an earlier run is not described", updated=True, runs=None)


def history_from_json(text: str | None) -> History | None:
    """Read a history from the JSON in ``History.text``.

    Weights files of earlier releases contain no history, or one that does not say which
    examples the runs were fine-tuned on. Their runs may have used the forget set, so no
    number is claimed with what is returned.

    Args:
        text: The JSON text, or None if the weights file has none.

    Returns:
        The history, or None if the text is not one: the file is damaged.
    """
    if text is None:
        return UNKNOWN
    try:
        found: dict[str, Any] = plain_json(text)
        stop = found["stop"]
        rule = None if stop is None else stop_rule(stop)
        if "num_used" not in found:
            why = found["looked"] or UNKNOWN.looked
            found = {"looked": why, "updated": True}
        runs = found.get("runs")  # absent in files of earlier releases
        if runs is not None:
            runs = tuple((str(what), int(number)) for what, number in runs)
        history = History(**{**found, "stop": rule, "runs": runs})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    texts = (history.looked, history.trained, history.left)
    fine = all(isinstance(text, str) for text in texts)
    fine = fine and type(history.updated) is bool and type(history.num_used) is int
    return history if fine else None
