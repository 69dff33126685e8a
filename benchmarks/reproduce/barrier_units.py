"""Units that measure loss barriers between trained, unlearned and retrained models."""

from dataclasses import dataclass
from itertools import combinations
from math import comb

from torch import nn

from benchmarks.reproduce.barriers import Barriers, barriers, work_of_barriers
from benchmarks.reproduce.experiment import Experiment, Facts
from benchmarks.reproduce.forget import ForgetSet
from benchmarks.reproduce.judging import unlearn
from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.units import Oracle, Unit, needs_of_judging, oracles
from benchmarks.reproduce.unlearning_units import Search, needs_of_run, run_facts
from benchmarks.reproduce.work import Work

_HOW = {"modulo": "permutation"}


def opposite(experiment: Experiment, forget_set: ForgetSet, seed: int) -> list[Oracle]:
    """The oracles that a seed's model meets: its own, or all if they are too few.

    So no two seeds share an oracle unless every seed meets the same ones.
    """
    found = oracles(experiment, forget_set)
    return found if len(found) < experiment.num_seeds else [found[seed]]


def to_oracles(
    lab: Lab, experiment: Experiment, forget_set: ForgetSet, seed: int, model: nn.Module
) -> list[Barriers]:
    """Barriers between a model and each oracle that its seed meets."""
    return [
        barriers(lab, experiment, model, oracle.model(lab))
        for oracle in opposite(experiment, forget_set, seed)
    ]


@dataclass(frozen=True)
class BarrierBefore(Unit):
    """The barriers between a trained model and its oracles."""

    experiment: Experiment
    forget_set: ForgetSet
    seed: int

    def needs(self) -> list[Unit]:
        """Trainings and oracles."""
        return needs_of_judging(self.experiment, self.forget_set)

    def facts(self) -> Facts:
        """Experiment, forget set, seed."""
        forget = self.forget_set.facts(self.experiment)
        own = {"forget": forget, "seed": self.seed}
        return self.experiment.facts() | own | _HOW

    def work(self) -> Work:
        """A barrier an oracle."""
        return _work(self.experiment, self.forget_set, self.seed)

    def compute(self, lab: Lab) -> list[Barriers]:
        """Before anything is unlearned."""
        model, _ = lab.trained(self.experiment, self.seed)
        return to_oracles(lab, self.experiment, self.forget_set, self.seed, model)


@dataclass(frozen=True)
class BarrierAfter(Unit):
    """The barriers between an unlearned model and its oracles."""

    experiment: Experiment
    forget_set: ForgetSet
    method: str
    seed: int

    def needs(self) -> list[Unit]:
        """Those of the run."""
        return needs_of_run(self.experiment, self.forget_set, self.method)

    def facts(self) -> Facts:
        """Those of the run."""
        own = run_facts(self.experiment, self.forget_set, self.method, self.seed)
        return own | _HOW

    def work(self) -> Work:
        """The run once more, unjudged, and a barrier an oracle."""
        kept = self.experiment.sizes[0] - self.forget_set.size
        again = Work(unlearned=self.experiment.unlearn_epochs * kept)
        return again + _work(self.experiment, self.forget_set, self.seed)

    def compute(self, lab: Lab) -> list[Barriers]:
        """Unlearn as the run did, to have its model; no model of a run is kept."""
        settings = Search(self.experiment, self.method).run(lab)["settings"]
        where = lab, self.experiment, self.forget_set
        model, _ = unlearn(*where, self.method, settings, self.seed, judged=False)
        return to_oracles(*where, self.seed, model)


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
        return self.experiment.facts() | {"forget": forget} | _HOW

    def work(self) -> Work:
        """One barrier a pair."""
        pairs = comb(self.experiment.num_oracles, 2)
        return work_of_barriers(self.experiment) * pairs

    def compute(self, lab: Lab) -> list[Barriers]:
        """One for each pair."""
        models = [one.model(lab) for one in oracles(self.experiment, self.forget_set)]
        pairs = combinations(models, 2)
        return [barriers(lab, self.experiment, *pair) for pair in pairs]


def _work(experiment: Experiment, forget_set: ForgetSet, seed: int) -> Work:
    """A barrier for each oracle that a seed meets."""
    number = len(opposite(experiment, forget_set, seed))
    return work_of_barriers(experiment) * number
