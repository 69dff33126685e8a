"""Units that measure loss barriers between models that others have trained."""

from dataclasses import dataclass
from math import comb

import numpy as np

from benchmarks.reproduce.experiment import Experiment, Facts
from benchmarks.reproduce.forget import ForgetSet
from benchmarks.reproduce.judging import barrier, work_of_barrier
from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.units import Oracle, Unit, oracles, trainings
from benchmarks.reproduce.work import Work


@dataclass(frozen=True)
class BarrierBefore(Unit):
    """The barrier between a trained model and an oracle."""

    experiment: Experiment
    forget_set: ForgetSet
    seed: int

    def needs(self) -> list[Unit]:
        """Trainings and oracles."""
        judges = oracles(self.experiment, self.forget_set)
        return [*trainings(self.experiment), *judges]

    def facts(self) -> Facts:
        """Experiment, forget set, seed."""
        forget = self.forget_set.facts(self.experiment)
        return self.experiment.facts() | {"forget": forget, "seed": self.seed}

    def work(self) -> Work:
        """One barrier."""
        return work_of_barrier(self.experiment)

    def compute(self, lab: Lab) -> float:
        """Against the oracle that the run of this seed is judged by."""
        number = self.seed % self.experiment.num_oracles
        oracle = Oracle(self.experiment, self.forget_set, number).model(lab)
        model, _ = lab.trained(self.experiment, self.seed)
        return barrier(lab, self.experiment, model, oracle)


@dataclass(frozen=True)
class BarrierBaseline(Unit):
    """The barriers between oracles of one forget set, every pair."""

    experiment: Experiment
    forget_set: ForgetSet

    def needs(self) -> list[Unit]:
        """The oracles."""
        return oracles(self.experiment, self.forget_set)

    def facts(self) -> Facts:
        """Experiment and forget set."""
        forget = self.forget_set.facts(self.experiment)
        return self.experiment.facts() | {"forget": forget}

    def work(self) -> Work:
        """One barrier a pair."""
        return work_of_barrier(self.experiment) * comb(self.experiment.num_oracles, 2)

    def compute(self, lab: Lab) -> list[float]:
        """One number for each pair."""
        models = [one.model(lab) for one in oracles(self.experiment, self.forget_set)]
        pairs = zip(*np.triu_indices(len(models), 1), strict=True)
        return [barrier(lab, self.experiment, models[i], models[j]) for i, j in pairs]
