"""Rules that choose forget sets.

A figure names its forget sets before anything is trained; the examples are known only
when the trainings that rank them are finished. So a job holds the rule, not the
indices. The indices are stored as soon as they are known, like any other result.
"""

from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.common.set_ranges import (
    pairs_within_classes,
    set_apart,
    sets_along_range,
)
from benchmarks.reproduce.experiment import Experiment, Facts
from benchmarks.reproduce.store import cached_json
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.difficulty.forget_sets import ranking

LOSS = "privacy loss"


@dataclass(frozen=True)
class ForgetSet:
    """A rule that chooses a forget set.

    Attributes:
        rule: ``"range"``: one of several sets along the range of difficulty;
            ``"top"``: a random part of the examples of highest score; ``"apart"``: hard
            examples that belong to no set along the range, for the search of settings;
            ``"classes"``: one of two equally hard sets that span the range within each
            class, without the examples of the search.
        size: Number of examples; with ``"classes"`` at most so many.
        number: Which of the sets, from 0, the easiest one.
        count: How many sets the rule makes; they have no example in common.
        score: The score by which examples are ranked.
    """

    rule: str
    size: int
    number: int
    count: int
    score: str = LOSS

    @property
    def name(self) -> str:
        """Its number from 1, for tables."""
        return f"{self.number + 1} of {self.count}"

    def indices(self, workspace: Workspace, experiment: Experiment) -> np.ndarray:
        """Return the sorted indices of the examples, the same for every seed."""
        facts = self.facts(experiment) | workspace.content_facts(experiment)
        found = cached_json(
            workspace.directory,
            "indices",
            facts,
            lambda: self._chosen(workspace, experiment).tolist(),
        )
        return np.array(found, dtype=np.int64)

    def mean_loss(self, workspace: Workspace, experiment: Experiment) -> float:
        """Return the mean privacy loss of the set.

        It is stored with the indices, so that neither needs the trainings again.
        """
        facts = self.facts(experiment) | workspace.content_facts(experiment)
        return float(
            cached_json(
                workspace.directory,
                "mean_losses",
                facts,
                lambda: float(
                    workspace.scores(experiment)[LOSS][
                        self.indices(workspace, experiment)
                    ].mean()
                ),
            )
        )

    def _chosen(self, workspace: Workspace, experiment: Experiment) -> np.ndarray:
        scores = workspace.scores(experiment)[self.score]
        if self.rule == "classes":
            labels = workspace.images(experiment).train.tensors[1].numpy()
            searched = apart(experiment).indices(workspace, experiment)
            both = pairs_within_classes(scores, labels, searched, self.size)
            return both[self.number]
        if self.rule == "range":
            return sets_along_range(scores, self.size, self.count)[self.number]
        if self.rule == "apart":
            return set_apart(scores, self.size, self.count)
        hardest = ranking(scores)[-self.size * self.count :]
        shuffled = np.random.default_rng(0).permutation(hardest)
        return np.sort(shuffled[self.number :: self.count])

    def facts(self, experiment: Experiment) -> Facts:
        """Return what determines the examples."""
        found = asdict(self) | {"ranking": experiment.ranking_facts()}
        if self.rule == "classes":
            found |= {"without": asdict(apart(experiment))}
        return found


def sets_of(experiment: Experiment, size: int = 0) -> list[ForgetSet]:
    """Return the sets along the range of difficulty, easiest first.

    Args:
        experiment: Whose ranking is used.
        size: Examples in each set; 0: the experiment's set size.
    """
    count = experiment.num_sets
    return [
        ForgetSet("range", size or experiment.set_size, number, count)
        for number in range(count)
    ]


def hardest_sets(size: int, score: str, count: int = 4) -> list[ForgetSet]:
    """Return disjoint sets drawn from the ``size * count`` examples of highest score.

    They are equally hard up to chance; their differences are the noise of a comparison.
    """
    return [ForgetSet("top", size, number, count, score) for number in range(count)]


def apart(experiment: Experiment) -> ForgetSet:
    """Return the set on which settings are searched; no figure uses it."""
    return ForgetSet("apart", experiment.set_size, 0, experiment.num_sets)


def attacked_and_control(size: int) -> tuple[ForgetSet, ForgetSet]:
    """Return a forget set and equally hard examples that are retained, for attacks."""
    return ForgetSet("classes", size, 0, 2), ForgetSet("classes", size, 1, 2)
