"""Jobs for attacks with many models: the margins of one shadow model in each job.

An attacker compares models that unlearned a forget set with models retrained without
it. Both kinds are trained with seeds of their own, which are not among those that rank
the examples. Only margins are stored, of the forget set and then of the control set;
no model is kept.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Subset

from benchmarks.reproduce.experiment import Experiment, Facts
from benchmarks.reproduce.forget_sets import ForgetSet
from benchmarks.reproduce.units import Search, Unit, oracle_seed, trainings
from benchmarks.reproduce.unlearning_runs import CRITERION, unlearner_of
from benchmarks.reproduce.workspace import Workspace
from opacus_pi.accounting import privacy_losses
from opacus_pi.models.predictions import predict

_FIRST_SEED = 1_000_000  # of shadow models; those of the ranking are counted from 0
_DIGITS = 3  # decimal places of a margin


@dataclass(frozen=True)
class AttackedExamples(Unit):
    """Store classes and privacy losses of the forget set and then of the control set.

    They are stored, so that the figure can be drawn without the trained models.
    """

    experiment: Experiment
    forget_set: ForgetSet
    control: ForgetSet

    def needs(self) -> list[Unit]:
        """Return the trainings that rank the examples."""
        return list(trainings(self.experiment))

    def facts(self) -> Facts:
        """Return what determines both sets and their losses."""
        return _sets(self)

    def compute(self, workspace: Workspace) -> dict[str, Any]:
        """Return indices, classes, and the losses of each training."""
        experiment, examples = self.experiment, _examples(self, workspace)
        labels = workspace.images(experiment).train.tensors[1].numpy()
        return {
            "examples": examples.tolist(),
            "class": labels[examples].tolist(),
            "forgotten": len(self.forget_set.indices(workspace, experiment)),
            "losses": [
                privacy_losses([one], experiment.order)[examples].tolist()
                for one in workspace.ledgers(experiment)
            ],
        }


@dataclass(frozen=True)
class Shadow(Unit):
    """Train one model on all examples, unlearn the forget set, and store margins."""

    experiment: Experiment
    forget_set: ForgetSet
    control: ForgetSet
    method: str
    number: int

    def needs(self) -> list[Unit]:
        """Return the trainings that rank, and the search of settings."""
        return [*trainings(self.experiment), Search(self.experiment, self.method)]

    def facts(self) -> Facts:
        """Return experiment, method, both sets, and number of the model."""
        own = _sets(self) | {"number": self.number, "first seed": _FIRST_SEED}
        return Search(self.experiment, self.method).facts() | own

    def compute(self, workspace: Workspace) -> dict[str, list[float]]:
        """Return the margins after training and after unlearning."""
        experiment, seed = self.experiment, _FIRST_SEED + self.number
        settings = Search(experiment, self.method).run(workspace)["settings"]
        images = workspace.images(experiment).train
        model, engine = workspace.train(experiment, images, seed, 1)
        trained = _margins(self, workspace, model)
        unlearned = (
            unlearner_of(experiment, model, engine.ledger, self.method, settings, seed)
            .unlearn(
                images,
                self.forget_set.indices(workspace, experiment),
                num_epochs=experiment.unlearn_epochs,
                batch_size=experiment.recipe.batch_size,
            )
            .model
        )
        return {"trained": trained, "unlearned": _margins(self, workspace, unlearned)}


@dataclass(frozen=True)
class ShadowOracle(Unit):
    """Retrain one model without the forget set, and store margins."""

    experiment: Experiment
    forget_set: ForgetSet
    control: ForgetSet
    number: int

    def needs(self) -> list[Unit]:
        """Return the trainings that rank the examples."""
        return list(trainings(self.experiment))

    def facts(self) -> Facts:
        """Return training, both sets, and number of the model."""
        own = _sets(self) | {"number": self.number}
        return self.experiment.training_facts() | own

    def compute(self, workspace: Workspace) -> list[float]:
        """Return the margins of the retrained model."""
        experiment = self.experiment
        forget = self.forget_set.indices(workspace, experiment)
        images = workspace.images(experiment).train
        kept = np.setdiff1d(np.arange(len(images)), forget)
        seed = oracle_seed(forget, self.number)
        model, _ = workspace.train(experiment, Subset(images, kept.tolist()), seed, 1)
        return _margins(self, workspace, model)


_Job = AttackedExamples | Shadow | ShadowOracle


def _sets(job: _Job) -> Facts:
    """Return what determines both sets."""
    both = {"forget": job.forget_set, "control": job.control}
    return {name: one.facts(job.experiment) for name, one in both.items()}


def _examples(job: _Job, workspace: Workspace) -> np.ndarray:
    """Return the indices of the forget set and then of the control set."""
    both = job.forget_set, job.control
    return np.concatenate([one.indices(workspace, job.experiment) for one in both])


def _margins(job: _Job, workspace: Workspace, model: nn.Module) -> list[float]:
    """Return the margins of a model on both sets, rounded."""
    images = workspace.images(job.experiment).train
    part = Subset(images, _examples(job, workspace).tolist())
    return np.round(predict(model, part, CRITERION).margins, _DIGITS).tolist()
