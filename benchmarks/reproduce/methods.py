"""The unlearning methods under study, and the settings searched for each of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.own import METHOD, is_own, own
from benchmarks.common.training import Recipe
from benchmarks.reproduce.experiment import Experiment
from opacus_pi import FineTune, L1Sparse, Langevin
from opacus_pi.unlearning import Method
from opacus_pi.unlearning.methods import Batch, Task
from opacus_pi.unlearning.rivals import (
    SCRUB,
    SSD,
    NegGradPlus,
    RandomLabels,
    SalUn,
)

Settings = dict[str, float]
_RATES = {"learning_rate": (1e-3, 1.0)}


@dataclass(frozen=True)
class Candidate:
    """A method: how it is built from its settings, and their ranges.

    Attributes:
        build: ``(settings, experiment) -> method``.
        ranges: Lowest and highest value of each setting that is searched, on a
            logarithmic scale. If empty, the settings of training are used.
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


def candidate(name: str) -> Candidate:
    """Return the method of a name; of an own one, the learning rate is searched.

    Args:
        name: A key of ``METHODS``, or ``MODULE:NAME``.

    Raises:
        ValueError: An own method cannot be imported.
    """
    if is_own(name):
        method = own("--method", name, METHOD)
        return Candidate(lambda settings, experiment: method)
    return METHODS[name]


def optimizer_of(
    settings: Settings, experiment: Experiment
) -> Callable[[list], torch.optim.Optimizer]:
    """Return a factory: SGD at this learning rate, or training's own optimizer."""
    if "learning_rate" not in settings:
        return experiment.recipe.optimizer
    return lambda params: torch.optim.SGD(
        params, lr=settings["learning_rate"], momentum=0.9
    )


class Autocast:
    """A method that computes its losses in the recipe's precision.

    Everything else is passed on to the wrapped method.

    Args:
        method: The wrapped method.
        recipe: The recipe whose precision is used.
    """

    def __init__(self, method: Method, recipe: Recipe) -> None:
        self.method, self.recipe = method, recipe

    def __getattr__(self, name: str) -> Any:
        """Return the wrapped method's attribute."""
        return getattr(self.method, name)

    def prepare(self, task: Task) -> "Autocast":
        """Prepare the wrapped method; this part always runs in float32."""
        return Autocast(self.method.prepare(task), self.recipe)

    def loss(
        self, task: Task, retain: Batch | None, forget: Batch | None
    ) -> Tensor | None:
        """Return the loss, computed under autocast; backward runs outside of it."""
        device = next(task.model.parameters()).device
        with self.recipe.autocast(device):
            return self.method.loss(task, retain, forget)
