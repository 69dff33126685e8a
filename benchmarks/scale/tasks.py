"""The tasks that are measured: each prepares its data, and returns what to time.

A task takes a size and returns steps by name. The steps run one after the other in a
process of their own, so the first one finds empty caches. Data is synthetic, because
neither time nor memory depends on what it says.
"""

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opacus_pi.accounting import epsilons
from opacus_pi.accounting.group import group_worst_case_loss
from opacus_pi.evaluation.shadow_models import u_lira
from opacus_pi.ledger.gap_filling import fill_unobserved
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger
from opacus_pi.ledger.gram_ledger import GramLedger
from opacus_pi.ledger.mechanism import NoisySGD
from opacus_pi.unlearning.deletion_log import DeletionLog, verify

__all__ = ["TASKS", "Task"]

Steps = dict[str, Callable[[], object]]
NUM_ROWS = 35
DELTA = 1e-6


@dataclass(frozen=True)
class Task:
    """One line of the table.

    Args:
        what: What is measured.
        prepare: From a size to the steps.
        sizes: The sizes by default; the bar is for the last one.
        unit: What the size counts.
        seconds: The bar for each step, by name.
        mebibytes: The bar for the memory beyond the data, for all steps or by step.
    """

    what: str
    prepare: Callable[[int], Steps]
    sizes: tuple[int, ...]
    unit: str
    seconds: dict[str, float]
    mebibytes: float | dict[str, float] | None = None


def ledger_of(
    num_examples: int, num_steps: int = 1400, rate: float = 0.005, noise: float = 1.0
) -> GradNormLedger:
    """Return a ledger of 35 rows as an engine records it, with gaps."""
    random = np.random.default_rng(0)
    size = random.lognormal(0, 1.5, num_examples).astype(np.float32)
    norms = np.empty((NUM_ROWS, num_examples), np.float32)
    kept = 1 - (1 - rate) ** (num_steps / NUM_ROWS)
    for i, row in enumerate(norms):
        row[:] = size * random.lognormal(-1 - 2 * i / NUM_ROWS, 0.3, num_examples)
        row[random.random(num_examples, np.float32) > kept] = np.nan
    steps = np.linspace(num_steps / NUM_ROWS, num_steps, NUM_ROWS).astype(np.int64)
    mechanism = NoisySGD(num_steps, rate, noise, max_grad_norm=1.0)
    return GradNormLedger(mechanism, steps, norms, source="observed")


def _epsilons(num_examples: int) -> Steps:
    ledger = ledger_of(num_examples)

    def ask() -> object:
        return epsilons(ledger, DELTA)

    return {"first": ask, "asked again": ask}


def _six_examples(num_steps: int) -> Steps:
    norms = np.geomspace(0.01, 1, 6)[None] * np.ones((NUM_ROWS, 1))
    steps = np.linspace(num_steps / NUM_ROWS, num_steps, NUM_ROWS).astype(np.int64)
    noise = 0.001 * np.sqrt(num_steps)  # the same epsilon whatever the length
    mechanism = NoisySGD(num_steps, 1e-3, float(noise), max_grad_norm=1.0)
    ledger = GradNormLedger(mechanism, steps, norms)
    return {"epsilons": lambda: epsilons(ledger, DELTA)}


def _gap_filling(num_examples: int) -> Steps:
    norms = ledger_of(num_examples).grad_norms
    return {"fill": lambda: fill_unobserved(norms)}


def _files(num_examples: int) -> Steps:
    ledger = ledger_of(num_examples)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "ledger.safetensors"

    def load() -> object:
        loaded = GradNormLedger.load(path)
        folder.cleanup()
        return loaded

    return {"save": lambda: ledger.save(path), "load": load}


def _group(size: int) -> Steps:
    from opacus_pi.accounting.group import group_divergence

    random = np.random.default_rng(0)
    vectors = random.normal(size=(size, 50)) / 50
    mechanism = NoisySGD(1000, 0.01, 1.0, max_grad_norm=1.0)
    ledger = GramLedger(mechanism, [1000], (vectors @ vectors.T)[None])

    def bound() -> object:
        return [
            group_divergence(ledger, 8.0, method=name)
            for name in ("scalar", "operator_norm")
        ]

    def worst() -> object:
        return group_worst_case_loss(mechanism, size, 8.0)

    return {"bound": bound, "worst case": worst}


