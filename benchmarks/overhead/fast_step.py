"""A tracked DP-SGD step with ``grad_sample_mode="fast"``, compared with Opacus's modes.

All trainings see the same Poisson batches and the same noise. A step starts with the
batch in memory and ends with the new weights. ``opacus_pi.PrivacyEngine`` (which
records the norm of every example) and Opacus's own engine in its modes ``hooks`` and
``ghost`` are timed in turn, in one process on one thread. The result is the ratio of
the fast step to Opacus's faster mode in the same round. ``plain`` is the step without
privacy, and ``floor`` is the plain step with noise of the same size added to its
gradients in place, but without norms and clipping. The updates are compared with those
of ``hooks``.
"""

from collections.abc import Iterator
from typing import Any

import opacus
import torch
from torch import Tensor

import opacus_pi
from benchmarks.overhead.table import Row
from benchmarks.overhead.timing import CLOCKS, Times, ratios, timed, typical
from benchmarks.overhead.trainings import Training

# name of the model and expected batch size
CASES = ["small-cnn-64", "small-cnn-256", "mlp-128", "mlp-256", "resnet18-32"]
TARGETS = {"small-cnn": 0.72, "mlp": 0.65, "resnet18": 0.31}
ENGINES = {
    "fast": opacus_pi.PrivacyEngine,
    "hooks": opacus.PrivacyEngine,
    "ghost": opacus.PrivacyEngine,
    "plain": None,
    "floor": None,
}
NUM_BATCHES = 4  # of an epoch
ROUNDS = 9
SLOW = 12.0  # a mode slower than this many fast steps gets three rounds


def measure(case: str, device: str = "cpu", rounds: int = ROUNDS) -> dict[str, Any]:
    """Return step times by mode, and the ratio to the faster of Opacus's modes.

    Args:
        case: One of ``CASES``.
        device: Where models and data are.
        rounds: How often each mode is timed.
    """
    model, batch_size = case.rsplit("-", 1)
    trainings = {
        mode: (_Noised if mode == "floor" else Training)(
            engine and engine(),
            mode,
            model,
            int(batch_size),
            NUM_BATCHES,
            same_epoch=True,
            device=device,
        )
        for mode, engine in ENGINES.items()
    }
    start = [w.detach().clone() for w in trainings["hooks"].weights]
    for training in trainings.values():
        for _ in range(NUM_BATCHES):  # loads memory and makes one-time choices
            training.step()
    difference = _difference(trainings["fast"], trainings["hooks"], start)
    times: dict[str, Times] = {mode: [] for mode in trainings}
    order = list(trainings)
    for done in range(rounds):
        for mode in order if done % 2 else reversed(order):
            if done < 3 or typical(times[mode]) <= SLOW * typical(times["fast"]):
                times[mode].append(_timed_update(trainings[mode], device))
    found = {clock: _summary(times, clock) for clock in CLOCKS}
    return {"update_relative_difference": difference, "rounds": rounds, **found}


class _Noised(Training):
    """A training without clipping whose gradients get noise before they are used.

    Args:
        *given: What ``Training`` is given.
        **options: Its options.
    """

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._noise = torch.Generator(options["device"]).manual_seed(0)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Make one update of the sum of the gradients and noise."""
        self._optimizer.zero_grad()
        self._criterion(self._model(x), y).backward()
        for p in self.weights:
            noise = torch.normal(
                0.0, 1.0, p.shape, device=p.device, generator=self._noise
            )
            p.grad = noise.add_(p.grad).div_(len(x))
        self._optimizer.step()


def _timed_update(training: Training, device: str) -> dict[str, float]:
    """Return the seconds of one update, without loading its batch."""
    x, y = training.next_batch()
    return timed(lambda: training.update(x, y), device)


def _difference(ours: Training, theirs: Training, start: list[Tensor]) -> float:
    """Return the largest relative difference of the summed updates of a parameter."""
    triples = zip(ours.weights, theirs.weights, start, strict=True)
    with torch.no_grad():
        return max(float((a - b).norm() / (b - w).norm()) for a, b, w in triples)


def _summary(times: dict[str, Times], clock: str) -> dict[str, Any]:
    """Return milliseconds by mode, and the ratios within rounds."""
    middle = {mode: 1e3 * typical(of, clock) for mode, of in times.items()}
    faster = min(("hooks", "ghost"), key=lambda mode: middle[mode])
    found = ratios(times["fast"], times[faster], clock)
    floor = ratios(times["floor"], times[faster], clock)["ratio"]
    return {"better": faster, **found, "floor": floor, "milliseconds": middle}


def rows(found: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of the table."""
    for case, step in found.items():
        model, batch_size = case.rsplit("-", 1)
        spent = step["busy"]["milliseconds"].items()
        shown = ", ".join(f"{mode} {value:.1f}" for mode, value in spent)
        comparison = (
            f"floor {step['busy']['floor']:.3f}; faster mode: "
            f"{step['busy']['better']}; ms: {shown}; updates differ by "
            f"{step['update_relative_difference']:.0e}"
        )
        quantity = (
            f'tracked step, mode "fast", over Opacus\'s faster mode, {model} '
            f"B={batch_size}"
        )
        yield Row(quantity, TARGETS[model], step, comparison)
