"""The independent jobs of a study; each is run once and kept.

A unit is frozen and small, so that it can be sent to any process; ``run(lab)`` returns
its JSON result, from the store if it is there. ``needs()`` are the units that others
share with it and that are run before, so that no two processes train one model.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from benchmarks.reproduce.experiment import Experiment, Facts
from benchmarks.reproduce.forget import ForgetSet
from benchmarks.reproduce.judging import CRITERION, judge
from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.store import cached_json
from benchmarks.reproduce.work import Work
from opacus_pi.evaluation import OracleCache, evaluate

_ORACLE_SEED = 10_000


class Unit:
    """One job."""

    def needs(self) -> list["Unit"]:
        """What must be there before."""
        return []

    def facts(self) -> Facts:
        """Everything that determines the result."""
        raise NotImplementedError

    def compute(self, lab: Lab) -> Any:
        """Do it."""
        raise NotImplementedError

    def work(self) -> Work:
        """How much that is, what it needs not counted; nothing for a GPU by default."""
        return Work()

    def run(self, lab: Lab) -> Any:
        """The result, JSON-able."""
        torch.set_num_threads(1)
        kind = type(self).__name__.lower()
        return cached_json(lab.directory, kind, self.facts(), lambda: self.compute(lab))


@dataclass(frozen=True)
class Training(Unit):
    """One training on everything: how good it is."""

    experiment: Experiment
    seed: int

    def facts(self) -> Facts:
        """Recipe and seed."""
        return self.experiment.facts() | {"seed": self.seed}

    def work(self) -> Work:
        """Its epochs, the rows of its ledger, and an evaluation."""
        num_train, num_test = self.experiment.sizes
        rows = 0 if self.experiment.is_private else self.experiment.num_checkpoints
        return Work(
            trained=self.experiment.recipe.num_epochs * num_train,
            swept=rows * num_train,
            evaluated=num_train + 2 * num_test,
        )

    def compute(self, lab: Lab) -> dict[str, float]:
        """Train, and test."""
        model, _ = lab.trained(self.experiment, self.seed)
        images = lab.images(self.experiment)
        parts = {"forget": images.test, "retain": images.train, "test": images.test}
        found = evaluate(model, CRITERION, **parts)
        return {name: found[name] for name in ("retain_accuracy", "test_accuracy")}


@dataclass(frozen=True)
class Oracle(Unit):
    """One model retrained without a forget set, evaluated."""

    experiment: Experiment
    forget_set: ForgetSet
    number: int

    def needs(self) -> list[Unit]:
        """The trainings that rank the examples."""
        ranked = self.forget_set.rule != "random"
        return trainings(self.experiment) if ranked else []

    def facts(self) -> Facts:
        """Recipe, forget set and seed."""
        forget = self.forget_set.facts(self.experiment)
        return self.experiment.facts() | {"forget": forget, "number": self.number}

    def work(self) -> Work:
        """Its epochs, the one row of its ledger, and an evaluation."""
        kept = self.experiment.sizes[0] - self.forget_set.size
        return Work(
            trained=self.experiment.recipe.num_epochs * kept,
            swept=0 if self.experiment.is_private else kept,
            evaluated=self.forget_set.judged(self.experiment),
        )

    def model(self, lab: Lab) -> nn.Module:
        """The retrained model, from the store if it is there."""
        experiment, images = self.experiment, lab.images(self.experiment)

        def retrain(kept: np.ndarray, seed: int) -> nn.Module:
            return lab.train(experiment, Subset(images.train, kept), seed, 1)[0]

        (model,) = OracleCache(lab.directory / "oracles").train(
            retrain,
            key=experiment.training_facts(),
            data_set=images.train,
            forget_indices=self.forget_set.indices(lab, experiment),
            seeds=[_ORACLE_SEED + self.number],
            model_factory=lambda: lab.fresh_model(experiment),
            progress=False,
        )
        return model

    def compute(self, lab: Lab) -> dict[str, float]:
        """Retrain and evaluate."""
        return judge(lab, self.experiment, self.forget_set)(self.model(lab))


def oracles(experiment: Experiment, forget_set: ForgetSet) -> list[Oracle]:
    """All oracles of a forget set."""
    return [Oracle(experiment, forget_set, k) for k in range(experiment.num_oracles)]


def trainings(experiment: Experiment) -> list[Training]:
    """The trainings of all seeds, whose mean loss ranks the examples."""
    return [Training(experiment, seed) for seed in range(experiment.num_seeds)]


def needs_of_judging(experiment: Experiment, forget_set: ForgetSet) -> list[Unit]:
    """The trainings that rank, and the oracles of a set."""
    return [*trainings(experiment), *oracles(experiment, forget_set)]
