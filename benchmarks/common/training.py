"""The training loops of all benchmarks: SGD, SGLD and DP-SGD, with a ledger.

A ``Recipe`` is everything that determines a training run, except data and seed.
``train`` follows it without clipping, ``train_privately`` by DP-SGD.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.common.facts import facts_of, later
from benchmarks.common.models import build_model
from opacus_pi import PrivacyEngine, Recorder

warnings.filterwarnings("ignore", message="Secure RNG turned off")
warnings.filterwarnings("ignore", message="Full backward hook is firing")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run, except its data and its seed.

    Attributes:
        model: A name that ``benchmarks.common.models.build_model`` knows.
        num_epochs: Passes over the data set, in expectation.
        batch_size: Expected batch size of the Poisson batches.
        learning_rate: Learning rate of SGD.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        noise_std: Standard deviation of the noise on the mean gradient (0: plain SGD).
        milestones: Epochs after which the learning rate is divided by ten.
        precision: ``"float32"``, or ``"bfloat16"``: the forward passes of updates run
            under autocast. Weights, their updates, sweeps and evaluations stay float32.
        channels_last: Whether weights of convolutions have the channels-last layout.
    """

    model: str
    num_epochs: int
    batch_size: int
    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    noise_std: float = 0.0
    milestones: tuple[int, ...] = ()
    precision: str = later("float32")
    channels_last: bool = later(False)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}; "
                f"got {self.precision}."
            )

    def key(self) -> dict:
        """Return the recipe as JSON, for keys of stored results."""
        return facts_of(self)

    def autocast(self, device: str | torch.device) -> torch.autocast:
        """Return a context for a forward pass and its loss, not for the optimizer."""
        reduced = self.precision == "bfloat16"
        return torch.autocast(torch.device(device).type, torch.bfloat16, reduced)

    def place(self, model: nn.Module, device: str | torch.device) -> nn.Module:
        """Move a model to the device and layout of its training, in place."""
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return model.to(device)

    def optimizer(self, params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the recipe's optimizer of some parameters."""
        return torch.optim.SGD(
            params,
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    def scheduler(
        self, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the schedule of learning rates, to be stepped after every epoch."""
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, list(self.milestones))


@dataclass(frozen=True)
class PrivateRecipe(Recipe):
    """A recipe that trains by DP-SGD; its ``noise_std`` is not used.

    Attributes:
        noise_multiplier: Noise multiplier, as in Opacus.
        max_grad_norm: Clip norm, as in Opacus.
    """

    noise_multiplier: float = 1.0
    max_grad_norm: float = 1.0


DIGITS = Recipe("mlp", 60, 64, 0.1, noise_std=0.15)  # SGLD on digits


def train(
    recipe: Recipe,
    data_set: Dataset,
    image_shape: tuple[int, ...],
    seed: int,
    num_checkpoints: int = 35,
    weights_dir: Path | None = None,
    device: str = "cpu",
    num_classes: int = 10,
) -> tuple[nn.Module, PrivacyEngine]:
    """Train without clipping; sweep the norms of all examples at evenly spaced steps.

    Args:
        recipe: The recipe.
        data_set: Images and labels.
        image_shape: ``(c, h, w)``.
        seed: Of the initial weights, the batches and the noise.
        num_checkpoints: Rows of the ledger; 1 if it is not used.
        weights_dir: Folder for the weights at every row; None: they are not saved.
        device: Where the model is.
        num_classes: Number of labels.

    Returns:
        The trained model in evaluation mode, and the engine with its ledger.
    """
    torch.manual_seed(seed)
    model = recipe.place(build_model(recipe.model, image_shape, num_classes), device)
    loader = DataLoader(data_set, batch_size=recipe.batch_size, shuffle=True)
    num_steps = recipe.num_epochs * len(loader)
    recorder = Recorder.evenly_spaced(
        num_checkpoints, num_steps=num_steps, mode="swept", weights_dir=weights_dir
    )
    engine = PrivacyEngine(accountant="rdp", recorder=recorder)
    criterion = nn.CrossEntropyLoss()
    model, optimizer, loader = engine.make_monitored(
        module=model,
        optimizer=recipe.optimizer(model.parameters()),
        data_loader=loader,
        noise_std=recipe.noise_std,
        criterion=criterion,
    )
    scheduler = recipe.scheduler(optimizer)
    for _ in range(recipe.num_epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            with recipe.autocast(device):
                loss = criterion(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
        scheduler.step()
    return model.eval(), engine


def train_privately(
    recipe: PrivateRecipe,
    data_set: Dataset,
    image_shape: tuple[int, ...],
    seed: int,
    before_update: Callable[[nn.Module], None] = lambda model: None,
    device: str = "cpu",
    num_classes: int = 10,
) -> tuple[nn.Module, PrivacyEngine]:
    """Train by DP-SGD with the drop-in engine, which observes the norms of batches.

    Args:
        recipe: The recipe.
        data_set: Images and labels.
        image_shape: ``(c, h, w)``.
        seed: Of the initial weights, the batches and the noise.
        before_update: Called with the model before every update.
        device: Where the model is.
        num_classes: Number of labels.

    Returns:
        The trained model (wrapped by Opacus) in evaluation mode, and the engine.

    Raises:
        ValueError: Precision or layout are not the defaults. Opacus's per-example
            gradients would be inexact or wrong.
    """
    _require_plain(recipe)
    torch.manual_seed(seed)
    model = build_model(recipe.model, image_shape, num_classes).to(device)
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=recipe.optimizer(model.parameters()),
        data_loader=DataLoader(data_set, batch_size=recipe.batch_size, shuffle=True),
        noise_multiplier=recipe.noise_multiplier,
        max_grad_norm=recipe.max_grad_norm,
    )
    criterion = nn.CrossEntropyLoss()
    for _ in range(recipe.num_epochs):
        for images, labels in loader:
            before_update(model)
            optimizer.zero_grad()
            criterion(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
    return model.eval(), engine


def _require_plain(recipe: Recipe) -> None:
    """Raise if Opacus's per-example gradients would be inexact or wrong."""
    if recipe.precision != "float32" or recipe.channels_last:
        raise ValueError(
            "DP-SGD needs precision='float32' and channels_last=False; got "
            f"{recipe.precision!r} and {recipe.channels_last}."
        )
