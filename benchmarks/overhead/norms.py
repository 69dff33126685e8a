"""Time of per-example gradient norms of a batch, relative to plain training.

All contenders are timed in turn; the result is the median over rounds of the ratio to
the plain forward and backward pass of the same round. A contender is listed only if its
norms agree with norms computed in float64.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.layered_models import (
    LanguageModel,
    SequenceClassifier,
    UNet,
    recommender,
)
from benchmarks.common.models import build_model, mlp, small_cnn
from benchmarks.common.transformer import text_transformer
from benchmarks.overhead.peers import (
    CONTENDERS,
    CRITERION,
    OWN,
    Measure,
    Unsupported,
    rejections,
)
from benchmarks.overhead.table import Row
from benchmarks.overhead.timing import CLOCKS, Times, ratios, timed, typical
from opacus_pi.gradients.norm_engine import NormEngine

Batch = tuple[nn.Module, Tensor, Tensor]
SECONDS = 10.0  # of busy time for the quick contenders
ROUNDS = (7, 101)  # at least, at most
SLOW = 3.0  # contenders slower than this many plain passes get three rounds
AGREEMENT = 1e-3  # norms with a smaller relative error agree with float64
TARGETS = {
    "resnet18": 1.0,
    "vit": 1.05,
    "text": 1.15,
    "mlp": 0.67,
    "small-cnn": 1.3,
    "lstm": 2.0,
    "bags": 1.0,
    "unet": 1.4,
    "gpt": 1.2,
    "gpt-tied": 1.2,
}
SHOWN = {
    "resnet18": "ResNet-18 (GroupNorm, 32×32, B=32)",
    "vit": "ViT (dim 192, depth 6, B=32)",
    "text": "text transformer (20k embedding, T=128, B=32)",
    "mlp": "MLP 784-512-256-10, B=256",
    "small-cnn": "small CNN 28×28, B=256",
    "lstm": "LSTM (width 128, T=64, B=32)",
    "bags": "EmbeddingBag recommender (20k rows, T=64, B=256)",
    "unet": "U-Net (width 16, 32×32, B=16)",
    "gpt": "GPT (T=256, V=4096, B=8)",
    "gpt-tied": "GPT with tied embedding (T=256, V=4096, B=8)",
}


def make(case: str, device: str = "cpu") -> Batch:
    """Return a model with random weights, and one batch of random data."""
    torch.manual_seed(0)
    model, x, y = _made(case)
    return model.to(device), x.to(device), y.to(device)


def _made(case: str) -> Batch:
    """Return model and batch on the CPU."""
    small, colour = (1, 28, 28), (3, 32, 32)
    if case in _LAYERED:
        return _LAYERED[case]()
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


def _words(is_tied: bool) -> Batch:
    """Return a language model and its batch."""
    x, y = torch.randint(0, 4096, (2, 8, 256))
    return LanguageModel(is_tied=is_tied), x, y


_LAYERED: dict[str, Callable[[], Batch]] = {
    "lstm": lambda: (
        SequenceClassifier(),
        torch.randn(32, 64, 64),
        torch.randint(0, 10, (32,)),
    ),
    "bags": lambda: (
        recommender(),
        torch.randint(0, 20_000, (256, 64)),
        torch.randint(0, 10, (256,)),
    ),
    "unet": lambda: (
        UNet(),
        torch.randn(16, 3, 32, 32),
        torch.randint(0, 4, (16, 32, 32)),
    ),
    "gpt": lambda: _words(is_tied=False),
    "gpt-tied": lambda: _words(is_tied=True),
}


def exact_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the norms, computed in float64 throughout."""
    x = x.double() if x.is_floating_point() else x
    squares, _ = NormEngine(copy.deepcopy(model).double(), CRITERION).squares(x, y)
    return squares.sqrt()


