"""The unlearning methods under study, and what is searched for each of them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.reproduce.experiment import Experiment
from opacus_pi import FineTune, L1Sparse, Langevin
from opacus_pi.unlearning import Method
from opacus_pi.unlearning.rivals import (
    SCRUB,
    SSD,
    NegGradPlus,
    RandomLabels,
    SalUn,
)

Settings = dict[str, float]
_RATES = {"learning_rate": (1e-3, 1e-1)}


@dataclass(frozen=True)
class Candidate:
    """How a method is built from its settings.

    Attributes:
        build: ``(settings, experiment) -> method``.
        ranges: Lowest and highest value of each setting that is searched, on a
            logarithmic scale; empty: the settings of training are kept.
    """

    build: Callable[[Settings, Experiment], Method]
    ranges: dict[str, tuple[float, float]] = field(default_factory=lambda: _RATES)


def _langevin(settings: Settings, experiment: Experiment) -> Method:
    recipe = experiment.recipe
    return Langevin(recipe.noise_std or experiment.assumed_noise_std)


METHODS = {
    "fine-tune": Candidate(lambda s, e: FineTune()),
    "Langevin": Candidate(_langevin),
    "SGLD": Candidate(_langevin, {}),
    "L1-sparse": Candidate(
        lambda s, e: L1Sparse(s["strength"]), _RATES | {"strength": (1e-6, 1e-3)}
    ),
    "random labels": Candidate(lambda s, e: RandomLabels()),
    "NegGrad+": Candidate(lambda s, e: NegGradPlus()),
    "SCRUB": Candidate(lambda s, e: SCRUB()),
    "SalUn": Candidate(lambda s, e: SalUn()),
    "SSD": Candidate(
        lambda s, e: SSD(s["selection_weight"], s["dampening"]),
        {"selection_weight": (1.0, 100.0), "dampening": (0.05, 2.0)},
    ),
}


def optimizer_of(
    settings: Settings, experiment: Experiment
) -> Callable[[list], torch.optim.Optimizer]:
    """SGD with the settings' learning rate, or the training's own optimizer."""
    if "learning_rate" not in settings:
        return experiment.recipe.optimizer
    return lambda params: torch.optim.SGD(
        params, lr=settings["learning_rate"], momentum=0.9
    )
