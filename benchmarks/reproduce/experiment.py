"""What is trained and forgotten: one description, used by every figure.

An ``Experiment`` determines every number of a study. Its fields enter the keys under
which results are stored. ``training_facts``, ``ranking_facts``, ``evaluation_facts``
and ``facts`` return the fields that a model, a ranking, the metrics of a model, or an
unlearning run depend on: a field that does not affect a result must not enter its key,
or the result would be computed again for nothing.
"""

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.common.facts import facts_of
from benchmarks.common.training import Recipe

Facts = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A data set, a recipe to train on it, and the sizes of the study.

    Attributes:
        dataset: A name of ``benchmarks.common.data``, or of an own .npz file.
        num_train: Number of training images; the first ones are used (0: all).
        num_test: Number of test images; the first ones are used (0: all).
        recipe: How the model and its oracles are trained.
        num_seeds: Independent trainings.
        num_oracles: Models retrained without each forget set.
        set_size: Examples in a forget set.
        num_sets: Forget sets along the range of difficulty, without common examples.
        unlearn_epochs: Epochs of every unlearning run.
        assumed_noise_std: Noise on the mean gradient, assumed to rank the examples if
            the recipe trains without noise.
        order: Renyi order of the privacy losses.
        num_checkpoints: Rows of the ledger.
        num_trials: Settings that the search tries for each method.
        num_probe: Retained examples on which accuracy and loss are measured.
    """

    dataset: str
    num_train: int
    num_test: int
    recipe: Recipe
    num_seeds: int = 5
    num_oracles: int = 3
    set_size: int = 200
    num_sets: int = 20
    unlearn_epochs: int = 25
    assumed_noise_std: float = 0.01
    order: float = 8.0
    num_checkpoints: int = 35
    num_trials: int = 25
    num_probe: int = 2_000

    def training_facts(self) -> Facts:
        """What determines a trained model, except seed and examples left out."""
        return {
            "dataset": self.dataset,
            "num_train": self.num_train,
            "recipe": self.recipe.key(),
        }

    def ranking_facts(self) -> Facts:
        """What determines the difficulty scores of the examples."""
        return self.training_facts() | {
            "num_seeds": self.num_seeds,
            "num_checkpoints": self.num_checkpoints,
            "assumed_noise_std": self.assumed_noise_std,
            "order": self.order,
        }

    def evaluation_facts(self) -> Facts:
        """What determines the metrics of a model, except seed and forget set."""
        sizes = {"num_test": self.num_test, "num_probe": self.num_probe}
        return self.training_facts() | sizes

    def facts(self) -> Facts:
        """All fields: what determines an unlearning run."""
        return facts_of(self)

    def with_noise(self, noise_std: float) -> "Experiment":
        """Return a copy that trains by SGLD with this noise on the mean gradient."""
        return replace(self, recipe=replace(self.recipe, noise_std=noise_std))