def prepared(
    batch: Batch,
) -> tuple[dict[str, Measure], dict[str, float], dict[str, str]]:
    """Prepare every contender and check its norms.

    Returns:
        The contenders to be timed; the largest relative error of each; and why the
        others are left out.
    """
    truth = exact_norms(*batch)
    found, errors, left_out = {}, {}, {}
    for name, contender in CONTENDERS.items():
        model, x, y = batch
        try:
            with rejections(name):
                measure = contender(copy.deepcopy(model), x, y)
                norms = measure()  # also loads memory and makes one-time choices
        except Unsupported as reason:
            left_out[name] = str(reason)
            continue
        if norms is not None:
            errors[name] = float((norms.detach() / truth - 1).abs().max())
        if errors.get(name, 0.0) < AGREEMENT:
            found[name] = measure
        else:
            left_out[name] = f"its norms are off by up to {errors[name]:.1e}"
    return found, errors, left_out


def measure(case: str, device: str = "cpu") -> dict[str, Any]:
    """Return the time of each contender relative to the plain pass of the round."""
    contenders, errors, left_out = prepared(make(case, device))
    times: dict[str, Times] = {name: [] for name in contenders}
    order = list(contenders)
    while _needs_more(times):
        order.reverse()
        for name in order:
            if not _is_slow(times[name], times["plain"]):
                times[name].append(timed(contenders[name], device))
    return {
        "contenders": {
            name: {
                **{clock: ratios(of, times["plain"], clock) for clock in CLOCKS},
                "milliseconds": 1e3 * typical(of),
                "rounds": len(of),
                "max_relative_error": errors.get(name),
            }
            for name, of in times.items()
        },
        "left_out": left_out,
    }


def _needs_more(times: dict[str, Times]) -> bool:
    """Whether another round is needed."""
    done = len(times["plain"])
    quick = [of for of in times.values() if not _is_slow(of, times["plain"])]
    spent = sum(t["busy"] for of in quick for t in of)
    return done < ROUNDS[0] or (spent < SECONDS and done < ROUNDS[1])


def _is_slow(times: Times, plain: Times) -> bool:
    """Whether a contender is so slow that its three rounds are enough.

    Its fastest round decides: a contender that runs after one with gigabytes of
    gradients pays for the memory that this one has returned.
    """
    if len(times) < 3:
        return False
    return min(one["busy"] for one in times) > SLOW * typical(plain)


def rows(found: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows; the last one is computed: 35 sweeps in a run of 150 epochs."""
    for case, result in found.items():
        mine, *_ = peers = _by_name(result["contenders"])
        shown = [f"{name} {row['busy']['ratio']:.2f}" for name, row in peers[1:]]
        shown += [
            f"not {name}: {_why(why)}" for name, why in result["left_out"].items()
        ]
        quantity = f"norm sweep, {SHOWN[case]}"
        yield Row(quantity, TARGETS[case], mine[1], "; ".join(shown))
    if "resnet18" in found:
        contenders = found["resnet18"]["contenders"]
        share = {
            name: 35 / 150 * row["busy"]["ratio"] for name, row in contenders.items()
        }
        others = "; ".join(
            f"{name} {value:.2f}" for name, value in share.items() if name not in OWN
        )
        yield Row("35 sweeps over 150 epochs (ResNet-18)", 0.235, share["ours"], others)


def _why(error: str) -> str:
    """Return in a few words why a library is not listed; the file has its error."""
    if error.startswith(("ImportError", "ModuleNotFoundError")):
        return "not installed"
    return error if error.startswith("its norms") else "unsupported layers"


def _by_name(contenders: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return this library, the limit, then the other libraries, fastest first.

    Results that were stored before the loop was measured have no entry for it.
    """
    first = [n for n in ("ours", "ours in a loop", "limit") if n in contenders]
    rest = sorted(
        (name for name in contenders if name not in (*first, "plain")),
        key=lambda name: contenders[name]["busy"]["ratio"],
    )
    return [(name, contenders[name]) for name in first + rest]
