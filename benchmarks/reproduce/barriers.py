"""Loss barriers between models, modulo permutation: how they are measured.

Hidden units of two trainings stand in another order. The second model's are matched to
the first's (weight matching), and running statistics of BatchNorm are taken anew at
every point of the line. Without the matching a barrier between any two models is about
the same, and says nothing of what was forgotten.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from benchmarks.models import build_model
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.judging import CRITERION, probe
from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.work import Work
from opacus_pi.evaluation import aligned, loss_barrier, permutation_spec
from opacus_pi.models.no_trace import random_state_untouched
from opacus_pi.symmetries.permutations import PermutationSpec

POINTS = 11  # on the line between two models
SETS = ("training images", "test images")  # on which the loss is taken
Barriers = dict[str, float]


def barriers(
    lab: Lab, experiment: Experiment, model: nn.Module, other: nn.Module
) -> Barriers:
    """The barrier between two models on a fixed part of each of ``SETS``."""
    shape = lab.images(experiment).image_shape
    matched = aligned(model, other, _spec(experiment.recipe.model, shape))
    return {
        name: loss_barrier(
            model, matched, part, CRITERION, num_points=POINTS, reset_bn=True
        )
        for name, part in _parts(lab, experiment).items()
    }


def work_of_barriers(experiment: Experiment) -> Work:
    """The examples that one call passes through a model; BatchNorm needs two passes."""
    seen = sum(min(experiment.num_probe, size) for size in experiment.sizes)
    passes = 2 if "batch-norm" in experiment.recipe.model else 1
    return Work(evaluated=passes * POINTS * seen)


def _parts(lab: Lab, experiment: Experiment) -> dict[str, Dataset]:
    """The examples on which losses are taken, the same for every pair of models."""
    images, size = lab.images(experiment), experiment.num_probe
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
