"""The store of a study, and access to its images, models, ledgers and scores.

Everything that more than one job needs is reached through a ``Workspace``: a model is
trained on first use and read from the store afterwards. A workspace holds paths only,
so it is cheap to send to another process.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import Dataset

from benchmarks.common import data
from benchmarks.common.models import build_model
from benchmarks.common.own import source_digest
from benchmarks.common.training import PrivateRecipe, train, train_privately
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.store import cached_arrays, path_of
from opacus_pi import GradNormLedger, PrivacyEngine
from opacus_pi.accounting import privacy_losses
from opacus_pi.difficulty import proxies
from opacus_pi.files.atomic_file import replace_file
from opacus_pi.models.copies import unwrap


@dataclass(frozen=True)
class Workspace:
    """A directory of results, the sources of images, and a device.

    Attributes:
        directory: The store.
        data_root: Folder where torchvision reads or downloads its files.
        arrays: ``(name, file)`` of data sets that are read from .npz files instead.
        device: Where models are trained and evaluated.
    """

    directory: Path
    data_root: Path | None = None
    arrays: tuple[tuple[str, Path], ...] = ()
    device: str = "cpu"

    def images(self, experiment: Experiment) -> data.ImageData:
        """Return the experiment's images; each process reads them once."""
        return _images(*self._source(experiment))

    def content_facts(self, experiment: Experiment) -> dict[str, str]:
        """Return digests of the data set's content, and of the file of an own model.

        They belong to every key: another file under the same name is another data set.
        """
        found = {"data": _digest(*self._source(experiment))}
        source = source_digest(experiment.recipe.model)
        return found | ({"model source": source} if source else {})

    def _source(
        self, experiment: Experiment
    ) -> tuple[str, Path | None, int, Path | None, int]:
        """Return the arguments that choose the images."""
        arrays = dict(self.arrays).get(experiment.dataset)
        sizes = experiment.num_train, experiment.num_test
        return experiment.dataset, self.data_root, sizes[0], arrays, sizes[1]

    def trained(
        self, experiment: Experiment, seed: int
    ) -> tuple[nn.Module, GradNormLedger]:
        """Return the model of a seed, in evaluation mode, and its ledger.

        Both are trained and stored if the store does not have them.
        """
        facts = experiment.training_facts() | {
            "seed": seed,
            "num_checkpoints": experiment.num_checkpoints,
        }
        facts |= self.content_facts(experiment)
        weights = path_of(self.directory, "models", facts, ".safetensors")
        ledger = weights.with_name(f"ledger-{weights.name}")
        images = self.images(experiment)
        if not (weights.exists() and ledger.exists()):
            model, engine = self.train(
                experiment, images.train, seed, experiment.num_checkpoints
            )
            weights.parent.mkdir(parents=True, exist_ok=True)
            engine.ledger.save(ledger)
            state = {k: v.contiguous() for k, v in model.state_dict().items()}
            replace_file(weights, safetensors.torch.save(state))
        model = self.fresh_model(experiment)
        model.load_state_dict(safetensors.torch.load_file(weights))
        return model.eval(), GradNormLedger.load(ledger)

    def train(
        self, experiment: Experiment, data_set: Dataset, seed: int, num_checkpoints: int
    ) -> tuple[nn.Module, PrivacyEngine]:
        """Train by the recipe; return the unwrapped model and the engine.

        A ``PrivateRecipe`` trains by DP-SGD, whose norms are observed at every step.
        Other recipes sweep the norms of all examples ``num_checkpoints`` times.
        """
        recipe, images = experiment.recipe, self.images(experiment)
        shape, classes = images.image_shape, images.num_classes
        where = {"device": self.device, "num_classes": classes}
        if isinstance(recipe, PrivateRecipe):
            model, engine = train_privately(recipe, data_set, shape, seed, **where)
            return unwrap(model), engine
        return train(recipe, data_set, shape, seed, num_checkpoints, **where)

    def fresh_model(self, experiment: Experiment) -> nn.Module:
        """Return a new model, to load weights into."""
        images = self.images(experiment)
        model = build_model(
            experiment.recipe.model, images.image_shape, images.num_classes
        )
        return experiment.recipe.place(model, self.device)

    def ledgers(self, experiment: Experiment) -> list[GradNormLedger]:
        """Return the ledgers of all seeds."""
        return [self.ledger(experiment, seed) for seed in range(experiment.num_seeds)]

    def ledger(self, experiment: Experiment, seed: int) -> GradNormLedger:
        """Return a seed's ledger, with assumed noise if training had none."""
        found = self.trained(experiment, seed)[1]
        if (np.asarray(found.mechanism.noise_std) > 0).all():
            return found
        on_sum = experiment.assumed_noise_std * experiment.recipe.batch_size
        return found.with_noise_std(on_sum)

    def scores(self, experiment: Experiment) -> dict[str, np.ndarray]:
        """Return the scores over all seeds, ``[n]`` each; higher is harder."""
        return cached_arrays(
            self.directory,
            "scores",
            experiment.ranking_facts() | self.content_facts(experiment),
            lambda: scores_of(self.ledgers(experiment), experiment.order),
        )


def scores_of(ledgers: list[GradNormLedger], order: float) -> dict[str, np.ndarray]:
    """Return privacy loss and the proxies of section 5.3, averaged over the runs."""
    found = {
        "privacy loss": privacy_losses(ledgers, order),
        "mean norm": proxies.grad_norm_mean(ledgers),
        "mid norm": proxies.grad_norm_mid(ledgers),
        "end norm": proxies.grad_norm_end(ledgers),
    }
    if ledgers[0].confidences is None:  # observed ledgers have norms but no outputs
        return found
    return found | {
        "C-Proxy": proxies.c_proxy(ledgers),
        "EL2N": proxies.el2n(ledgers),
    }


@lru_cache(maxsize=2)
def _images(
    name: str, root: Path | None, num_train: int, arrays: Path | None, num_test: int
) -> data.ImageData:
    """Load one data set; cached, as every job of a process asks for it."""
    torch.set_num_threads(1)
    return data.load(name, root, num_train, arrays, num_test)


@lru_cache(maxsize=8)
def _digest(
    name: str, root: Path | None, num_train: int, arrays: Path | None, num_test: int
) -> str:
    """Return the digest of one data set; cached, as every key needs it."""
    return data.digest(_images(name, root, num_train, arrays, num_test))
