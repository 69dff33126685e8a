"""Jobs that measure loss barriers between models, modulo permutation.

Two training runs place corresponding hidden units at different positions. The second
model's units are therefore matched to the first's (weight matching). The running
statistics of BatchNorm are recomputed at every point of the line. Without matching, the
barrier between any two models is about the same and says nothing about what was
forgotten.
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
    needs_of_comparison,
    needs_of_run,
    oracles,
    run_facts,
)
from benchmarks.reproduce.unlearning_runs import CRITERION, retained_sample, unlearn
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.evaluation import aligned, loss_barrier, permutation_spec
from opacus_pi.models.no_trace import random_state_untouched
from opacus_pi.symmetries.permutations import PermutationSpec

POINTS = 11  # number of points on the line between two models
SETS = ("training images", "test images")  # on which the loss is measured
Barriers = dict[str, float]
_MATCHING = {"modulo": "permutation"}


def barriers(
    workspace: Workspace, experiment: Experiment, model: nn.Module, other: nn.Module
) -> Barriers:
    """Return the barrier between two models on a fixed part of each of ``SETS``."""
    images = workspace.images(experiment)
    spec = _spec(experiment.recipe.model, images.image_shape, images.num_classes)
    matched = aligned(model, other, spec)
    return {
        name: loss_barrier(
            model, matched, part, CRITERION, num_points=POINTS, reset_bn=True
        )
        for name, part in _parts(workspace, experiment).items()
    }


def _parts(workspace: Workspace, experiment: Experiment) -> dict[str, Dataset]:
    """Return the examples for the losses, the same for every pair of models."""
    images, size = workspace.images(experiment), experiment.num_probe
    train = retained_sample(images, np.empty(0, dtype=np.int64), size).tolist()
    test = range(min(size, len(images.test)))
    parts = Subset(images.train, train), Subset(images.test, test)
    return dict(zip(SETS, parts, strict=True))


@lru_cache(maxsize=4)
def _spec(model: str, shape: tuple[int, ...], num_classes: int) -> PermutationSpec:
    """Return the permutation symmetries of an architecture, whatever its weights."""
    with random_state_untouched():
        torch.manual_seed(0)
        return permutation_spec(
            build_model(model, shape, num_classes), torch.rand(2, *shape)
        )


def oracles_of_seed(
    experiment: Experiment, forget_set: ForgetSet, seed: int
) -> list[Oracle]:
    """Return the oracles that a seed's model is compared with.

    With at least one oracle per seed, each seed gets its own, and the seeds are
    independent. With fewer, every seed is compared with all of them.
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
    """Return the barriers between a model and each oracle of its seed."""
    return [
        barriers(workspace, experiment, model, oracle.model(workspace))
        for oracle in oracles_of_seed(experiment, forget_set, seed)
    ]


@dataclass(frozen=True)
class BarrierBefore(Unit):
    """Measure the barriers between a trained model and its oracles."""

    experiment: Experiment
    forget_set: ForgetSet
    seed: int

    def needs(self) -> list[Unit]:
        """Return trainings and oracles."""
        return needs_of_comparison(self.experiment, self.forget_set)

    def facts(self) -> Facts:
        """Return experiment, forget set, seed and kind of matching."""
        forget = self.forget_set.facts(self.experiment)
        own = {"forget": forget, "seed": self.seed}
        return self.experiment.facts() | own | _MATCHING

    def compute(self, workspace: Workspace) -> list[Barriers]:
        """Return the barriers before unlearning, one dict per oracle."""
        model, _ = workspace.trained(self.experiment, self.seed)
        return to_oracles(workspace, self.experiment, self.forget_set, self.seed, model)


@dataclass(frozen=True)
class BarrierAfter(Unit):
    """Measure the barriers between an unlearned model and its oracles."""

    experiment: Experiment
    forget_set: ForgetSet
    method: str
    seed: int

    def needs(self) -> list[Unit]:
        """Return those of the unlearning run."""
        return needs_of_run(self.experiment, self.forget_set, self.method)

    def facts(self) -> Facts:
        """Return those of the unlearning run, and the kind of matching."""
        own = run_facts(self.experiment, self.forget_set, self.method, self.seed)
        return own | _MATCHING

    def compute(self, workspace: Workspace) -> list[Barriers]:
        """Return the barriers after unlearning, one dict per oracle.

        Unlearned models are not stored, so the run is repeated with its seed.
        """
        settings = Search(self.experiment, self.method).run(workspace)["settings"]
        where = workspace, self.experiment, self.forget_set
        model, _ = unlearn(*where, self.method, settings, self.seed, evaluated=False)
        return to_oracles(*where, self.seed, model)


@dataclass(frozen=True)
class BarrierBaseline(Unit):
    """Measure the barriers between all pairs of oracles of one forget set."""

    experiment: Experiment
    forget_set: ForgetSet

    def needs(self) -> list[Unit]:
        """Return the oracles."""
        return oracles(self.experiment, self.forget_set)

    def facts(self) -> Facts:
        """Return experiment, forget set and kind of matching."""
        forget = self.forget_set.facts(self.experiment)
        return self.experiment.facts() | {"forget": forget} | _MATCHING

    def compute(self, workspace: Workspace) -> list[Barriers]:
        """Return one dict per pair."""
        models = [
            one.model(workspace) for one in oracles(self.experiment, self.forget_set)
        ]
        pairs = combinations(models, 2)
        return [barriers(workspace, self.experiment, *pair) for pair in pairs]
