"""Norms in bfloat16, for ranking only: how well they rank, how far off, how fast.

    python -m benchmarks.ranking_precision --data-root DIR

``DIR`` holds Fashion-MNIST and CIFAR-10. Networks are trained on real images, two of
them until most examples are fitted, whose norms are tiny; then training examples are
measured as ``norm_sweep`` does with ``ranking_dtype=torch.bfloat16``, in float32, and
in float64. For want of data the text transformer keeps its random weights and reads
random tokens. Against the float64 norms: Spearman's correlation, the share of the
hardest tenth that is found, and relative errors.

Time is CPU time of one thread for one batch, in bfloat16 over float32, interleaved, for
the models of ``benchmarks.overhead`` with random weights; median over rounds. In
processes of their own: with the instructions that the CPU has, and with oneDNN, which
multiplies the matrices, held to those of older ones. Mean over seeds [least, largest].

Results are kept in ``benchmarks/results/ranking_precision.json`` after every seed, and
seeds that are there are not run again; the tables are beside it.
"""

import copy
import multiprocessing
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks import data
from benchmarks.facts import facts_of
from benchmarks.overhead.norms import SHOWN, make
from benchmarks.overhead.peers import CRITERION, ours
from benchmarks.overhead.timing import interleaved
from benchmarks.report import markdown
from benchmarks.seeds import arguments, over_seeds, publish, run_missing
from benchmarks.training import Recipe, train
from benchmarks.transformer import text_transformer
from opacus_pi.gradients import norm_sweep

OUT = Path("benchmarks/results/ranking_precision.json")
ISAS = {  # what oneDNN may use; the first: all that there is
    "this CPU": "DEFAULT",
    "AVX-512 without BF16": "AVX512_CORE_VNNI",
    "AVX2": "AVX2",
}
load = cache(data.load)


@dataclass(frozen=True)
class Trained:
    """A network, and the first so many of the examples that it was trained on."""

    data_set: str
    recipe: Recipe
    num_train: int
    num_measured: int

    def measure(self, seed: int, data_root: Path | None) -> dict[str, Any]:
        """Train, and compare norms."""
        images = load(self.data_set, data_root, self.num_train)
        shape = images.image_shape
        model, _ = train(self.recipe, images.train, shape, seed, num_checkpoints=1)
        return compared(model, *images.train[: self.num_measured])


@dataclass(frozen=True)
class Untrained:
    """The text transformer with random weights, on random tokens."""

    num_measured: int
    vocabulary: int = 20_000
    length: int = 128

    def measure(self, seed: int, data_root: Path | None) -> dict[str, Any]:
        """Compare norms."""
        torch.manual_seed(seed)
        model = text_transformer(self.vocabulary, self.length)
        tokens = torch.randint(self.vocabulary, (self.num_measured, self.length))
        return compared(model, tokens, torch.randint(4, (self.num_measured,)))


@dataclass(frozen=True)
class Timed:
    """A batch of models of ``benchmarks.overhead``, in so many rounds each."""

    num_rounds: dict[str, int]

    def measure(self, seed: int, data_root: Path | None) -> dict[str, Any]:
        """Time of bfloat16 over that of float32, by what oneDNN may use."""
        return {
            name: in_own_process(isa, time_ratios, self.num_rounds, seed)
            for name, isa in ISAS.items()
        }


def _on_images(data_set: str, model: str, num_epochs: int, *sizes: int) -> Trained:
    """All are trained alike, for as many epochs."""
    return Trained(data_set, Recipe(model, num_epochs, 32, 0.02, momentum=0.9), *sizes)


FASHION, CIFAR = "fashion-mnist", "cifar10"
NORMS = {
    "MLP, digits": _on_images("digits", "mlp", 40, 0, 1_437),
    "MLP, Fashion-MNIST, 3 epochs": _on_images(FASHION, "mlp", 3, 4_000, 2_000),
    "MLP, Fashion-MNIST, 25 epochs": _on_images(FASHION, "mlp", 25, 4_000, 2_000),
    "small CNN, Fashion-MNIST, 3 epochs": _on_images(
        FASHION, "small-cnn", 3, 4_000, 2_000
    ),
    "small CNN, Fashion-MNIST, 15 epochs": _on_images(
        FASHION, "small-cnn", 15, 4_000, 2_000
    ),
    "ResNet-18 of width 16, CIFAR-10, 5 epochs": _on_images(
        CIFAR, "resnet18-w16", 5, 500, 250
    ),
    "ViT, CIFAR-10, 3 epochs": _on_images(CIFAR, "vit", 3, 200, 100),
    "text transformer, random weights and tokens": Untrained(100),
}
ROUNDS = {"mlp": 9, "small-cnn": 3, "text": 2, "vit": 1, "resnet18": 1}
CASES = NORMS | {"time": Timed(ROUNDS)}


