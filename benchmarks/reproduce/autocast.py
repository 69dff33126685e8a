"""Unlearning in the precision of the training."""

from typing import Any

from torch import Tensor

from benchmarks.training import Recipe
from opacus_pi.unlearning import Method
from opacus_pi.unlearning.methods import Batch, Task


class Autocast:
    """A method whose losses are taken in the recipe's precision; else itself.

    Args:
        method: What is run.
        recipe: Whose precision counts.
    """

    def __init__(self, method: Method, recipe: Recipe) -> None:
        self.method, self.recipe = method, recipe

    def __getattr__(self, name: str) -> Any:
        """What is not changed here is the method's."""
        return getattr(self.method, name)

    def prepare(self, task: Task) -> "Autocast":
        """What the method looks at before the first update stays float32."""
        return Autocast(self.method.prepare(task), self.recipe)

    def loss(
        self, task: Task, retain: Batch | None, forget: Batch | None
    ) -> Tensor | None:
        """The method's loss under autocast; the backward pass comes after it."""
        device = next(task.model.parameters()).device
        with self.recipe.autocast(device):
            return self.method.loss(task, retain, forget)
