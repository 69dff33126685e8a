"""The same small training on any device, with our engine, Opacus's, or monitored."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.recording import Recorder
from tests.device.simulated import Counts
from tests.private_training import Net, data

MODES = ("hooks", "functorch", "ew", "ghost", "fast")


class DropoutNet(Net):
    """Also draws random numbers on its device in each forward pass."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.3, self.training))


def placed_data(device, *, is_there):
    """Return the data set: on the device, or on the CPU."""
    tensors = data().tensors
    return TensorDataset(*(t.to(device) if is_there else t for t in tensors))


@dataclass
class Result:
    """What a training left."""

    engine: Any
    net: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    counts: list[dict[str, int]]  # copies and waits of each update

    @property
    def weights(self):
        return [p.detach().cpu() for p in self.net.parameters()]


def plain_loop(model, optimizer, loader, criterion, device, *, epochs=3):
    """Train; the batch is sent to the device before the copies are counted."""
    counts = []
    for _ in range(epochs):
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            before = Counts() if device != "cpu" else None
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            counts.append(before.now() if before else {})
    return counts


def train_privately(
    device, mode="hooks", *, engine=None, net=Net, is_there=False, epochs=3, **options
):
    """Train with clipping and noise from one seed, on a device.

    Args:
        device: Its name.
        mode: A grad_sample_mode.
        engine: Default: ours with an observed recorder.
        net: Class of the model.
        is_there: Whether the data set is stored on the device.
        epochs: Passes of four updates.
        options: For ``make_private``.
    """
    torch.manual_seed(0)
    module = net().to(device)
    if engine is None:  # a row for each pass of four updates
        engine = PrivacyEngine(recorder=Recorder(every=1))
    noise = torch.Generator(device).manual_seed(5)
    criterion = nn.CrossEntropyLoss()
    model, optimizer, *middle, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
        data_loader=loader_of(placed_data(device, is_there=is_there)),
        criterion=criterion,
        noise_multiplier=1.0,
        max_grad_norm=2.0,
        poisson_sampling=False,
        **{"noise_generator": noise, "grad_sample_mode": mode, **options},
    )
    criterion = middle[0] if middle else criterion
    counts = plain_loop(model, optimizer, loader, criterion, device, epochs=epochs)
    return Result(engine, module, model, optimizer, counts)


def train_monitored(device, *, noise_std=0.0, net=Net, epochs=3):
    """Train without clipping, with swept rows, from one seed, on a device."""
    torch.manual_seed(0)
    module = net().to(device)
    criterion = nn.CrossEntropyLoss()
    engine = PrivacyEngine(recorder=Recorder("swept", criterion=criterion))
    noise = torch.Generator(device).manual_seed(5)
    model, optimizer, loader = engine.make_monitored(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=loader_of(data()),
        noise_std=noise_std,
        criterion=criterion,
        poisson_sampling=False,
        noise_generator=noise if noise_std else None,
    )
    counts = plain_loop(model, optimizer, loader, criterion, device, epochs=epochs)
    return Result(engine, module, model, optimizer, counts)


def loader_of(data_set):
    """Return a loader of four shuffled batches, the same on each device."""
    generator = torch.Generator().manual_seed(3)
    return DataLoader(data_set, batch_size=6, shuffle=True, generator=generator)
