"""Loss barriers between models, modulo permutation: how they are measured.

Hidden units of two trainings stand in another order. The second model's are matched to
the first's (weight matching), and running statistics of BatchNorm are taken anew at
every point of the line. Without the matching a barrier between any two models is about
the same, and says nothing of what was forgotten.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from benchmarks.common.models import build_model
from benchmarks.reproduce.experiment import Experiment, Facts
from benchmarks.reproduce.forget_sets import ForgetSet
from benchmarks.reproduce.units import (
    Oracle,
    Search,
    Unit,
    needs_of_judging,
    needs_of_run,
    oracles,
    run_facts,
)
from benchmarks.reproduce.unlearning_runs import CRITERION, probe, unlearn
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.evaluation import aligned, loss_barrier, permutation_spec
from opacus_pi.models.no_trace import random_state_untouched
from opacus_pi.symmetries.permutations import PermutationSpec

POINTS = 11  # on the line between two models
SETS = ("training images", "test images")  # on which the loss is taken
Barriers = dict[str, float]
_HOW = {"modulo": "permutation"}


def barriers(
    workspace: Workspace, experiment: Experiment, model: nn.Module, other: nn.Module
) -> Barriers:
    """The barrier between two models on a fixed part of each of ``SETS``."""
    shape = workspace.images(experiment).image_shape
    matched = aligned(model, other, _spec(experiment.recipe.model, shape))
    return {
        name: loss_barrier(
            model, matched, part, CRITERION, num_points=POINTS, reset_bn=True
        )
        for name, part in _parts(workspace, experiment).items()
    }


def _parts(workspace: Workspace, experiment: Experiment) -> dict[str, Dataset]:
    """The examples on which losses are taken, the same for every pair of models."""
    images, size = workspace.images(experiment), experiment.num_probe
    train = probe(images, np.empty(0, dtype=np.int64), size).tolist()
    test = range(min(size, len(images.test)))
    parts = Subset(images.train, train), Subset(images.test, test)
    return dict(zip(SETS, parts, strict=True))


@lru_cache(maxsize=4)
def _spec(model: str, shape: tuple[int, ...]) -> PermutationSpec:
    """The symmetries of an architecture; its weights do not matter."""
    with random_state_untouched():
        torch.manual_seed(0)
        return permutation_spec(build_model(model, shape), torch.rand(2, *shape))


def opposite(experiment: Experiment, forget_set: ForgetSet, seed: int) -> list[Oracle]:
    """The oracles that a seed's model meets: its own, or all if they are too few.

    So no two seeds share an oracle unless every seed meets the same ones.
    """
    found = oracles(experiment, forget_set)
    return found if len(found) < experiment.num_seeds else [found[seed]]


def to_oracles(
    workspace: Workspace,
    experiment: Experiment,
    forget_set: ForgetSet,
    seed: int,
    model: nn.Module,
) -> list[Barriers]:
    """Barriers between a model and each oracle that its seed meets."""
    return [
        barriers(workspace, experiment, model, oracle.model(workspace))
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

    def compute(self, workspace: Workspace) -> list[Barriers]:
        """Before anything is unlearned."""
        model, _ = workspace.trained(self.experiment, self.seed)
        return to_oracles(workspace, self.experiment, self.forget_set, self.seed, model)


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

    def compute(self, workspace: Workspace) -> list[Barriers]:
        """Unlearn as the run did, to have its model; no model of a run is kept."""
        settings = Search(self.experiment, self.method).run(workspace)["settings"]
        where = workspace, self.experiment, self.forget_set
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

    def compute(self, workspace: Workspace) -> list[Barriers]:
        """One for each pair."""
        models = [
            one.model(workspace) for one in oracles(self.experiment, self.forget_set)
        ]
        pairs = combinations(models, 2)
        return [barriers(workspace, self.experiment, *pair) for pair in pairs]
