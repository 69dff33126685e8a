"""Units that fine-tune at a given learning rate, where nothing is searched."""

from dataclasses import dataclass
from typing import Any

from benchmarks.reproduce.experiment import Experiment, Facts
from benchmarks.reproduce.forget import ForgetSet
from benchmarks.reproduce.judging import unlearn
from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.units import Unit, needs_of_judging
from benchmarks.reproduce.unlearning_units import work_of_run
from benchmarks.reproduce.work import Work


@dataclass(frozen=True)
class FineTuned(Unit):
    """One fine-tuning run at one learning rate, evaluated after every epoch."""

    experiment: Experiment
    forget_set: ForgetSet
    learning_rate: float
    seed: int

    def needs(self) -> list[Unit]:
        """Trainings, and the oracles that judge."""
        return needs_of_judging(self.experiment, self.forget_set)

    def facts(self) -> Facts:
        """Experiment, forget set, rate, seed."""
        return self.experiment.facts() | {
            "forget": self.forget_set.facts(self.experiment),
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }

    def work(self) -> Work:
        """The run."""
        return work_of_run(self.experiment, self.forget_set)

    def compute(self, lab: Lab) -> dict[str, Any]:
        """Unlearn; evaluate."""
        _, trace = unlearn(
            lab,
            self.experiment,
            self.forget_set,
            "fine-tune",
            {"learning_rate": self.learning_rate},
            self.seed,
        )
        return {"trace": trace.metrics, "times": trace.times}
