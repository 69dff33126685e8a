"""Seconds that a step takes on a GPU: operations counted, rates assumed.

One step of the real model on two and on four examples is run here under counters of
floating-point operations, of bytes read and written, and of operations that start a
kernel. All grow linearly with the batch. The counts are facts; the rates of ``Gpu`` are
assumptions, as nothing here has been measured on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import build_model
from benchmarks.training import Recipe
from opacus_pi.gradients import sweep

Shape = tuple[int, ...]
SWEEP = 1.0  # of a float32 step; 0.97 on a CPU, benchmarks/results/overhead_norms.json
PRIVATE = 4.0  # of a float32 step; 3.5 to 4.4 on a CPU, the same file, Opacus's hooks
SWEEP_BATCH = 64  # examples that a sweep measures at once
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU: its data sheet, and shares of it that are assumed.

    Attributes:
        name: Which.
        peak: Dense operations a second; float32 convolutions use TF32.
        bandwidth: Bytes a second.
        share_of_peak: What small convolutions reach.
        share_of_bandwidth: What elementwise kernels reach.
        launch: Seconds of the processor for an operation of eager PyTorch.
        loading: The same for an example of a batch; measured, on one core.
    """

    name: str = "H200"
    peak: tuple[tuple[str, float], ...] = (("bfloat16", 989e12), ("float32", 494e12))
    bandwidth: float = 4.8e12
    share_of_peak: float = 0.2
    share_of_bandwidth: float = 0.6
    launch: float = 10e-6
    loading: float = 8e-6


@dataclass(frozen=True)
class Counts:
    """What a step asks of a machine; they add up and scale like vectors."""

    operations: float
    moved: float
    launches: float

    def at(self, other: "Counts", here: int, there: int, batch: int) -> "Counts":
        """On the straight line through the counts of two batch sizes, at a third."""
        share = (batch - here) / (there - here)
        pairs = zip(_listed(self), _listed(other), strict=True)
        return Counts(*(a + share * (b - a) for a, b in pairs))


@dataclass(frozen=True)
class Seconds:
    """Time of an example: kernels on the GPU, and the processor that feeds it."""

    kernels: float
    processor: float

    @property
    def alone(self) -> float:
        """One process on the GPU: whichever is slower."""
        return max(self.kernels, self.processor)


@cache
def update_seconds(
    model: str, shape: Shape, gpu: Gpu, batch: int, precision: str
) -> Seconds:
    """Of an example in a training or unlearning step."""
    return _seconds(_plain(model, batch, precision), shape, gpu, _update)


@cache
def sweep_seconds(model: str, shape: Shape, gpu: Gpu) -> Seconds:
    """Of an example whose gradient norm is measured, in float32."""
    plain = _plain(model, SWEEP_BATCH)
    kernels = SWEEP * _seconds(plain, shape, gpu, _update).kernels
    launches = _swept(plain, shape, 3) - _swept(plain, shape, 2)  # of one batch
    return Seconds(kernels, launches * gpu.launch / SWEEP_BATCH + gpu.loading)


@cache
def evaluation_seconds(model: str, shape: Shape, gpu: Gpu) -> Seconds:
    """Of an example that is classified, in float32."""
    return _seconds(_plain(model, EVALUATION_BATCH), shape, gpu, _forward)


def _plain(model: str, batch: int, precision: str = "float32") -> Recipe:
    """A recipe of one step."""
    return Recipe(model, 1, batch, 0.1, precision=precision)


def _seconds(recipe: Recipe, shape: Shape, gpu: Gpu, step: Callable) -> Seconds:
    """A step's counts at the recipe's batch size, by the GPU's rates, by example."""
    batch = recipe.batch_size
    counts = step(recipe, shape, 2).at(step(recipe, shape, 4), 2, 4, batch)
    compute = counts.operations / (gpu.share_of_peak * dict(gpu.peak)[recipe.precision])
    memory = counts.moved / (gpu.share_of_bandwidth * gpu.bandwidth)
    processor = counts.launches * gpu.launch + batch * gpu.loading
    return Seconds((compute + memory) / batch, processor / batch)


def _update(recipe: Recipe, shape: Shape, batch: int) -> Counts:
    """Forward, backward and the optimizer's step."""
    model, images, labels = _example(recipe, shape, batch)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        with recipe.autocast("cpu"):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    step()  # the first one makes the momentum
    return _counted(step)


def _forward(recipe: Recipe, shape: Shape, batch: int) -> Counts:
    """An evaluation."""
    model, images, _ = _example(recipe, shape, batch)
    with torch.no_grad():
        return _counted(lambda: model.eval()(images))


def _swept(recipe: Recipe, shape: Shape, num_batches: int) -> float:
    """Launches of a sweep in batches of one."""
    model, *tensors = _example(recipe, shape, num_batches)
    data_set, criterion = TensorDataset(*tensors), nn.CrossEntropyLoss()
    return _counted(lambda: sweep(model, criterion, data_set, batch_size=1)).launches


def _example(recipe: Recipe, shape: Shape, batch: int) -> tuple:
    """A fresh model and so many images with labels."""
    labels = torch.zeros(batch, dtype=torch.int64)
    model = build_model(recipe.model, shape)
    return model, torch.rand(batch, *shape), labels


def _counted(run: Callable[[], Any]) -> Counts:
    """What a call asks of the machine."""
    flops, traffic = FlopCounterMode(display=False), _Traffic()
    with flops, traffic:
        run()
    return Counts(flops.get_total_flops(), traffic.moved, traffic.launches)


def _listed(counts: Counts) -> tuple[float, float, float]:
    return counts.operations, counts.moved, counts.launches


class _Traffic(TorchDispatchMode):
    """Counts operations that are no views, and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.launches = 0.0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in str(function):
            self.launches += 1
            tensors = [t for t in tree_leaves((args, found)) if torch.is_tensor(t)]
            self.moved += sum(t.numel() * t.element_size() for t in tensors)
        return found
