"""Which examples are forgotten."""

from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.reproduce.experiment import Experiment, Facts
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.difficulty.forget_sets import difficulty_strata, random_forget_set, top_k

STRATA = ("first", "q1", "q2", "q3", "last")


@dataclass(frozen=True)
class ForgetSet:
    """A rule that names a forget set before anything is trained.

    Attributes:
        rule: A stratum by privacy loss (``STRATA``), ``"top"`` or ``"random"``.
        size: Number of examples.
        score: What ``"top"`` ranks by.
    """

    rule: str
    size: int
    score: str = "privacy loss"

    def indices(self, workspace: Workspace, experiment: Experiment) -> np.ndarray:
        """The examples, sorted; they are the same for every seed."""
        if self.rule == "random":
            num_train = len(workspace.images(experiment).train)
            return random_forget_set(num_train, self.size, np.random.default_rng(0))
        scores = workspace.scores(experiment)[self.score]
        if self.rule == "top":
            return top_k(scores, self.size)
        return difficulty_strata(scores, self.size)[self.rule]

    def facts(self, experiment: Experiment) -> Facts:
        """What determines the examples."""
        if self.rule == "random":
            return asdict(self) | {"num_train": experiment.num_train}
        return asdict(self) | {"ranking": experiment.ranking_facts()}


def strata(experiment: Experiment, size: int = 0) -> list[ForgetSet]:
    """The five strata of Appendix D, easiest first."""
    return [ForgetSet(rule, size or experiment.stratum_size) for rule in STRATA]
