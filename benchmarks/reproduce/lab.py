"""Where the images are read, and where models, ledgers and scores are kept."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

from benchmarks import data
from benchmarks.models import build_model
from benchmarks.reproduce.experiment import Experiment
from benchmarks.reproduce.store import cached_arrays, path_of
from benchmarks.training import train
from opacus_pi import GradNormLedger, proxies
from opacus_pi.accounting import privacy_losses
from opacus_pi.atomic_file import replacing


@dataclass(frozen=True)
class Lab:
    """A directory for results and the sources of images; small, sent to every process.

    Attributes:
        directory: The store.
        data_root: Where torchvision finds or puts its files.
        arrays: For some data sets an npz in place of them, ``(name, file)``.
    """

    directory: Path
    data_root: Path | None = None
    arrays: tuple[tuple[str, Path], ...] = ()

    def images(self, experiment: Experiment) -> data.ImageData:
        """The experiment's images; read once in each process."""
        return _images(
            experiment.dataset,
            self.data_root,
            experiment.num_train,
            dict(self.arrays).get(experiment.dataset),
            experiment.num_test,
        )

    def trained(
        self, experiment: Experiment, seed: int
    ) -> tuple[nn.Module, GradNormLedger]:
        """The model of one seed in evaluation mode, and its ledger."""
        facts = experiment.training_facts() | {
            "seed": seed,
            "num_checkpoints": experiment.num_checkpoints,
        }
        weights = path_of(self.directory, "models", facts, ".safetensors")
        ledger = weights.with_name(f"ledger-{weights.name}")
        images = self.images(experiment)
        if not (weights.exists() and ledger.exists()):
            model, engine = train(
                experiment.recipe,
                images.train,
                images.image_shape,
                seed,
                experiment.num_checkpoints,
            )
            weights.parent.mkdir(parents=True, exist_ok=True)
            engine.ledger.save(ledger)
            with replacing(weights) as part:
                safetensors.torch.save_file(model.state_dict(), part)
        model = build_model(experiment.recipe.model, images.image_shape)
        model.load_state_dict(safetensors.torch.load_file(weights))
        return model.eval(), GradNormLedger.load(ledger)

    def ledgers(self, experiment: Experiment) -> list[GradNormLedger]:
        """The ledgers of all seeds, with the assumed noise where there was none."""
        found = [
            self.trained(experiment, seed)[1] for seed in range(experiment.num_seeds)
        ]
        if experiment.recipe.noise_std:
            return found
        on_sum = experiment.assumed_noise_std * experiment.recipe.batch_size
        return [ledger.with_noise_std(on_sum) for ledger in found]

    def scores(self, experiment: Experiment) -> dict[str, np.ndarray]:
        """Every score of difficulty, ``[n]`` each, higher is harder, over all seeds."""
        return cached_arrays(
            self.directory,
            "scores",
            experiment.ranking_facts(),
            lambda: _scores(self.ledgers(experiment), experiment.order),
        )


def _scores(ledgers: list[GradNormLedger], order: float) -> dict[str, np.ndarray]:
    """Privacy loss and the proxies of section 5.3, expectations over the runs."""
    return {
        "privacy loss": privacy_losses(ledgers, order),
        "mean norm": proxies.grad_norm_mean(ledgers),
        "mid norm": proxies.grad_norm_mid(ledgers),
        "end norm": proxies.grad_norm_end(ledgers),
        "C-Proxy": proxies.c_proxy(ledgers),
        "EL2N": proxies.el2n(ledgers),
    }


@lru_cache(maxsize=2)
def _images(
    name: str, root: Path | None, num_train: int, arrays: Path | None, num_test: int
) -> data.ImageData:
    """Images of one data set."""
    torch.set_num_threads(1)
    return data.load(name, root, num_train, arrays, num_test)
