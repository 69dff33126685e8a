"""Jobs of the studies of bounds; they do not unlearn deep networks.

The work is done by ``benchmarks.group_bound`` and ``benchmarks.certified_logistic``,
which are commands of their own; here their results are stored like any other.
"""

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
    """Compute group bounds of five strata from one SGLD training.

    Without an experiment, the training is the small one on digits.
    """

    settings: group_bound.Settings
    experiment: Experiment | None = None

    def facts(self) -> Facts:
        """Return the settings, and what determines the training."""
        own = asdict(self.settings)
        if self.experiment is None:
            return own
        return own | {"experiment": self.experiment.training_facts()}

    def compute(self, workspace: Workspace) -> list[dict[str, Any]]:
        """Return one row per stratum."""
        if self.experiment is None:
            return group_bound.study(self.settings)
        images, recipe = workspace.images(self.experiment), self.experiment.recipe
        return group_bound.study(self.settings, images, recipe, workspace.device)


@dataclass(frozen=True)
class Certified(Unit):
    """Certify the unlearning of logistic regression on the digits 3 and 8."""

    num_seeds: int

    def facts(self) -> Facts:
        """Return number of seeds and setting."""
        return {"num_seeds": self.num_seeds} | asdict(_DIGITS_3_8)

    def compute(self, workspace: Workspace) -> list[dict[str, Any]]:
        """Return one row per size of the forget set."""
        problem = Problem(digits_3_8(), _DIGITS_3_8)
        return list(certified_logistic.run(problem, self.num_seeds))
