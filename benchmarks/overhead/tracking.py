"""What tracking every example adds to a training step of Opacus.

A step with ``opacus_pi.PrivacyEngine`` is compared with the same step with Opacus's own
engine. Both see the same Poisson batches; a step includes loading its batch. Steps
alternate (Opacus, ours, ours, Opacus) in one process on one thread. ``control``
compares Opacus with itself: it shows the noise of the machine.
"""

from collections.abc import Iterator
from typing import Any

import opacus
import torch

import opacus_pi
from benchmarks.overhead.table import Row
from benchmarks.overhead.timing import interleaved, timed
from benchmarks.overhead.trainings import Training

BATCH_SIZES = {"small-cnn": 64, "mlp": 64, "resnet18-w16": 32}
TARGETS = {"hooks": 1.02, "ghost": 1.05}
CASES = [f"{model}, {mode}" for mode in TARGETS for model in BATCH_SIZES]
NUM_BATCHES = 16  # of an epoch
SECONDS = 6.0  # of CPU time for each comparison


def measure(case: str, seconds: float = SECONDS) -> dict[str, Any]:
    """Return ratios of step times, ours to Opacus's, and Opacus's to itself.

    Raises:
        RuntimeError: The two engines trained different weights.
    """
    model, mode = case.split(", ")
    engines = opacus.PrivacyEngine(), opacus_pi.PrivacyEngine(), opacus.PrivacyEngine()
    plain, ours, again = (
        Training(engine, mode, model, BATCH_SIZES[model], NUM_BATCHES)
        for engine in engines
    )
    for training in (plain, ours, again) * 4:
        training.step()  # loads memory and makes one-time choices
    spent = min(timed(plain.step)["busy"] for _ in range(3))
    for training in (ours, again) * 3:
        training.step()
    rounds = max(9, min(400, round(seconds / (4 * spent))))
    found = {"tracked": interleaved(plain.step, ours.step, rounds)}
    pairs = zip(plain.weights, ours.weights, strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise RuntimeError(
            f"Weights of {case} differ from Opacus's after the same updates. Tracking "
            "must not change training, so the times are not compared."
        )
    for _ in range(2 * rounds):
        again.step()  # the control then sees the same batches as the other two
    found["control"] = interleaved(plain.step, again.step, max(9, rounds // 3))
    return found


def rows(found: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of the table."""
    for case, result in found.items():
        model, mode = case.split(", ")
        tracked, control = result["tracked"], result["control"]
        low, high = tracked["busy"]["quartiles"]
        comparison = (
            f"step {tracked['base_milliseconds']:.1f} ms, {tracked['rounds']} rounds, "
            f"quartiles {low:.3f}–{high:.3f}; Opacus over itself "
            f"{control['busy']['ratio']:.3f}"
        )
        quantity = f"tracking over Opacus {mode}, whole step, {model}"
        yield Row(quantity, TARGETS[mode], tracked, comparison)
