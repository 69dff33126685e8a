"""Per-example gradient norms of a batch, relative to plain forward and backward.

Contenders interleaved, medians over rounds of the ratio to the same round's plain pass.
A peer is listed if its norms are ours.
"""

import copy
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.models import build_model, mlp, small_cnn
from benchmarks.common.transformer import text_transformer
from benchmarks.overhead.peers import CONTENDERS, CRITERION, Measure
from benchmarks.overhead.table import Row
from benchmarks.overhead.timing import CLOCKS, spread, timed
from opacus_pi.gradients.norm_engine import NormEngine

Batch = tuple[nn.Module, Tensor, Tensor]
SECONDS, ROUNDS = 10.0, (7, 101)  # busy, for the quick contenders; least, most
SLOW = 3.0  # contenders slower than this many plain passes get three rounds
AGREEMENT = 1e-3  # largest relative distance to float64 of norms that are the same
BARS = {"resnet18": 1.0, "vit": 0.95, "text": 1.12, "mlp": 0.66, "small-cnn": 1.3}
SHOWN = {
    "resnet18": "ResNet-18 (GroupNorm, 32×32, B=32)",
    "vit": "ViT (dim 192, depth 6, B=32)",
    "text": "text transformer (20k embedding, T=128, B=32)",
    "mlp": "MLP 784-512-256-10, B=256",
    "small-cnn": "small CNN 28×28, B=256",
}


def make(case: str, device: str = "cpu", seed: int = 0) -> Batch:
    """A model with random weights and one batch of random data."""
    torch.manual_seed(seed)
    model, x, y = _made(case)
    return model.to(device), x.to(device), y.to(device)


def _made(case: str) -> Batch:
    """The same, on the CPU."""
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


def exact_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Norms in float64 throughout."""
    x = x.double() if x.is_floating_point() else x
    squares, _ = NormEngine(copy.deepcopy(model).double(), CRITERION).squares(x, y)
    return squares.sqrt()


def prepared(
    batch: Batch, names: list[str]
) -> tuple[dict[str, Measure], dict[str, float], dict[str, str]]:
    """Contenders that are installed and right, their errors, and why others are not."""
    truth = exact_norms(*batch)
    found, errors, left_out = {}, {}, {}
    for name in names:
        model, x, y = batch
        try:
            measure = CONTENDERS[name](copy.deepcopy(model), x, y)
            norms = measure()  # page faults and one-time choices
        except Exception as error:  # a peer fails in its own ways
            if name in ("plain", "limit", "ours"):
                raise
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            continue
        if norms is not None:
            errors[name] = float((norms.detach() / truth - 1).abs().max())
        if errors.get(name, 0.0) < AGREEMENT:
            found[name] = measure
        else:
            left_out[name] = f"its norms are off by up to {errors[name]:.1e}"
    return found, errors, left_out


def measure(case: str, device: str = "cpu") -> dict[str, Any]:
    """Time of each contender over that of the plain pass in the same round."""
    contenders, errors, left_out = prepared(make(case, device), list(CONTENDERS))
    times: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    order = list(contenders)
    while _go_on(times):
        order.reverse()
        for name in order:
            if not _is_known(times[name], times["plain"]):
                times[name].append(timed(contenders[name], device))
    return {
        "contenders": {
            name: {
                **{clock: _ratios(of, times["plain"], clock) for clock in CLOCKS},
                "milliseconds": 1e3 * median(t["busy"] for t in of),
                "rounds": len(of),
                "max_relative_error": errors.get(name),
            }
            for name, of in times.items()
        },
        "left_out": left_out,
    }


def _go_on(times: dict[str, list[dict[str, float]]]) -> bool:
    """Whether there is to be another round."""
    done = len(times["plain"])
    quick = [of for of in times.values() if not _is_known(of, times["plain"])]
    spent = sum(t["busy"] for of in quick for t in of)
    return done < ROUNDS[0] or (spent < SECONDS and done < ROUNDS[1])


def _is_known(mine: list[dict[str, float]], plain: list[dict[str, float]]) -> bool:
    """Whether a slow contender has been timed enough."""
    if len(mine) < 3:
        return False
    typical, base = (median(t["busy"] for t in times) for times in (mine, plain))
    return typical > SLOW * base


def _ratios(
    mine: list[dict[str, float]], plain: list[dict[str, float]], clock: str
) -> dict[str, Any]:
    """How much longer than the plain pass of the round."""
    pairs = zip(mine, plain, strict=False)
    return spread([own[clock] / base[clock] for own, base in pairs])


def rows(found: dict[str, Any]) -> Iterator[Row]:
    """The table's lines; the last is arithmetic: 35 sweeps a run of 150 epochs."""
    for case, result in found.items():
        mine, *_ = peers = _by_name(result["contenders"])
        shown = [f"{name} {row['busy']['ratio']:.2f}" for name, row in peers[1:]]
        shown += [
            f"not {name}: {_why(why)}" for name, why in result["left_out"].items()
        ]
        yield Row(f"norm sweep, {SHOWN[case]}", BARS[case], mine[1], "; ".join(shown))
    if "resnet18" in found:
        contenders = found["resnet18"]["contenders"]
        share = {
            name: 35 / 150 * row["busy"]["ratio"] for name, row in contenders.items()
        }
        others = "; ".join(
            f"{name} {value:.2f}"
            for name, value in share.items()
            if name not in ("plain", "limit", "ours")
        )
        yield Row("35 sweeps over 150 epochs (ResNet-18)", 0.235, share["ours"], others)


def _why(error: str) -> str:
    """Why a peer is not listed, in few words; the file has its own."""
    if error.startswith(("ImportError", "ModuleNotFoundError")):
        return "not installed"
    return error if error.startswith("its norms") else "layers it does not know"


def _by_name(contenders: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Ours, then the floor, then the peers, the fastest first."""
    first = ["ours", "limit"]
    rest = sorted(
        (name for name in contenders if name not in (*first, "plain")),
        key=lambda name: contenders[name]["busy"]["ratio"],
    )
    return [(name, contenders[name]) for name in first + rest]
