"""The independent jobs of a study; each is run once and its result is stored.

A unit is a small frozen dataclass: it can be sent to any process, and equal units are
one job. ``run(workspace)`` returns its JSON result, from the store if it is there.
``needs()`` lists the units that must be finished before. A shared training is such a
need: without it, two processes would train the same model at the same time.

The name of a unit's class is part of its key in the store. A renamed class loses all
stored results of its kind.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from benchmarks.reproduce.experiment import Experiment, Facts
from benchmarks.reproduce.forget_sets import ForgetSet
from benchmarks.reproduce.methods import METHODS
from benchmarks.reproduce.store import cached_json
from benchmarks.reproduce.unlearning_runs import CRITERION, judge, unlearn
from benchmarks.reproduce.workspace import Workspace, scores_of
from opacus_pi.difficulty.agreement import rank_correlations, rank_stability
from opacus_pi.evaluation import OracleCache, evaluate
from opacus_pi.unlearning.search import search_settings

LOSS = "privacy loss"
_ORACLE_SEED = 10_000


class Unit:
    """One job."""

    def needs(self) -> list["Unit"]:
        """What must be there before."""
        return []

    def facts(self) -> Facts:
        """Everything that determines the result."""
        raise NotImplementedError

    def compute(self, workspace: Workspace) -> Any:
        """Do it."""
        raise NotImplementedError

    def run(self, workspace: Workspace) -> Any:
        """The result, JSON-able."""
        torch.set_num_threads(1)
        kind = type(self).__name__.lower()
        return cached_json(
            workspace.directory, kind, self.facts(), lambda: self.compute(workspace)
        )


@dataclass(frozen=True)
class Training(Unit):
    """One training on everything: how good it is."""

    experiment: Experiment
    seed: int

    def facts(self) -> Facts:
        """Recipe and seed."""
        return self.experiment.facts() | {"seed": self.seed}

    def compute(self, workspace: Workspace) -> dict[str, float]:
        """Train, and test."""
        model, _ = workspace.trained(self.experiment, self.seed)
        images = workspace.images(self.experiment)
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

    def model(self, workspace: Workspace) -> nn.Module:
        """The retrained model, from the store if it is there."""
        experiment, images = self.experiment, workspace.images(self.experiment)

        def retrain(kept: np.ndarray, seed: int) -> nn.Module:
            return workspace.train(experiment, Subset(images.train, kept), seed, 1)[0]

        (model,) = OracleCache(workspace.directory / "oracles").train(
            retrain,
            key=experiment.training_facts(),
            data_set=images.train,
            forget_indices=self.forget_set.indices(workspace, experiment),
            seeds=[_ORACLE_SEED + self.number],
            model_factory=lambda: workspace.fresh_model(experiment),
            progress=False,
        )
        return model

    def compute(self, workspace: Workspace) -> dict[str, float]:
        """Retrain and evaluate."""
        return judge(workspace, self.experiment, self.forget_set)(self.model(workspace))


def oracles(experiment: Experiment, forget_set: ForgetSet) -> list[Oracle]:
    """All oracles of a forget set."""
    return [Oracle(experiment, forget_set, k) for k in range(experiment.num_oracles)]


def trainings(experiment: Experiment) -> list[Training]:
    """The trainings of all seeds, whose mean loss ranks the examples."""
    return [Training(experiment, seed) for seed in range(experiment.num_seeds)]


def needs_of_judging(experiment: Experiment, forget_set: ForgetSet) -> list[Unit]:
    """The trainings that rank, and the oracles of a set."""
    return [*trainings(experiment), *oracles(experiment, forget_set)]


@dataclass(frozen=True)
class Search(Unit):
    """Settings of a method, found once on a random forget set (Appendix D)."""

    experiment: Experiment
    method: str

    @property
    def forget_set(self) -> ForgetSet:
        """Random, of the size of a stratum."""
        return ForgetSet("random", self.experiment.stratum_size)

    def needs(self) -> list[Unit]:
        """The model to unlearn and its oracles."""
        training = Training(self.experiment, 0)
        return [training, *oracles(self.experiment, self.forget_set)]

    def facts(self) -> Facts:
        """Experiment, method and ranges."""
        ranges = METHODS[self.method].ranges
        return self.experiment.facts() | {"method": self.method, "ranges": ranges}

    def compute(self, workspace: Workspace) -> dict[str, Any]:
        """Search; nothing where nothing is to be found."""
        ranges = METHODS[self.method].ranges
        if not ranges:
            return {"settings": {}, "trials": []}
        measured = [
            one.run(workspace) for one in oracles(self.experiment, self.forget_set)
        ]
        found = search_settings(
            lambda settings: unlearn(
                workspace, self.experiment, self.forget_set, self.method, settings, 0
            )[1],
            ranges,
            {name: [one[name] for one in measured] for name in measured[0]},
            num_trials=self.experiment.num_trials,
        )
        trials = [asdict(trial) for trial in found.trials]
        return {"settings": found.best.settings, "trials": trials}


def needs_of_run(
    experiment: Experiment, forget_set: ForgetSet, method: str
) -> list[Unit]:
    """The trainings that rank, the oracles and the settings of a run of a method."""
    return [*needs_of_judging(experiment, forget_set), Search(experiment, method)]


def run_facts(
    experiment: Experiment, forget_set: ForgetSet, method: str, seed: int
) -> Facts:
    """What determines the run of a method."""
    own = {"forget": forget_set.facts(experiment), "seed": seed}
    return Search(experiment, method).facts() | own


@dataclass(frozen=True)
class Unlearning(Unit):
    """One unlearning run from one trained model, evaluated after every epoch."""

    experiment: Experiment
    forget_set: ForgetSet
    method: str
    seed: int

    def needs(self) -> list[Unit]:
        """Trainings, oracles, settings."""
        return needs_of_run(self.experiment, self.forget_set, self.method)

    def facts(self) -> Facts:
        """Experiment, forget set, method, seed."""
        return run_facts(self.experiment, self.forget_set, self.method, self.seed)

    def compute(self, workspace: Workspace) -> dict[str, Any]:
        """Unlearn; evaluate."""
        experiment, forget_set = self.experiment, self.forget_set
        settings = Search(experiment, self.method).run(workspace)["settings"]
        _, trace = unlearn(
            workspace, experiment, forget_set, self.method, settings, self.seed
        )
        losses = workspace.scores(experiment)["privacy loss"]
        return {
            "trace": trace.metrics,
            "times": trace.times,
            "cost": trace.cost,
            "settings": settings,
            "mean_loss": float(
                losses[forget_set.indices(workspace, experiment)].mean()
            ),
        }


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

    def compute(self, workspace: Workspace) -> dict[str, Any]:
        """Unlearn; evaluate."""
        _, trace = unlearn(
            workspace,
            self.experiment,
            self.forget_set,
            "fine-tune",
            {"learning_rate": self.learning_rate},
            self.seed,
        )
        return {"trace": trace.metrics, "times": trace.times}


@dataclass(frozen=True)
class ProxyRanks(Unit):
    """Spearman's rho of every proxy with the privacy loss, over all examples."""

    experiment: Experiment
    seed: int

    def needs(self) -> list[Unit]:
        """The training."""
        return [Training(self.experiment, self.seed)]

    def facts(self) -> Facts:
        """What determines the scores, and the seed."""
        return self.experiment.ranking_facts() | {"seed": self.seed}

    def compute(self, workspace: Workspace) -> dict[str, float]:
        """By name of the proxy."""
        ledger = workspace.ledger(self.experiment, self.seed)
        scores = scores_of([ledger], self.experiment.order)
        ranks = rank_correlations(scores)
        return {n: float(ranks.between(n, LOSS)[0]) for n in scores if n != LOSS}


@dataclass(frozen=True)
class NoiseRanks(Unit):
    """Spearman's rho between privacy losses at several noises of one ledger."""

    experiment: Experiment
    seed: int
    noise_stds: tuple[float, ...]  # on the sum of the gradients

    def needs(self) -> list[Unit]:
        """The training."""
        return [Training(self.experiment, self.seed)]

    def facts(self) -> Facts:
        """What determines the losses, the noises and the seed."""
        own = {"seed": self.seed, "noise_stds": list(self.noise_stds)}
        return self.experiment.ranking_facts() | own

    def compute(self, workspace: Workspace) -> list[list[float]]:
        """The matrix."""
        ledger, order = (
            workspace.ledger(self.experiment, self.seed),
            self.experiment.order,
        )
        return rank_stability(ledger, self.noise_stds, order).rho.tolist()