def compared(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Norms in either precision against those in float64."""
    wide = copy.deepcopy(model).double()
    exact = _norms(wide, x.double() if x.is_floating_point() else x, y)
    return {
        "bfloat16": agreement(_norms(model, x, y, torch.bfloat16), exact),
        "float32": agreement(_norms(model, x, y), exact),
        "exact_norms": np.quantile(exact, [0, 0.1, 0.5, 0.9, 1]).tolist(),
    }


def _norms(
    model: nn.Module, x: Tensor, y: Tensor, ranking_dtype: torch.dtype | None = None
) -> np.ndarray:
    """One pass over the examples."""
    examples = TensorDataset(x, y)
    return norm_sweep(
        model, CRITERION, examples, progress=False, ranking_dtype=ranking_dtype
    ).numpy()


def agreement(norms: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Of order and of size."""
    errors = abs(norms / exact - 1)
    size = max(1, len(exact) // 10)
    found, sought = (set(np.argsort(values)[-size:]) for values in (norms, exact))
    return {
        "spearman": float(stats.spearmanr(norms, exact).statistic),
        "hardest_tenth": len(found & sought) / size,
        "median_error": float(np.median(errors)),
        "p99_error": float(np.quantile(errors, 0.99)),
        "max_error": float(errors.max()),
    }


def in_own_process(isa: str, function: Any, *args: Any) -> Any:
    """Call where oneDNN, which looks once, finds this set of instructions."""
    name = "ONEDNN_MAX_CPU_ISA"
    before = os.environ.get(name)
    os.environ[name] = isa
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(function, args)
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def time_ratios(num_rounds: dict[str, int], seed: int) -> dict[str, Any]:
    """Time of a batch in bfloat16 over that in float32, by model."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"bfloat16": instructions()}
    for model, rounds in num_rounds.items():
        batch = make(model, seed=seed)
        plain, low = ours(*batch), ours(*batch, torch.bfloat16)
        for task in (plain, low):
            task()  # page faults and one-time choices
        found[model] = interleaved(plain, low, rounds)
    return found


def instructions() -> list[str]:
    """Those of the CPU that multiply bfloat16 (Linux; elsewhere none are known)."""
    path = Path("/proc/cpuinfo")
    words = set(path.read_text().split()) if path.exists() else set()
    return sorted(words & {"avx512_bf16", "amx_bf16", "bf16"})


_NOTE = """# Norms in bfloat16, for ranking only

Made by `python -m benchmarks.ranking_precision --data-root DIR`. Mean over seeds
[least, largest].

## Against norms in float64

Training examples of networks trained by SGD (learning rate 0.02, momentum 0.9, batches
of 32). Tenth: the share of the hardest tenth that is found. Errors are relative; beside
them the largest in float32.

"""
_HEAD = ("model", "Spearman", "tenth", "median error", "99 %", "largest", "float32")


def table(cases: dict[str, Any]) -> str:
    """Norms and times as Markdown."""
    rows = [_HEAD]
    for name in (name for name in NORMS if name in cases):
        seeds = list(cases[name]["seeds"].values())
        low = [seed["bfloat16"] for seed in seeds]
        order, share, *errors = (
            over_seeds((s[k] for s in low), _FORMS[k]) for k in low[0]
        )
        worst = over_seeds((s["float32"]["max_error"] for s in seeds), ".1e")
        rows.append((name, order, share, *errors, worst))
    text = _NOTE + markdown(rows) + "\n"
    return (
        text + _times(list(cases["time"]["seeds"].values()))
        if "time" in cases
        else text
    )


def _times(seeds: list[dict[str, Any]]) -> str:
    """The lower table."""
    own = [seed["this CPU"] for seed in seeds]
    has = ", ".join(own[0]["bfloat16"]) or "no instructions for bfloat16"
    rows = [("model", "ms in float32", *ISAS)]
    for model in ROUNDS:
        spent = over_seeds(times[model]["base_milliseconds"] for times in own)
        ratios = (
            over_seeds(seed[isa][model]["busy"]["ratio"] for seed in seeds)
            for isa in ISAS
        )
        rows.append((SHOWN[model], spent, *ratios))
    return (
        "\n## Time of a batch, in bfloat16 over float32\n\nCPU time of one thread, "
        f"interleaved, median over rounds. This CPU has {has}; in the other columns "
        "oneDNN was held to the instructions that they name.\n\n"
        f"{markdown(rows)}\n"
    )


_FORMS = {"spearman": ".5f", "hardest_tenth": ".3f"}
_FORMS |= dict.fromkeys(("median_error", "p99_error", "max_error"), ".2g")


def main() -> None:
    """Run the seeds that are missing, print the tables, write both files."""
    parser = arguments(__doc__, CASES, OUT)
    parser.add_argument("--data-root", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: facts_of(CASES[name]) for name in args.cases}

    def measure(name: str, seed: int) -> dict[str, Any]:
        return CASES[name].measure(seed, args.data_root)

    publish(args.out, table(run_missing(args.out, settings, args.seeds, measure)))


if __name__ == "__main__":
    main()
