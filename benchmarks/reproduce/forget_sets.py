"""Rules that choose forget sets.

A figure names its forget sets before anything is trained; the examples are known only
when the trainings that rank them are finished. So a job holds the rule, not the
indices.
"""

from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.reproduce.experiment import Experiment, Facts
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.difficulty.forget_sets import difficulty_strata, random_forget_set, top_k

STRATA = ("first", "q1", "q2", "q3", "last")


@dataclass(frozen=True)
class ForgetSet:
    """A rule that chooses a forget set.

    Attributes:
        rule: A stratum by privacy loss (``STRATA``), ``"top"`` (the highest scores) or
            ``"random"``.
        size: Number of examples.
        score: The score by which ``"top"`` ranks.
    """

    rule: str
    size: int
    score: str = "privacy loss"

    def indices(self, workspace: Workspace, experiment: Experiment) -> np.ndarray:
        """Return the sorted indices of the examples, the same for every seed."""
        if self.rule == "random":
            num_train = len(workspace.images(experiment).train)
            return random_forget_set(num_train, self.size, np.random.default_rng(0))
        scores = workspace.scores(experiment)[self.score]
        if self.rule == "top":
            return top_k(scores, self.size)
        return difficulty_strata(scores, self.size)[self.rule]

    def facts(self, experiment: Experiment) -> Facts:
        """Return what determines the examples."""
        if self.rule == "random":
            return asdict(self) | {"num_train": experiment.num_train}
        return asdict(self) | {"ranking": experiment.ranking_facts()}


def strata(experiment: Experiment, size: int = 0) -> list[ForgetSet]:
    """Return the five strata of Appendix D, easiest first.

    Args:
        experiment: Whose ranking is used.
        size: Examples in each stratum; 0: the experiment's stratum size.
    """
    return [ForgetSet(rule, size or experiment.stratum_size) for rule in STRATA]
