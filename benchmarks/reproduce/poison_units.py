"""Jobs for the Gaussian unlearning score: train on noisy inputs, unlearn, score.

The score correlates a model's input gradients with the noise that was added to the
forget set before training. A model that has forgotten the set shows no correlation.
"""

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
    """Train with noise on the inputs of a forget set, then unlearn the set.

    The score is measured after every epoch, and on each oracle. Oracles are trained
    without the set, so they never saw the noise.
    """

    noise_std: float

    def facts(self) -> Facts:
        """Return the facts of an unlearning run, and the noise."""
        return super().facts() | {"noise_std": self.noise_std}

    def compute(self, workspace: Workspace) -> dict[str, Any]:
        """Return the trace of scores, and the scores of the oracles."""
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
        retrained = [
            one.model(workspace) for one in oracles(experiment, self.forget_set)
        ]
        return {
            "times": trace.times,
            "trace": trace.metrics,
            "oracle": {GUS: [score(oracle)[GUS] for oracle in retrained]},
        }

    def _poison(self, workspace: Workspace) -> GaussianPoison:
        """Return the noisy data set of this seed."""
        return GaussianPoison(
            workspace.images(self.experiment).train,
            self.forget_set.indices(workspace, self.experiment),
            self.noise_std,
            torch.Generator().manual_seed(self.seed),
        )


def _materialised(images: ImageData, poison: GaussianPoison) -> TensorDataset:
    """Return the noisy data set as tensors: faster than adding noise at each access."""
    inputs, labels = images.train.tensors
    inputs = inputs.clone()
    inputs[torch.from_numpy(poison.forget_indices)] += poison.noise
    return TensorDataset(inputs, labels)
