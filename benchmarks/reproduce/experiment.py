"""What is trained and forgotten: one description, used by every figure."""

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.common.facts import facts_of
from benchmarks.common.training import Recipe

Facts = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """One data set, one way of training on it, and the sizes of the study.

    Attributes:
        dataset: A name of ``benchmarks.common.data``.
        num_train: Training images, the first so many (0: all).
        num_test: Test images, the first so many (0: all).
        recipe: How the model and its oracles are trained.
        num_seeds: Independent trainings.
        num_oracles: Retrained models for each forget set.
        stratum_size: Examples in a forget set.
        unlearn_epochs: Epochs of every unlearning run.
        assumed_noise_std: Noise on the mean gradient that ranks the examples of a
            training without noise.
        order: Renyi order of the privacy losses.
        num_checkpoints: Rows of the ledger.
        num_trials: Settings tried for each method.
        num_probe: Retained examples on which accuracy and loss are taken.
    """

    dataset: str
    num_train: int
    num_test: int
    recipe: Recipe
    num_seeds: int = 5
    num_oracles: int = 3
    stratum_size: int = 200
    unlearn_epochs: int = 25
    assumed_noise_std: float = 0.01
    order: float = 8.0
    num_checkpoints: int = 35
    num_trials: int = 10
    num_probe: int = 2_000

    def training_facts(self) -> Facts:
        """What determines a training but its seed and the examples left out."""
        return {
            "dataset": self.dataset,
            "num_train": self.num_train,
            "recipe": self.recipe.key(),
        }

    def ranking_facts(self) -> Facts:
        """What determines the scores of the examples."""
        return self.training_facts() | {
            "num_seeds": self.num_seeds,
            "num_checkpoints": self.num_checkpoints,
            "assumed_noise_std": self.assumed_noise_std,
            "order": self.order,
        }

    def facts(self) -> Facts:
        """Everything."""
        return facts_of(self)

    def with_noise(self, noise_std: float) -> "Experiment":
        """The same with SGLD: this noise on the mean gradient, all else as it was."""
        return replace(self, recipe=replace(self.recipe, noise_std=noise_std))
