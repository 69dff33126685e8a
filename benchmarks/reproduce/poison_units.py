"""Units for the Gaussian unlearning score: train on noisy inputs, unlearn, score."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import TensorDataset

from benchmarks.common.data import ImageData
from benchmarks.reproduce.experiment import Facts
from benchmarks.reproduce.units import Search, Unlearning, oracles
from benchmarks.reproduce.unlearning_runs import CRITERION, unlearner_of
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.evaluation import GaussianPoison, gaussian_unlearning_score

GUS = "gaussian_unlearning_score"


@dataclass(frozen=True)
class Poisoned(Unlearning):
    """One training with noise on the inputs of a forget set, then its unlearning.

    The score is taken after every epoch, and on each oracle, which never saw the noise.
    """

    noise_std: float

    def facts(self) -> Facts:
        """Those of unlearning, and the noise."""
        return super().facts() | {"noise_std": self.noise_std}

    def compute(self, workspace: Workspace) -> dict[str, Any]:
        """Poison, train, unlearn, score."""
        experiment, poison = self.experiment, self._poison(workspace)
        noisy = _materialised(workspace.images(experiment), poison)
        model, engine = workspace.train(experiment, noisy, self.seed, 1)
        settings = Search(experiment, self.method).run(workspace)["settings"]
        inputs, labels = poison.clean()

        def score(net: torch.nn.Module) -> dict[str, float]:
            found = gaussian_unlearning_score(
                net, CRITERION, inputs, labels, poison.noise
            )
            return {GUS: found}

        unlearner = unlearner_of(
            experiment, model, engine.ledger, self.method, settings, self.seed
        )
        trace = unlearner.unlearn(
            noisy,
            poison.forget_indices,
            num_epochs=experiment.unlearn_epochs,
            evaluate=score,
            batch_size=experiment.recipe.batch_size,
        ).trace
        judges = [one.model(workspace) for one in oracles(experiment, self.forget_set)]
        return {
            "times": trace.times,
            "trace": trace.metrics,
            "oracle": {GUS: [score(judge)[GUS] for judge in judges]},
        }

    def _poison(self, workspace: Workspace) -> GaussianPoison:
        """The poisoned data set of this seed."""
        return GaussianPoison(
            workspace.images(self.experiment).train,
            self.forget_set.indices(workspace, self.experiment),
            self.noise_std,
            torch.Generator().manual_seed(self.seed),
        )


def _materialised(images: ImageData, poison: GaussianPoison) -> TensorDataset:
    """The poisoned data set as tensors."""
    inputs, labels = images.train.tensors
    inputs = inputs.clone()
    inputs[torch.from_numpy(poison.forget_indices)] += poison.noise
    return TensorDataset(inputs, labels)
