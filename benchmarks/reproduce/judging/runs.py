"""The unlearning runs that the judges of an order are given.

A judge needs the distance that each run still has to go, at every epoch, *with its
sign*: positive on the side on which the trained model starts, negative beyond the
retrained models (oracles). The distance without its sign would be larger where the
oracles vary more, even if there is nothing to forget.

Fine-tuning also changes what a model does on images that it keeps: a large learning
rate raises the error on all of them, and the threshold of a membership attack moves. A
forget set shares this movement, although nothing of it is unlearned. So the movement of
the same metric on retained images since the start of the run is subtracted from the gap
wherever something that was *unlearned* is measured.

How much of it forgotten images share is not known. Once they are forgotten they may
move like images that the model has never seen, or not at all. The same number of points
is a large share of a small gap, so a wrong guess makes near sets look faster or slower
than far ones. Speeds are therefore compared by several *accounts* of what forgotten
images share, and a verdict must hold by all of them.

Sets with something to forget are chosen by one training and one oracle, and measured
with all others. A choice by the measured value itself would favour sets whose value is
large by chance, and such a value falls again without any unlearning.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi.evaluation import GapSummary, UnlearningTrace, gap_summary

LEAST_GAP = 0.05  # gap before unlearning from which on there is something to forget
MOST_LOST = 0.05  # test accuracy that a run may cost
MOST_MOVED = 0.05  # mean movement of the metric on retained images
SLOWNESS = "share of the gap that remained, as an angle"
ACCOUNTS = (  # what ``Runs.accounts`` assumes, in this order
    "if forgotten images share the movement of retained images",
    "if they do not share it",
    "if they gain as many errors as test images",
)
SHORTLY = ("shared", "not shared", "as test images")  # the same in short
_METRIC = "gap"

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Runs:
    """The runs of one method and one metric on several forget sets.

    Attributes:
        difficulty: Mean privacy loss of each set, ``(sets,)``.
        gaps: Metric minus the mean oracle's, ``(seeds, sets, epochs + 1)``; the first
            value is before unlearning.
        lost: Test accuracy of the mean oracle minus that after the run,
            ``(seeds, sets)``.
        oracles: Metric of each oracle minus the mean oracle's, ``(oracles, sets)``, or
            ``(oracles, seeds, sets)`` if every training has its own.
        toward: 1 if unlearning raises the metric, as it does UA and MIA; -1 if it
            lowers the metric.
        moved: The metric on retained images minus that before unlearning, of the shape
            of ``gaps``; 0 if the metric has no counterpart on them.
        least_gap: Gap before unlearning that a set must exceed to be judged, a number
            or one for each set; five points if the metric is an accuracy.
        counts_errors: The metric is the share of wrong labels, as UA is, so that the
            lost test accuracy is its counterpart on images never seen.
    """

    difficulty: Floats
    gaps: Floats
    lost: Floats
    oracles: Floats
    moved: Floats
    toward: int = 1
    least_gap: float | Floats = LEAST_GAP
    counts_errors: bool = False

    @staticmethod
    def of_panel(panel: dict[str, Any], metric: str) -> "Runs":
        """Return the runs of one metric of a figure's panel."""
        return Runs(
            np.array(panel["mean_losses"], dtype=np.float64),
            np.array(panel["gaps"][metric], dtype=np.float64),
            np.array(panel["lost"], dtype=np.float64),
            np.array(panel["oracles"][metric], dtype=np.float64),
            np.array(panel["moved"][metric], dtype=np.float64),
            counts_errors=metric == "UA",
        )

    @property
    def num_epochs(self) -> int:
        """Epochs of a run."""
        return self.gaps.shape[2] - 1

    @property
    def to_go(self) -> Floats:
        """Distance left to the mean oracle, negative beyond it; shape of ``gaps``."""
        return -self.toward * self.gaps

    def only(self, judged: Bools) -> "Runs":
        """Return the runs on some of the sets."""
        least = self.least_gap
        return replace(
            self,
            difficulty=self.difficulty[judged],
            gaps=self.gaps[:, judged],
            lost=self.lost[:, judged],
            moved=self.moved[:, judged],
            oracles=self.oracles[..., judged],
            least_gap=least if np.ndim(least) == 0 else np.asarray(least)[judged],
        )

    def something_to_forget(self) -> Bools:
        """Return which sets start far from the first oracle in the first training."""
        first = self.gaps[0, :, 0] - self._of_each_run()[0, 0]
        return np.asarray(-self.toward * first > self.least_gap)

    def rest(self) -> "Runs":
        """Return the runs without the training and the oracle that chose the sets."""
        others = self._of_each_run()[1:, 1:]
        mean = others.mean(0)
        return replace(
            self,
            gaps=self.gaps[1:] - mean[:, :, None],
            lost=self.lost[1:],
            moved=self.moved[1:],
            oracles=others - mean,
        )

    def unlearned(self) -> "Runs":
        """Return the runs without the movement that retained images share."""
        return replace(
            self, gaps=self.gaps - self.moved, moved=np.zeros_like(self.moved)
        )

    def accounts(self) -> list["Runs"]:
        """Return the runs by each account of what forgotten images share with others.

        The first one is that of ``unlearned``: they move as retained images do. By the
        second one they do not. By the third one, if the metric counts errors, they end
        with as many more errors than the oracles make as unseen images do.
        """
        found = [self.unlearned(), self]
        if self.counts_errors:
            further = self.toward * self.lost.mean(0)[:, None]
            found.append(replace(self, gaps=self.gaps - further))
        return found

    def _of_each_run(self) -> Floats:
        """Return the oracles as ``(oracles, seeds, sets)``."""
        seeds = self.gaps.shape[0]
        if self.oracles.ndim == 3:
            return self.oracles
        return np.repeat(self.oracles[:, None], seeds, axis=1)

    def unusable(self) -> str:
        """Return which value is not a finite number; empty if all are."""
        named = {
            "privacy loss": self.difficulty,
            "gap": self.gaps,
            "lost test accuracy": self.lost,
            "metric of the oracles": self.oracles,
            "metric on retained images": self.moved,
            "least gap": np.asarray(self.least_gap),
        }
        for name, values in named.items():
            bad = int((~np.isfinite(values)).sum())
            if bad:
                return f"{name}: {bad} of {np.size(values)} values are NaN or infinite"
        return ""

    def of_sets(self) -> dict[str, Floats]:
        """Return gap before, area, and shares that remained and closed, by set.

        All are signed, and means over the seeds. ``initial`` and ``area`` are distances
        to go; shares are ratios of means, NaN where a set starts at its oracles or
        beyond.
        """
        gap = self.to_go.mean(0)
        area = (gap[:, 1:] + gap[:, :-1]).sum(1) / 2
        safe = np.where(gap[:, 0] > 0, gap[:, 0], np.nan)
        return {
            "initial": gap[:, 0],
            "area": area,
            "remaining": area / safe / self.num_epochs,
            "closed": 1 - gap[:, -1] / safe,
        }

    def slowness(self) -> Floats:
        """Return a score of each run, ``(seeds, sets)``, larger for slower ones.

        It orders runs by the share of their gap that remained on average: the area
        under the gap divided by the gap before unlearning and by the length of the run.
        The score is the angle whose tangent is this share, counted from what was
        closed: it goes on where noise makes a gap 0 or less, at which the share jumps.
        """
        gap = self.to_go
        mean = (gap[:, :, 1:] + gap[:, :, :-1]).mean(2) / 2
        return -np.arctan2(gap[:, :, 0] - mean, gap[:, :, 0])

    def summaries(self) -> list[list[GapSummary]]:
        """Return the summary of each run, ``[seed][set]``."""
        times = list(range(self.gaps.shape[2]))
        return [
            [
                gap_summary(
                    UnlearningTrace(times, {_METRIC: path}), 0.0, metric=_METRIC
                )
                for path in row
            ]
            for row in self.gaps
        ]
