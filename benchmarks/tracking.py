"""What tracking every example adds to a training step, and what one evaluation saves.

    python -m benchmarks.tracking

A training step with ``opacus_pi.PrivacyEngine`` over the same step with Opacus's own:
the same Poisson batches, from the loader to the weights, interleaved (Opacus, ours,
ours, Opacus) in one process on one thread. ``control`` is Opacus over itself: what the
machine's noise looks like. Then one fused evaluation over a pass for each number.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import opacus
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import opacus_pi
from benchmarks.models import mlp, small_cnn
from benchmarks.report import environment, write_json
from benchmarks.resnet import resnet18
from opacus_pi import evaluation

Step = Callable[[], None]
SMALL, COLOUR = (1, 28, 28), (3, 32, 32)
CASES = {  # model, image shape, expected batch size
    "small-cnn": (small_cnn, SMALL, 64),
    "mlp": (lambda shape: mlp(shape, widths=(512, 256)), SMALL, 64),
    "resnet18-w16": (lambda shape: resnet18(shape, width=16), COLOUR, 32),
}
BARS = {"hooks": 1.02, "ghost": 1.05, "evaluation": 0.4}
NUM_BATCHES = 16  # of an epoch
ROUNDS = 41
OUT = Path("benchmarks/results/overhead_tracking.json")
CLOCKS = {"cpu": time.thread_time, "wall": time.perf_counter}


def training(engine: opacus.PrivacyEngine, case: str, mode: str) -> Step:
    """A function that makes one step; functions made alike make the same steps."""
    build, shape, batch_size = CASES[case]
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


def tracking(case: str, mode: str, rounds: int) -> dict[str, Any]:
    """Ratios of step times, ours over Opacus's, after checking that weights agree."""
    plain = training(opacus.PrivacyEngine(), case, mode)
    ours = training(opacus_pi.PrivacyEngine(), case, mode)
    again = training(opacus.PrivacyEngine(), case, mode)
    for step in (plain, ours, again) * 4:
        step()  # page faults and one-time choices
    found = {"tracked": interleaved(plain, ours, rounds)}
    pairs = zip(plain.weights, ours.weights, strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise RuntimeError(f"Tracking changed the weights of {case}, {mode}.")
    for _ in range(2 * rounds):
        again()  # to where the others are: the batches to come are the same
    found["control"] = interleaved(plain, again, rounds)
    return found


def interleaved(base: Step, other: Step, rounds: int) -> dict[str, Any]:
    """Time of ``other`` over that of ``base``, by clock."""
    found: dict[str, list[float]] = {name: [] for name in CLOCKS}
    spent: list[float] = []
    for _ in range(rounds):
        times = [_timed(step) for step in (base, other, other, base)]
        spent += [times[0]["cpu"], times[3]["cpu"]]
        for name, ratios in found.items():
            first, second, third, fourth = (t[name] for t in times)
            ratios.append((second + third) / (first + fourth))
    result: dict[str, Any] = {n: _summary(ratios) for n, ratios in found.items()}
    return {**result, "base_milliseconds": 1e3 * median(spent), "rounds": rounds}


def _timed(step: Step) -> dict[str, float]:
    """Seconds that a call takes, by clock."""
    starts = {name: clock() for name, clock in CLOCKS.items()}
    step()
    return {name: clock() - starts[name] for name, clock in CLOCKS.items()}


def _summary(ratios: list[float]) -> dict[str, Any]:
    """Median, quartiles and range."""
    ordered = sorted(ratios)
    n = len(ordered)
    return {
        "ratio": median(ordered),
        "quartiles": [ordered[n // 4], ordered[(3 * n) // 4]],
        "range": [ordered[0], ordered[-1]],
    }


def one_pass(rounds: int) -> dict[str, Any]:
    """``evaluation.evaluate`` over a pass for each of its numbers."""
    torch.manual_seed(0)
    model, criterion = small_cnn(SMALL), nn.CrossEntropyLoss()
    sizes = {"forget": 1000, "retain": 2000, "test": 2000}
    sets = {
        name: TensorDataset(torch.randn(n, *SMALL), torch.randint(0, 10, (n,)))
        for name, n in sizes.items()
    }

    def predictions(name: str) -> evaluation.Predictions:
        return evaluation.predict(model, sets[name], criterion)

    def attack(*names: str) -> None:
        of = {name: predictions(name).confidences for name in names}
        forget = of.get("forget", of["test"])
        evaluation.membership_inference(of["retain"], of["test"], forget)

    def separate() -> None:
        evaluation.unlearning_accuracy(predictions("forget").correct)
        evaluation.accuracy(predictions("retain").correct)
        evaluation.accuracy(predictions("test").correct)
        predictions("forget").losses.mean()
        predictions("forget").confidences.mean()
        attack("forget", "retain", "test")

    def separate_attacker() -> None:
        separate()
        attack("retain", "test")  # the attacker's own accuracy needs no forget set

    def fused() -> None:
        evaluation.evaluate(model, criterion, **sets)

    for call in (fused, separate):
        call()
    return {
        "sizes": sizes,
        "a_pass_for_each_number": interleaved(separate_attacker, fused, rounds),
        "one_attack_for_both_its_numbers": interleaved(separate, fused, rounds),
    }


def measure(cases: list[str], rounds: int) -> dict[str, Any]:
    """Every row, printed as it is found."""
    result: dict[str, Any] = {"environment": _environment(), "bars": BARS, "steps": {}}
    for case in cases:
        for mode in ("hooks", "ghost"):
            found = tracking(case, mode, rounds)
            result["steps"][f"{case}, {mode}"] = found
            print(
                f"{case:13} {mode:6} (bar {BARS[mode]:.2f})  {_shown(found)}",
                flush=True,
            )
    result["evaluation"] = found = one_pass(max(5, rounds // 6))
    rows = {name: row for name, row in found.items() if name != "sizes"}
    print(f"one evaluation pass (bar {BARS['evaluation']:.2f})  {_shown(rows)}")
    return result


def _environment() -> dict[str, Any]:
    """Versions and machine, and how busy it is: ratios at high load are noisy."""
    return {**environment(), "load_average": os.getloadavg()[0]}


def _shown(rows: dict[str, dict[str, Any]]) -> str:
    """Rows in words."""
    return "  ".join(
        f"{name} {row['cpu']['ratio']:.3f} [{row['cpu']['range'][0]:.2f}-"
        f"{row['cpu']['range'][1]:.2f}] wall {row['wall']['ratio']:.3f}"
        for name, row in rows.items()
    )


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    write_json(args.out, measure(args.cases, args.rounds))


if __name__ == "__main__":
    main()
