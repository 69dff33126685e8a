"""The independent jobs of a study; each is run once and its result is stored.

A unit is a small frozen dataclass: it can be sent to any process, and equal units are
one job. ``run(workspace)`` returns its JSON result, from the store if it is there.
``needs()`` lists the units that must be finished before. A shared training is such a
need: without it, two processes would train the same model at the same time.

The name of a unit's class is part of its key in the store. A renamed class loses all
stored results of its kind.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from benchmarks.common.own import source_digest
from benchmarks.reproduce.experiment import Experiment, Facts
from benchmarks.reproduce.forget_sets import LOSS, ForgetSet, apart
from benchmarks.reproduce.methods import candidate
from benchmarks.reproduce.store import cached_json, seconds_of
from benchmarks.reproduce.unlearning_runs import CRITERION, evaluator, unlearn
from benchmarks.reproduce.workspace import Workspace, scores_of
from opacus_pi.difficulty.agreement import rank_correlations, rank_stability
from opacus_pi.evaluation import OracleCache, evaluate
from opacus_pi.unlearning.search import search_settings

# metrics that settings must not lower on the way: a run that damages what is retained
# and repairs it later is fast, and no unlearning
HELD = ("retain_accuracy",)


class Unit:
    """One independent job with a stored result."""

    def needs(self) -> list["Unit"]:
        """Return the units that must be finished before this one runs."""
        return []

    def facts(self) -> Facts:
        """Return everything that determines the result, as JSON."""
        raise NotImplementedError

    def compute(self, workspace: Workspace) -> Any:
        """Compute the result; it must be JSON-able."""
        raise NotImplementedError

    def run(self, workspace: Workspace) -> Any:
        """Return the result, from the store if it is there."""
        torch.set_num_threads(1)
        facts = self.facts_in(workspace)
        return cached_json(
            workspace.directory, self.kind(), facts, lambda: self.compute(workspace)
        )

    def kind(self) -> str:
        """Return the kind of job, a subfolder of the store."""
        return type(self).__name__.lower()

    def facts_in(self, workspace: Workspace) -> Facts:
        """Return the facts, with digests of the data set and of an own model."""
        experiment = getattr(self, "experiment", None)
        if experiment is None:
            return self.facts()
        return self.facts() | workspace.content_facts(experiment)

    def seconds(self, workspace: Workspace) -> float | None:
        """Return how long the job took; None if its result is not in the store."""
        return seconds_of(workspace.directory, self.kind(), self.facts_in(workspace))


@dataclass(frozen=True)
class Training(Unit):
    """Train on all examples and measure the accuracy of the model."""

    experiment: Experiment
    seed: int

    def facts(self) -> Facts:
        """Return training, evaluation, rows of the ledger, and seed."""
        own = {"seed": self.seed, "num_checkpoints": self.experiment.num_checkpoints}
        return self.experiment.evaluation_facts() | own

    def compute(self, workspace: Workspace) -> dict[str, float]:
        """Return the accuracies on training and test images."""
        model, _ = workspace.trained(self.experiment, self.seed)
        images = workspace.images(self.experiment)
        parts = {"forget": images.test, "retain": images.train, "test": images.test}
        found = evaluate(model, CRITERION, **parts)
        return {name: found[name] for name in ("retain_accuracy", "test_accuracy")}


@dataclass(frozen=True)
class Oracle(Unit):
    """Retrain one model without a forget set and evaluate it."""

    experiment: Experiment
    forget_set: ForgetSet
    number: int

    def needs(self) -> list[Unit]:
        """Return the trainings that rank the examples."""
        return list(trainings(self.experiment))

    def facts(self) -> Facts:
        """Return training, evaluation, forget set and number of the oracle."""
        forget = self.forget_set.facts(self.experiment)
        own = {"forget": forget, "number": self.number}
        return self.experiment.evaluation_facts() | own

    def model(self, workspace: Workspace) -> nn.Module:
        """Return the retrained model, from the store if it is there."""
        experiment, images = self.experiment, workspace.images(self.experiment)

        def retrain(kept: np.ndarray, seed: int) -> nn.Module:
            return workspace.train(experiment, Subset(images.train, kept), seed, 1)[0]

        forget = self.forget_set.indices(workspace, experiment)
        (model,) = OracleCache(workspace.directory / "oracles").train(
            retrain,
            key=experiment.training_facts() | workspace.content_facts(experiment),
            data_set=images.train,
            forget_indices=forget,
            seeds=[oracle_seed(forget, self.number)],
            model_factory=lambda: workspace.fresh_model(experiment),
            progress=False,
        )
        return model

    def compute(self, workspace: Workspace) -> dict[str, float]:
        """Return the metrics of the retrained model."""
        self.forget_set.mean_loss(workspace, self.experiment)  # stored for later
        return evaluator(workspace, self.experiment, self.forget_set)(
            self.model(workspace)
        )


def oracle_seed(forget: Sequence[int] | np.ndarray, number: int) -> int:
    """Return the seed of a retrained model, another one for each forget set.

    What is peculiar to one seed would otherwise act on all sets alike, and a test over
    sets could take it for an effect of their difficulty.

    Args:
        forget: The forget set.
        number: Which of its retrained models.
    """
    entropy = [number, *sorted(int(index) for index in forget)]
    words = np.random.SeedSequence(entropy).generate_state(1)
    return int(words[0]) // 2  # seeds of torch are int64


def oracles(experiment: Experiment, forget_set: ForgetSet) -> list[Oracle]:
    """Return all oracles of a forget set."""
    return [Oracle(experiment, forget_set, k) for k in range(experiment.num_oracles)]


def trainings(experiment: Experiment) -> list[Training]:
    """Return the trainings of all seeds; their mean loss ranks the examples."""
    return [Training(experiment, seed) for seed in range(experiment.num_seeds)]


def needs_of_comparison(experiment: Experiment, forget_set: ForgetSet) -> list[Unit]:
    """Return what a comparison with oracles needs: the trainings and the oracles."""
    return [*trainings(experiment), *oracles(experiment, forget_set)]


@dataclass(frozen=True)
class Search(Unit):
    """Search the settings of a method on one forget set of its own (Appendix D).

    The set consists of hard examples, so that there is something to forget, and none of
    them belongs to a set under study: no method is tuned to those.
    """

    experiment: Experiment
    method: str

    @property
    def forget_set(self) -> ForgetSet:
        """The set of the search."""
        return apart(self.experiment)

    def needs(self) -> list[Unit]:
        """Return trainings and oracles to compare with; nothing without ranges."""
        if not candidate(self.method).ranges:
            return []
        return needs_of_comparison(self.experiment, self.forget_set)

    def facts(self) -> Facts:
        """Return experiment, method (with the file of an own one), searched ranges."""
        ranges = candidate(self.method).ranges
        found = self.experiment.facts() | {"method": self.method, "ranges": ranges}
        found |= {"held": list(HELD)} if ranges else {}
        source = source_digest(self.method)
        return found | ({"method source": source} if source else {})

    def compute(self, workspace: Workspace) -> dict[str, Any]:
        """Return the best settings and all trials; empty if nothing is searched.

        ``informative`` is false if no trial closed more of the gap than noise explains.
        """
        ranges = candidate(self.method).ranges
        if not ranges:
            return {"settings": {}, "trials": [], "informative": True}
        measured = [
            one.run(workspace) for one in oracles(self.experiment, self.forget_set)
        ]
        found = search_settings(
            lambda settings: unlearn(
                workspace, self.experiment, self.forget_set, self.method, settings, 0
            )[1],
            ranges,
            {name: [one[name] for one in measured] for name in measured[0]},
            held=HELD,
            num_trials=self.experiment.num_trials,
        )
        trials = [asdict(trial) for trial in found.trials]
        return {
            "settings": found.best.settings,
            "trials": trials,
            "informative": found.informative,
            "initial_gap": found.initial_gap,
            "noise": found.noise,
        }


def needs_of_run(
    experiment: Experiment, forget_set: ForgetSet, method: str
) -> list[Unit]:
    """Return what an unlearning run needs: trainings, oracles and settings."""
    return [*needs_of_comparison(experiment, forget_set), Search(experiment, method)]


def run_facts(
    experiment: Experiment, forget_set: ForgetSet, method: str, seed: int
) -> Facts:
    """Return what determines the run of a method."""
    own = {"forget": forget_set.facts(experiment), "seed": seed}
    return Search(experiment, method).facts() | own


@dataclass(frozen=True)
class Unlearning(Unit):
    """Unlearn a forget set from one trained model; evaluate after every epoch."""

    experiment: Experiment
    forget_set: ForgetSet
    method: str
    seed: int

    def needs(self) -> list[Unit]:
        """Return trainings, oracles and the search of settings."""
        return needs_of_run(self.experiment, self.forget_set, self.method)

    def facts(self) -> Facts:
        """Return experiment, forget set, method and seed."""
        return run_facts(self.experiment, self.forget_set, self.method, self.seed)

    def compute(self, workspace: Workspace) -> dict[str, Any]:
        """Return trace, cost, settings, and the mean privacy loss of the set."""
        experiment, forget_set = self.experiment, self.forget_set
        settings = Search(experiment, self.method).run(workspace)["settings"]
        _, trace = unlearn(
            workspace, experiment, forget_set, self.method, settings, self.seed
        )
        return {
            "trace": trace.metrics,
            "times": trace.times,
            "cost": trace.cost,
            "settings": settings,
            "mean_loss": forget_set.mean_loss(workspace, experiment),
        }


@dataclass(frozen=True)
class FineTuned(Unit):
    """Fine-tune at one given learning rate; evaluate after every epoch."""

    experiment: Experiment
    forget_set: ForgetSet
    learning_rate: float
    seed: int

    def needs(self) -> list[Unit]:
        """Return trainings and oracles."""
        return needs_of_comparison(self.experiment, self.forget_set)

    def facts(self) -> Facts:
        """Return experiment, forget set, learning rate and seed."""
        return self.experiment.facts() | {
            "forget": self.forget_set.facts(self.experiment),
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }

    def compute(self, workspace: Workspace) -> dict[str, Any]:
        """Return the trace of the run."""
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
    """Measure Spearman's rho of every proxy with the privacy loss."""

    experiment: Experiment
    seed: int

    def needs(self) -> list[Unit]:
        """Return the training of the seed."""
        return [Training(self.experiment, self.seed)]

    def facts(self) -> Facts:
        """Return what determines the scores, and the seed."""
        return self.experiment.ranking_facts() | {"seed": self.seed}

    def compute(self, workspace: Workspace) -> dict[str, float]:
        """Return rho by name of the proxy."""
        ledger = workspace.ledger(self.experiment, self.seed)
        scores = scores_of([ledger], self.experiment.order)
        ranks = rank_correlations(scores)
        return {n: float(ranks.between(n, LOSS)[0]) for n in scores if n != LOSS}


@dataclass(frozen=True)
class NoiseRanks(Unit):
    """Measure Spearman's rho between losses of one ledger at several noises."""

    experiment: Experiment
    seed: int
    noise_stds: tuple[float, ...]  # of the noise on the sum of the gradients

    def needs(self) -> list[Unit]:
        """Return the training of the seed."""
        return [Training(self.experiment, self.seed)]

    def facts(self) -> Facts:
        """Return what determines the losses, the noises and the seed."""
        own = {"seed": self.seed, "noise_stds": list(self.noise_stds)}
        return self.experiment.ranking_facts() | own

    def compute(self, workspace: Workspace) -> list[list[float]]:
        """Return the correlation matrix, ``[noise][noise]``."""
        ledger, order = (
            workspace.ledger(self.experiment, self.seed),
            self.experiment.order,
        )
        return rank_stability(ledger, self.noise_stds, order).rho.tolist()