def _gradient_gram(size: int) -> Steps:
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    from benchmarks.common.resnet import resnet18
    from opacus_pi.gradients import gradient_gram

    class Counted(TensorDataset):
        reads = 0

        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            Counted.reads += 1
            return super().__getitem__(index)

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = resnet18((3, 32, 32), width=16)
    data = Counted(torch.randn(size, 3, 32, 32), torch.arange(size) % 10)

    def gram() -> object:
        found = gradient_gram(model, nn.CrossEntropyLoss(), data, range(size))
        # Two batches confirm a norm and measure the memory.
        if Counted.reads > 4 * size + 2 * 64:
            raise RuntimeError(f"{Counted.reads} examples were read.")
        return found

    return {"at most 4 passes": gram}


def _u_lira(num_examples: int) -> Steps:
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 256, num_examples))
    found = []

    def attack() -> object:
        found.append(u_lira(first, second))
        return found

    return {
        "attack": attack,
        "epsilons": lambda: found[0].epsilons(),
    }


def _deletion_log(num_requests: int) -> Steps:
    # Each entry waits for the disk; a file system in memory spares 100,000 waits.
    memory = Path("/dev/shm")
    folder = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
    log = DeletionLog(Path(folder.name) / "deletions.db")
    for i in range(num_requests):
        log.append("request", {"indices": [i]}, name=f"request-{i}")

    def one() -> object:
        return log.append("request", {"indices": [0]}, name="one more")

    def check() -> object:
        found = verify(log.path)
        folder.cleanup()
        return found

    return {"one request": one, "verify": check}


def _report(num_examples: int) -> Steps:
    from opacus_pi.report import write_report

    ledger = ledger_of(num_examples)
    folder = tempfile.TemporaryDirectory()
    page = Path(folder.name) / "report.html"

    def write() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write_report(page, ledger=ledger)
        if page.stat().st_size > 5_000_000:
            raise RuntimeError(f"The page has {page.stat().st_size} bytes.")
        folder.cleanup()
        return None

    return {"write": write}


TASKS = {
    "epsilons": Task(
        "`epsilons(delta)` of an engine's ledger, 35 rows, default tolerance",
        _epsilons,
        (50_000, 200_000, 1_280_000),
        "examples",
        {"first": 60.0, "asked again": 60.0},
        1024,
    ),
    "epsilons-50000": Task(
        "the same at 50,000 examples, 35 rows, default tolerance",
        _epsilons,
        (5_000, 50_000),
        "examples",
        {"first": 20.0, "asked again": 2.0},
    ),
    "six-examples": Task(
        "`epsilons` of six examples in a very long run",
        _six_examples,
        (10_000, 10_000_000, 1_000_000_000),
        "updates",
        {"epsilons": 1.0},
        50,
    ),
    "gap-filling": Task(
        "`fill_unobserved`, 35 rows",
        _gap_filling,
        (100_000, 1_000_000),
        "examples",
        {"fill": 3.0},
        410,
    ),
    "files": Task(
        "save and load a ledger, 35 rows",
        _files,
        (100_000, 1_000_000, 10_000_000),
        "examples",
        {"save": float("inf"), "load": float("inf")},
        # With the ledger of 1,335 MiB, saving may hold 1.1 times its size.
        {"save": 0.1 * 1335, "load": 1.1 * 1335},
    ),
    "group": Task(
        "bounds of a group, one row",
        _group,
        (100, 300, 1000),
        "examples in the group",
        {"bound": 1.0, "worst case": 1.0},
    ),
    "gradient-gram": Task(
        "`gradient_gram` of a ResNet-18 of a quarter of the width",
        _gradient_gram,
        (50, 200, 800),
        "examples",
        {"at most 4 passes": float("inf")},
        1024,
    ),
    "u-lira": Task(
        "U-LiRA, 2 x 256 models",
        _u_lira,
        (1_000, 10_000, 100_000),
        "examples",
        {"attack": 5.0, "epsilons": 5.0},
        512,
    ),
    "deletion-log": Task(
        "deletion log",
        _deletion_log,
        (1_000, 10_000, 100_000),
        "requests",
        {"one request": 0.1, "verify": 5.0},
    ),
    "report": Task(
        "report, 35 rows; the page is at most 5 MB",
        _report,
        (10_000, 100_000, 1_000_000),
        "examples",
        {"write": 20.0},
    ),
}
