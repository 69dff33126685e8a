"""What tracking every example adds to a training step of Opacus.

Steps with ``opacus_pi.PrivacyEngine`` are compared with the same steps with Opacus's
own engine. Both see the same Poisson batches; a step includes loading its batch. Blocks
of steps alternate (Opacus, ours, ours, Opacus) in one process on one thread, and the
CPU time of the thread is compared within each round. ``control`` compares Opacus with
itself: it shows the noise of the machine.

A busy machine slows every step, and most of all what the caches do not hold. So the
function calls that tracking adds to a step are counted, too: their number depends on
no clock.
"""

import sys
from collections.abc import Iterator
from statistics import median
from types import FrameType
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
NUM_BATCHES = 64  # of an epoch
BLOCK = 0.25  # seconds of a block of steps, and at most
STEPS = 16  # steps
COUNTED = 9  # steps whose calls are counted
SECONDS = 30.0  # of CPU time for each comparison


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
    for training in (plain, ours, again) * 8:
        training.step()  # loads memory and makes one-time choices
    calls = [num_calls(training) for training in (plain, ours, again)]
    spent = min(timed(plain.step)["busy"] for _ in range(3))
    for training in (ours, again) * 3:
        training.step()
    steps = max(1, min(STEPS, round(BLOCK / spent)))
    blocks = [Block(training, steps) for training in (plain, ours, again)]
    rounds = max(9, round(seconds / (4 * steps * spent)))
    num_controls = max(5, rounds // 4)
    control = interleaved(blocks[0], blocks[2], num_controls)
    for _ in range(2 * num_controls):
        blocks[1]()
    tracked = interleaved(blocks[0], blocks[1], rounds)
    pairs = zip(plain.weights, ours.weights, strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise RuntimeError(
            f"Weights of {case} differ from Opacus's after the same updates. Tracking "
            "must not change training, so the times are not compared."
        )
    added_calls = calls[1] - calls[0]
    return {
        "tracked": tracked,
        "control": control,
        "steps": steps,
        "added_calls": added_calls,
    }


class Block:
    """A number of steps of one training, as one task.

    Args:
        training: The training.
        steps: How many.
    """

    def __init__(self, training: Training, steps: int) -> None:
        self._training, self._steps = training, steps

    def __call__(self) -> None:
        """Make the steps."""
        for _ in range(self._steps):
            self._training.step()


def num_calls(training: Training) -> int:
    """Return how many functions a step calls, in Python or from Python.

    It is the median of several steps: the number of examples in a batch varies.
    """
    counts = []
    for _ in range(COUNTED):
        count = 0

        def see(_: FrameType, event: str, __: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(see)
        try:
            training.step()
        finally:
            sys.setprofile(None)
        counts.append(count)
    return round(median(counts))


def rows(found: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of the table."""
    for case, result in found.items():
        model, mode = case.split(", ")
        quantity = f"tracking over Opacus {mode}, whole step, {model}"
        yield Row(quantity, TARGETS[mode], result["tracked"], _comparison(result))


def _comparison(result: dict[str, Any]) -> str:
    """Return what is said beside a ratio."""
    tracked, control = result["tracked"], result["control"]["busy"]["ratio"]
    if "added_calls" not in result:  # measured before blocks were compared
        low, high = tracked["busy"]["quartiles"]
        return (
            f"step {tracked['base_milliseconds']:.1f} ms, {tracked['rounds']} rounds, "
            f"quartiles {low:.3f}–{high:.3f}; Opacus over itself {control:.3f}"
        )
    low, high = tracked["busy"]["interval"]
    added, steps = tracked["added_microseconds"], result["steps"]
    least, most = (value / steps for value in added["interval"])
    return (
        f"step {tracked['base_milliseconds'] / steps:.1f} ms, {tracked['rounds']} "
        f"rounds of {4 * steps} steps, 95 % interval {low:.3f}–{high:.3f}; added to a "
        f"step: {added['median'] / steps:.0f} µs ({least:.0f}–{most:.0f}) and "
        f"{result['added_calls']} calls; Opacus over itself {control:.3f}"
    )
