"""Units of the studies of bounds, which do not unlearn deep networks."""

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import certified_logistic, group_bound
from benchmarks.certified_steps import Problem, Setting
from benchmarks.common.binary_data import digits_3_8
from benchmarks.reproduce.experiment import Experiment, Facts
from benchmarks.reproduce.units import Unit
from benchmarks.reproduce.workspace import Workspace

_DIGITS_3_8 = Setting(0.01, 0.03, 500)


@dataclass(frozen=True)
class GroupBounds(Unit):
    """Group bounds of five strata, one SGLD training; of digits, if of nothing else."""

    settings: group_bound.Settings
    experiment: Experiment | None = None

    def facts(self) -> Facts:
        """The settings, and what determines the training."""
        own = asdict(self.settings)
        if self.experiment is None:
            return own
        return own | {"experiment": self.experiment.training_facts()}

    def compute(self, workspace: Workspace) -> list[dict[str, Any]]:
        """One row a stratum."""
        if self.experiment is None:
            return group_bound.study(self.settings)
        images, recipe = workspace.images(self.experiment), self.experiment.recipe
        return group_bound.study(self.settings, images, recipe, workspace.device)


@dataclass(frozen=True)
class Certified(Unit):
    """Certified unlearning of logistic regression on two digits."""

    num_seeds: int

    def facts(self) -> Facts:
        """Seeds and setting."""
        return {"num_seeds": self.num_seeds} | asdict(_DIGITS_3_8)

    def compute(self, workspace: Workspace) -> list[dict[str, Any]]:
        """One row for each size of forget set."""
        problem = Problem(digits_3_8(), _DIGITS_3_8)
        return list(certified_logistic.run(problem, self.num_seeds))
