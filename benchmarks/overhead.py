"""What per-example gradient norms cost, relative to a plain forward and backward pass.

    python -m benchmarks.overhead

One thread, thread CPU time, all contenders interleaved in one process, medians over
rounds of the ratio to the same round's plain pass; peak memory of each contender in a
process of its own. Then the relative error of the norms against float64 on a network
trained on digits; at last the rows of ``benchmarks.tracking``. Every figure is printed
and written to ``--out``.
"""

import argparse
import copy
import multiprocessing
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import data, tracking
from benchmarks.models import build_model, mlp, small_cnn
from benchmarks.norm_peers import CONTENDERS, CRITERION
from benchmarks.report import environment, write_json
from benchmarks.transformer import text_transformer
from opacus_pi.gradients.engine import NormEngine

Batch = tuple[nn.Module, Tensor, Tensor]
SLOW = 10.0  # contenders slower than this many plain passes get three rounds
BARS = {"resnet18": 1.0, "vit": 0.95, "text": 1.12, "mlp": 0.66, "small-cnn": 1.3}


def make(case: str) -> Batch:
    """A model with random weights and one batch of random data."""
    torch.manual_seed(0)
    small, colour = (1, 28, 28), (3, 32, 32)
    if case == "text":
        x = torch.randint(0, 20_000, (32, 128))
        return text_transformer(), x, torch.randint(0, 4, (32,))
    if case == "mlp":
        model, shape, b = mlp(small, widths=(512, 256)), small, 256
    elif case == "small-cnn":
        model, shape, b = small_cnn(small), small, 256
    else:
        model, shape, b = build_model(case, colour), colour, 32
    return model, torch.randn(b, *shape), torch.randint(0, 10, (b,))


def ratios(case: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Time of each contender over that of the plain pass in the same round."""
    model, x, y = make(case)
    contenders = {
        name: prepare(copy.deepcopy(model), x, y)
        for name, prepare in CONTENDERS.items()
    }
    truth = exact_norms(model, x, y)
    times = {name: [] for name in contenders}
    errors = {}
    for name, measure in contenders.items():
        norms = measure()  # page faults and one-time choices
        if norms is not None:
            errors[name] = float((norms.detach() / truth - 1).abs().max())
    for _ in range(rounds):
        for name, measure in contenders.items():
            spent = times[name]
            if len(spent) >= 3 and median(spent) > SLOW * median(times["plain"]):
                continue
            start = time.thread_time()
            measure()
            spent.append(time.thread_time() - start)
    return {
        name: {
            **_summary(spent, times["plain"]),
            "max_relative_error": errors.get(name),
        }
        for name, spent in times.items()
    }


def _summary(times: list[float], plain: list[float]) -> dict[str, Any]:
    """Median and range of the ratios, and the median time."""
    found = [mine / base for mine, base in zip(times, plain, strict=False)]
    return {
        "ratio": median(found),
        "range": [min(found), max(found)],
        "milliseconds": 1e3 * median(times),
        "rounds": len(found),
    }


def exact_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Norms in float64 throughout."""
    x = x.double() if x.is_floating_point() else x
    squares, _ = NormEngine(copy.deepcopy(model).double(), CRITERION).squares(x, y)
    return squares.sqrt()


def peak_memory(case: str, name: str) -> float:
    """MiB above model and data at the peak of two measurements (Linux)."""
    torch.set_num_threads(1)
    model, x, y = make(case)
    measure = CONTENDERS[name](model, x, y)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _resident("VmRSS")
    for _ in range(2):
        measure()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """This process's memory now (``VmRSS``) or at its peak (``VmHWM``), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def memory(case: str) -> dict[str, float]:
    """Peak memory of each contender, in MiB, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for name in CONTENDERS:
        with context.Pool(1) as pool:
            found[name] = pool.apply(peak_memory, (case, name))
    return found


def trained_errors(num_epochs: int) -> dict[str, dict[str, float]]:
    """Relative errors of the norms on a small CNN that has learned the digits."""
    torch.manual_seed(0)
    images, labels = data.load("digits").train.tensors
    images = F.interpolate(images, size=(28, 28), mode="bilinear")
    model = small_cnn((1, 28, 28))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(num_epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            CRITERION(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    truth = exact_norms(model, images, labels)
    found = {}
    for name in ("ours", "opacus-hooks", "opacus-ghost", "torch.func"):
        norms = CONTENDERS[name](copy.deepcopy(model), images, labels)().detach()
        errors = (norms / truth - 1).abs()
        found[name] = {
            "median": float(errors.median()),
            "p99": float(errors.quantile(0.99)),
            "max": float(errors.max()),
        }
    return found


def main() -> None:
    """Run every part, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=list(BARS), choices=list(BARS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/overhead_norms.json")
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"environment": environment(), "bars": BARS, "norms": {}}
    for case in args.cases:
        result["norms"][case] = found = ratios(case, args.rounds)
        shown = "  ".join(f"{name} {f['ratio']:.2f}" for name, f in found.items())
        print(f"{case:10} (bar {BARS[case]:.2f})  {shown}", flush=True)
    result["resnet18_peak_mebibytes"] = memory("resnet18")
    print("peak MiB, resnet18:", result["resnet18_peak_mebibytes"], flush=True)
    result["trained_relative_errors"] = trained_errors(num_epochs=60)
    for name, errors in result["trained_relative_errors"].items():
        print(f"error on a trained network, {name}:", errors)
    write_json(args.out, result)
    found = tracking.measure(list(tracking.CASES), tracking.ROUNDS)
    write_json(tracking.OUT, found)


if __name__ == "__main__":
    main()
