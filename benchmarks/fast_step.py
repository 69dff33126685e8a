"""A tracked DP-SGD step with ``grad_sample_mode="fast"`` over Opacus's better mode.

    python -m benchmarks.fast_step

The same Poisson batches and the same noise, from a batch in hand to the weights, with
``opacus_pi.PrivacyEngine`` (every example's norm is recorded) and with Opacus's own
engine in its modes ``hooks`` and ``ghost``, interleaved in one process on one thread.
The ratio is of the fast step to the mode of Opacus that is faster, in the same round;
``plain`` is the step without privacy. Weights are compared with those of ``hooks``.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import opacus
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import opacus_pi
from benchmarks.common.models import mlp, small_cnn
from benchmarks.common.report import environment, write_json
from benchmarks.common.resnet import resnet18
from benchmarks.overhead.timing import CLOCKS, timed

SMALL, COLOUR = (1, 28, 28), (3, 32, 32)
CASES = {  # model, image shape, expected batch size
    "small-cnn-64": (small_cnn, SMALL, 64),
    "small-cnn-256": (small_cnn, SMALL, 256),
    "mlp-128": (lambda shape: mlp(shape, widths=(512, 256)), SMALL, 128),
    "mlp-256": (lambda shape: mlp(shape, widths=(512, 256)), SMALL, 256),
    "resnet18-32": (resnet18, COLOUR, 32),
}
BARS = {"small-cnn": 0.66, "mlp": 0.45, "resnet18": 0.35}
ENGINES = {
    "fast": opacus_pi.PrivacyEngine,
    "hooks": opacus.PrivacyEngine,
    "ghost": opacus.PrivacyEngine,
    "plain": None,
}
NUM_BATCHES = 4  # of an epoch
ROUNDS = 9
SLOW = 12.0  # a mode slower than this many fast steps gets three rounds
OUT = Path("benchmarks/results/overhead_fast.json")


class Training:
    """One training; those of a case and seed see the same batches and noise.

    Args:
        case: A key of ``CASES``.
        mode: A key of ``ENGINES``.
        device: Where model and data are.
    """

    def __init__(self, case: str, mode: str, device: str = "cpu") -> None:
        build, shape, batch_size = CASES[case]
        torch.manual_seed(0)
        model = build(shape).to(device)
        images = torch.randn(NUM_BATCHES * batch_size, *shape)
        data_set = TensorDataset(images, torch.randint(0, 10, (len(images),)))
        draws = torch.Generator().manual_seed(0)
        self.weights = list(model.parameters())
        self.model: nn.Module = model
        self.optimizer = torch.optim.SGD(self.weights, lr=0.05)
        loader = DataLoader(data_set, batch_size=batch_size, generator=draws)
        self.criterion: Any = nn.CrossEntropyLoss()
        if mode != "plain":
            self.model, self.optimizer, *rest, loader = ENGINES[mode]().make_private(
                module=model,
                optimizer=self.optimizer,
                data_loader=loader,
                criterion=self.criterion,
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                grad_sample_mode=mode,
                noise_generator=torch.Generator(device).manual_seed(0),
            )
            self.criterion = rest[0] if rest else self.criterion
        self._batches, self._device = _endless(loader, draws), device

    def step(self) -> dict[str, float]:
        """One step of the user's loop; seconds that it takes, by clock."""
        x, y = (t.to(self._device) for t in next(self._batches))

        def step() -> None:
            self.optimizer.zero_grad()
            self.criterion(self.model(x), y).backward()
            self.optimizer.step()

        return timed(step, self._device)


def _endless(
    loader: DataLoader, draws: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same epoch again and again: sizes repeat, as they do in a long training."""
    while True:
        draws.manual_seed(0)
        yield from loader


def compare(case: str, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """Step times of a case by mode, and the ratio to the better of Opacus's."""
    trainings = {mode: Training(case, mode, device) for mode in ENGINES}
    start = [w.detach().clone() for w in trainings["hooks"].weights]
    for training in trainings.values():
        for _ in range(NUM_BATCHES):  # page faults and one-time choices
            training.step()
    difference = _difference(trainings["fast"], trainings["hooks"], start)
    times: dict[str, list[dict[str, float]]] = {mode: [] for mode in trainings}
    order = list(trainings)
    for done in range(rounds):
        for mode in order if done % 2 else reversed(order):
            if done < 3 or not _is_slow(times[mode], times["fast"]):
                times[mode].append(trainings[mode].step())
    found = {clock: _ratios(times, clock) for clock in CLOCKS}
    return {"update_relative_difference": difference, "rounds": rounds, **found}


def _is_slow(mine: list[dict[str, float]], fast: list[dict[str, float]]) -> bool:
    """Whether a mode has been timed enough."""
    typical, best = (median(t["busy"] for t in times) for times in (mine, fast))
    return typical > SLOW * best


def _difference(ours: Training, theirs: Training, start: list[Tensor]) -> float:
    """Largest relative difference of what the updates added up to, by parameter."""
    triples = zip(ours.weights, theirs.weights, start, strict=True)
    return max(float((a - b).norm() / (b - w).norm()) for a, b, w in triples)


def _ratios(times: dict[str, list[dict[str, float]]], clock: str) -> dict[str, Any]:
    """Milliseconds by mode, and ratios within rounds."""
    seconds = {mode: [t[clock] for t in of] for mode, of in times.items()}
    better = min(("hooks", "ghost"), key=lambda mode: median(seconds[mode]))
    pairs = zip(seconds["fast"], seconds[better], strict=False)
    ratios = sorted(fast / other for fast, other in pairs)
    return {
        "better": better,
        "ratio": median(ratios),
        "range": [ratios[0], ratios[-1]],
        "milliseconds": {mode: 1e3 * median(of) for mode, of in seconds.items()},
    }


def measure(rounds: int = ROUNDS, cases: list[str] | None = None) -> dict[str, Any]:
    """Every case.

    Args:
        rounds: How often each mode is timed; even orders and odd ones are reversed.
        cases: Keys of ``CASES``; default: all.

    Returns:
        What ``table`` prints, to be written as JSON.
    """
    result: dict[str, Any] = {"environment": _environment(), "bars": BARS}
    result["steps"] = {case: compare(case, rounds) for case in cases or CASES}
    return result


def _environment() -> dict[str, Any]:
    """Versions and machine, and how busy it is: ratios at high load are noisy."""
    return {**environment(), "load_average": os.getloadavg()[0]}


def table(result: dict[str, Any]) -> str:
    """The rows of ``measure`` in words."""
    lines = []
    for case, row in result["steps"].items():
        busy, wall = row["busy"], row["wall"]
        shown = ", ".join(f"{m} {t:.1f}" for m, t in busy["milliseconds"].items())
        low, high = busy["range"]
        lines.append(
            f"fast step, {case:13} (bar {_bar(case):.2f})  {busy['ratio']:.3f} "
            f"[{low:.2f}-{high:.2f}] of {busy['better']}, wall {wall['ratio']:.3f}; "
            f"ms: {shown}; updates differ by {row['update_relative_difference']:.0e}"
        )
    return "\n".join(lines)


def _bar(case: str) -> float:
    """The bar of a case's model, at any batch size."""
    return BARS[case.rpartition("-")[0]]


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(args.rounds, args.cases)
    print(table(result))
    write_json(args.out, result)


if __name__ == "__main__":
    main()
