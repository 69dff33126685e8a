"""What tracking every example adds to a training step of Opacus.

A step with ``opacus_pi.PrivacyEngine`` over the same step with Opacus's own: the same
Poisson batches, from the loader to the weights, interleaved (Opacus, ours, ours,
Opacus) in one process on one thread. ``control`` is Opacus over itself: what the
machine's noise looks like.
"""

from collections.abc import Iterator
from typing import Any

import opacus
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import opacus_pi
from benchmarks.common.models import mlp, small_cnn
from benchmarks.common.resnet import resnet18
from benchmarks.overhead.table import Row
from benchmarks.overhead.timing import Task, interleaved, timed

SMALL, COLOUR = (1, 28, 28), (3, 32, 32)
MODELS = {  # model, image shape, expected batch size
    "small-cnn": (small_cnn, SMALL, 64),
    "mlp": (lambda shape: mlp(shape, widths=(512, 256)), SMALL, 64),
    "resnet18-w16": (lambda shape: resnet18(shape, width=16), COLOUR, 32),
}
BARS = {"hooks": 1.02, "ghost": 1.05}
CASES = [f"{model}, {mode}" for mode in BARS for model in MODELS]
NUM_BATCHES = 16  # of an epoch
SECONDS = 6.0  # of CPU time for each comparison


def training(engine: opacus.PrivacyEngine, model_name: str, mode: str) -> Task:
    """A function that makes one step; functions made alike make the same steps."""
    build, shape, batch_size = MODELS[model_name]
    torch.manual_seed(0)
    model = build(shape)
    images = torch.randn(NUM_BATCHES * batch_size, *shape)
    data_set = TensorDataset(images, torch.randint(0, 10, (len(images),)))
    draws = torch.Generator().manual_seed(0)
    model, optimizer, *rest, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        data_loader=DataLoader(data_set, batch_size=batch_size, generator=draws),
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        noise_generator=torch.Generator().manual_seed(0),
    )
    criterion = rest[0] if rest else nn.CrossEntropyLoss()
    batches = iter(_endless(loader))

    def step() -> None:
        x, y = next(batches)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    step.weights = list(model.parameters())
    return step


def _endless(loader: DataLoader) -> Any:
    """Epoch after epoch."""
    while True:
        yield from loader


def measure(case: str, seconds: float = SECONDS) -> dict[str, Any]:
    """Ratios of step times, ours over Opacus's, after checking that weights agree."""
    model, mode = case.split(", ")
    engines = opacus.PrivacyEngine(), opacus_pi.PrivacyEngine(), opacus.PrivacyEngine()
    plain, ours, again = (training(engine, model, mode) for engine in engines)
    for step in (plain, ours, again) * 4:
        step()  # page faults and one-time choices
    spent = min(timed(plain)["busy"] for _ in range(3))
    for step in (ours, again) * 3:
        step()
    rounds = max(9, min(400, round(seconds / (4 * spent))))
    found = {"tracked": interleaved(plain, ours, rounds)}
    pairs = zip(plain.weights, ours.weights, strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise RuntimeError(f"Tracking changed the weights of {case}.")
    for _ in range(2 * rounds):
        again()  # to where the others are: the batches to come are the same
    found["control"] = interleaved(plain, again, max(9, rounds // 3))
    return found


def rows(found: dict[str, Any]) -> Iterator[Row]:
    """The table's lines."""
    for case, result in found.items():
        model, mode = case.split(", ")
        tracked, control = result["tracked"], result["control"]
        low, high = tracked["busy"]["quartiles"]
        beside = (
            f"step {tracked['base_milliseconds']:.1f} ms, {tracked['rounds']} rounds, "
            f"quartiles {low:.3f}–{high:.3f}; Opacus over itself "
            f"{control['busy']['ratio']:.3f}"
        )
        path = f"tracking over Opacus {mode}, whole step, {model}"
        yield Row(path, BARS[mode], tracked, beside)
