"""Trainings by DP-SGD on random data, whose updates are timed one at a time."""

from collections.abc import Callable, Iterator
from typing import Any

import opacus
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common.models import mlp, small_cnn
from benchmarks.common.resnet import resnet18

SMALL, COLOUR = (1, 28, 28), (3, 32, 32)  # image shapes
MODELS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "small-cnn": (small_cnn, SMALL),
    "mlp": (lambda shape: mlp(shape, widths=(512, 256)), SMALL),
    "resnet18": (resnet18, COLOUR),
    "resnet18-w16": (lambda shape: resnet18(shape, width=16), COLOUR),
}


class Training:
    """A training that makes one update at a time.

    Trainings with the same model, batch size and number of batches start from the same
    weights and see the same Poisson batches and the same noise, whatever the engine.

    Args:
        engine: A privacy engine, ours or Opacus's; None trains without privacy.
        mode: Its ``grad_sample_mode``.
        model: A key of ``MODELS``.
        batch_size: Expected size of the batches.
        num_batches: Batches of an epoch.
        same_epoch: Repeat the batches of the first epoch, so that batch sizes recur.
        device: Where model and data are.

    Attributes:
        weights: The parameters that are trained.
    """

    def __init__(
        self,
        engine: opacus.PrivacyEngine | None,
        mode: str,
        model: str,
        batch_size: int,
        num_batches: int,
        *,
        same_epoch: bool = False,
        device: str = "cpu",
    ) -> None:
        build, shape = MODELS[model]
        torch.manual_seed(0)
        self._model: nn.Module = build(shape).to(device)
        images = torch.randn(num_batches * batch_size, *shape)
        data_set = TensorDataset(images, torch.randint(0, 10, (len(images),)))
        draws = torch.Generator().manual_seed(0)
        self.weights = list(self._model.parameters())
        self._optimizer = torch.optim.SGD(self.weights, lr=0.05)
        loader = DataLoader(data_set, batch_size=batch_size, generator=draws)
        self._criterion: Any = nn.CrossEntropyLoss()
        if engine is not None:
            self._model, self._optimizer, *rest, loader = engine.make_private(
                module=self._model,
                optimizer=self._optimizer,
                data_loader=loader,
                criterion=self._criterion,
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                grad_sample_mode=mode,
                noise_generator=torch.Generator(device).manual_seed(0),
            )
            self._criterion = rest[0] if rest else self._criterion
        self._batches = _endless(loader, draws if same_epoch else None)
        self._device = device

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Return images and labels of the next batch, on the device."""
        x, y = next(self._batches)
        return x.to(self._device), y.to(self._device)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Make one update, as the user's training loop would."""
        self._optimizer.zero_grad()
        self._criterion(self._model(x), y).backward()
        self._optimizer.step()

    def step(self) -> None:
        """Make one update with the next batch."""
        self.update(*self.next_batch())


def _endless(
    loader: DataLoader, restarted: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of epoch after epoch; seed a generator anew before each of them."""
    while True:
        if restarted is not None:
            restarted.manual_seed(0)
        yield from loader
