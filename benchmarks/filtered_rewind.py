"""What does a filtered rewind cost, how often is it free, and does a restart win?

    python -m benchmarks.filtered_rewind --data-root DIR --data cifar10 FILE.npz

A small network is trained by DP-SGD (15 epochs of 10 updates, noise multiplier 2) on
images of Fashion-MNIST (10,000; a perceptron on halved images) and of CIFAR-10 (5,000;
two convolutions), from random weights and from a public start: ordinary SGD on 5,000
other images. The state of every update is saved. Then, for ε = 1, 2, 4, 8 at δ = 1e-5:

free, cost  share of the examples whose deletion needs no computation, and mean share of
            the training to be run again over all examples; with a state at every
            update, and with one every epoch (10 updates)
rewound     test accuracy after rewinds that were really run: one random example, and at
            ε = 4 a group of ten random ones
restart     test accuracy of ordinary SGD without noise from the same start, on all but
            ten examples, with as many samples as the mean rewind of one example. It is
            exact (ε = 0), and it is what a filtered rewind has to beat

One budget holds for one policy. To compare several, the charges of one run are read
again for each ε; each row of the table is what a run with that policy would have given,
because recording does not depend on the policy.

Results are stored in ``benchmarks/results/filtered_rewind.json`` after every seed, and
stored seeds are not run again. The table is written beside this file.
"""

import copy
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import data
from benchmarks.common.command_line import parser_of
from benchmarks.common.models import mlp
from benchmarks.common.report import markdown
from benchmarks.common.seeds import add_options, over_seeds, publish, run_missing
from opacus_pi import PrivacyEngine, Recorder
from opacus_pi.accounting.filtered_rewind import (
    DeletionPolicy,
    restart_update,
    restart_updates,
)
from opacus_pi.integration.rerun import Rerun
from opacus_pi.models.own_losses import per_example_criterion
from opacus_pi.recording import Checkpoints

OUT = Path("benchmarks/results/filtered_rewind.json")
EPSILONS = (1.0, 2.0, 4.0, 8.0)
OF_GROUPS = 4.0  # the policy whose rewind of ten examples is run
CRITERION = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Case:
    """A training by DP-SGD, and what is measured of its rewinds.

    Attributes:
        data: Name of the data set.
        start: ``"public"`` or ``"random"``.
        num_train: Private images.
        num_public: Other images, for the public start.
        learning_rate: Of DP-SGD.
        sgd_learning_rate: Of the public start and of restarts, with momentum 0.9 and
            batches of 50.
    """

    data: str
    start: str
    num_train: int
    num_public: int = 5000
    public_epochs: int = 10
    sample_rate: float = 0.1
    num_epochs: int = 15
    noise_multiplier: float = 2.0
    max_grad_norm: float = 1.0
    learning_rate: float = 1.0
    sgd_learning_rate: float = 0.02
    group_size: int = 10
    delta: float = 1e-5

    @property
    def num_steps(self) -> int:
        """Updates of the training."""
        return round(self.num_epochs / self.sample_rate)


CASES = {
    f"{name}, {start}": Case(name, start, size)
    for name, size in (("fashion-mnist", 10_000), ("cifar10", 5_000))
    for start in ("public", "random")
}


def new_model(case: Case) -> nn.Module:
    """Return an untrained network, drawn from torch's global generator."""
    if case.data == "fashion-mnist":
        halved = nn.AvgPool2d(2)
        return nn.Sequential(halved, *mlp((1, 14, 14), widths=(64,)))
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """Return the share of test images that are classified correctly."""
    images, labels = test.tensors
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).double().mean())


def sgd(
    case: Case, model: nn.Module, train: TensorDataset, num_samples: int
) -> Iterator[int]:
    """Train without noise in place, and yield the samples used after each update."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=case.sgd_learning_rate, momentum=0.9
    )
    used = 0
    while used < num_samples:
        for x, y in DataLoader(train, batch_size=50, shuffle=True):
            model.train()
            optimizer.zero_grad()
            CRITERION(model(x), y).backward()
            optimizer.step()
            used += len(x)
            yield used
            if used >= num_samples:
                return


def train(case: Case, model: nn.Module, private: TensorDataset, folder: Path) -> Any:
    """Train by DP-SGD with a state saved at every update; return the engine."""
    recorder = Recorder(checkpoints=Checkpoints(folder, every=1))
    engine = PrivacyEngine(accountant="prv", recorder=recorder)
    prepared, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=case.learning_rate),
        data_loader=DataLoader(
            private, batch_size=round(case.sample_rate * case.num_train)
        ),
        noise_multiplier=case.noise_multiplier,
        max_grad_norm=case.max_grad_norm,
    )
    for _ in range(case.num_epochs):
        for x, y in loader:
            optimizer.zero_grad()
            CRITERION(prepared(x), y).backward()
            optimizer.step()
    return engine


class Trained:
    """One training, and the rewinds of it.

    Args:
        case: What to train.
        seed: Of everything random.
        images: The data set.
        folder: An empty folder for the states.
    """

    def __init__(
        self, case: Case, seed: int, images: data.ImageData, folder: Path
    ) -> None:
        torch.manual_seed(seed)
        self.case, self.rng = case, np.random.default_rng(seed)
        n, x, y = case.num_train, *images.train.tensors
        order = torch.from_numpy(self.rng.permutation(len(x)))
        own, public = order[:n], order[n : n + case.num_public]
        self.private = TensorDataset(x[own], y[own])
        self.test = images.test
        self.start = new_model(case)
        if case.start == "public":
            others = TensorDataset(x[public], y[public])
            samples = case.public_epochs * case.num_public
            for _ in sgd(case, self.start, others, samples):
                pass
        self.model = copy.deepcopy(self.start).train()
        self.engine = train(case, self.model, self.private, folder)
        self.states = self.engine.recorder.checkpoints
        self.record = self.states.record

    def rewound(self, forget: np.ndarray, update: int) -> float:
        """Return the test accuracy after the rest was trained again without a set."""
        if update == self.record.num_steps:
            return accuracy(self.model, self.test)
        rerun = Rerun(
            model=copy.deepcopy(self.start),
            criterion=per_example_criterion(CRITERION),
            train_set=self.private,
            record=self.record,
            state=self.states.load(update),
            forget=forget,
            generator=torch.Generator().manual_seed(int(self.rng.integers(2**62))),
        )
        for _ in rerun.run():
            pass
        return accuracy(rerun.model, self.test)

    def restarted(self, costs: list[float]) -> list[float]:
        """Return the test accuracy of restarts from the start, at rising costs."""
        case = self.case
        total = case.num_epochs * case.num_train
        kept = np.setdiff1d(
            np.arange(case.num_train), self.rng.choice(case.num_train, 10, False)
        )
        x, y = self.private.tensors
        retain = TensorDataset(x[kept], y[kept])
        model, found = copy.deepcopy(self.start), {}
        ends = sorted({round(cost * total) for cost in costs if cost > 0})
        for used in sgd(case, model, retain, max(ends, default=0)):
            while ends and used >= ends[0]:
                found[ends.pop(0)] = accuracy(model, self.test)
        start = accuracy(self.start, self.test)
        return [found.get(round(cost * total), start) for cost in costs]


def of_policy(trained: Trained, epsilon: float) -> dict[str, Any]:
    """Return shares and costs of all single deletions, and two rewinds that were run.

    Args:
        trained: The training.
        epsilon: Of the policy.
    """
    case, record, rng = trained.case, trained.record, trained.rng
    mu, total = DeletionPolicy(epsilon, case.delta).mu, record.num_steps
    states = range(total)
    single = restart_updates(record, mu, states)
    sparse = restart_updates(record, mu, range(0, total, round(1 / case.sample_rate)))
    group = rng.choice(case.num_train, case.group_size, replace=False)
    of_group = restart_update(record, group, mu, states)
    dear = np.flatnonzero(single < total)
    found = {
        "free": float((single == total).mean()),
        "cost": float(1 - single.mean() / total),
        "sparse_free": float((sparse == total).mean()),
        "sparse_cost": float(1 - sparse.mean() / total),
        "group_cost": 1 - of_group / total,
    }
    if epsilon == OF_GROUPS:
        found["group_accuracy"] = trained.rewound(group, of_group)
    if dear.size:
        one = int(rng.choice(dear))
        found["single_cost"] = 1 - int(single[one]) / total
        found["single_accuracy"] = trained.rewound(np.array([one]), int(single[one]))
    return found


def measure(case: Case, seed: int, images: data.ImageData) -> dict[str, Any]:
    """Train once; return accuracies, and what each policy would have cost."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = Trained(case, seed, images, Path(folder))
        found = {
            "start": accuracy(trained.start, trained.test),
            "trained": accuracy(trained.model, trained.test),
            "worst_case_epsilon": float(trained.engine.get_epsilon(case.delta)),
            "policies": {f"{e:g}": of_policy(trained, e) for e in EPSILONS},
        }
        costs = [found["policies"][f"{e:g}"]["cost"] for e in EPSILONS]
        *of_costs, full = trained.restarted([*costs, 1.0])
    for epsilon, value in zip(EPSILONS, of_costs, strict=True):
        found["policies"][f"{epsilon:g}"]["restart_accuracy"] = value
    return found | {"full_restart": full}


def table(cases: dict[str, Any]) -> str:
    """Return the Markdown page: one table of trainings, one of policies."""
    runs = [("case", "start", "trained", "restart, whole cost", "worst-case ε")]
    rows = [
        (
            "case",
            "ε",
            "free",
            "cost",
            "free, state per epoch",
            "cost, state per epoch",
            "cost, 10 examples",
            "rewound, 1 example",
            "rewound, 10 examples",
            "restart at equal cost",
        )
    ]
    for name in (name for name in CASES if name in cases):
        seeds = list(cases[name]["seeds"].values())
        if not seeds:
            continue
        keys = ("start", "trained", "full_restart")
        shares = [over_seeds((100 * s[k] for s in seeds), ".1f") for k in keys]
        worst = over_seeds((s["worst_case_epsilon"] for s in seeds), ".2f")
        runs.append((name, *shares, worst))
        for epsilon in (f"{e:g}" for e in EPSILONS):
            found = [s["policies"][epsilon] for s in seeds]
            rows.append((name, epsilon, *(_cell(found, key) for key in _COLUMNS)))
    return _NOTE + markdown(runs) + "\n\n" + markdown(rows) + "\n"


_COLUMNS = (
    "free",
    "cost",
    "sparse_free",
    "sparse_cost",
    "group_cost",
    "single_accuracy",
    "group_accuracy",
    "restart_accuracy",
)


def _cell(found: list[dict[str, float]], key: str) -> str:
    """Return a share over the seeds in percent; a dash where nothing was run."""
    values = [100 * one[key] for one in found if key in one]
    return over_seeds(values, ".1f") if values else "-"


_NOTE = """# Filtered rewind: how often free, at what cost, and whether a restart wins

Made by `python -m benchmarks.filtered_rewind`. δ = 1e-5, single examples unless it says
otherwise. Everything in percent: mean over seeds [least, largest]. *Cost* is the mean
share of the training that is run again, over all examples, the free ones too. A rewind
of one example was run for one random example whose deletion is not free. A dash: all
deletions are free, or nothing was run. The learning rate of DP-SGD was chosen from 0.5
and 1 on a seed that is not reported.

**A restart wins.** Ordinary SGD from the same start, with as many samples as the mean
rewind, forgets exactly (ε = 0) and is on average more accurate up to ε = 4, because a
rewound model stays a DP-SGD model, as accurate as before the rewind. Only at ε = 8 from
the public start, where little has to be run again, are the two equal within the spread.
What a filtered rewind gives instead: the free share of the requests needs no
computation and no access to the data that stay. That share is large only where most
gradients are small: below the worst case of the accountant (ε = 2.89, above which every
deletion is free without any rewind) it is 30 to 37 % on Fashion-MNIST from the public
start, and below 1 % elsewhere. With one state per epoch nearly nothing is free there,
and groups of ten go back almost to the start.

"""


def main() -> None:
    """Run the missing seeds, print the tables, and write both files."""
    parser = parser_of("benchmarks.filtered_rewind", __doc__)
    add_options(parser, CASES, OUT)
    parser.add_argument("--data-root", type=Path, help="torchvision's folder")
    parser.add_argument(
        "--data",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "FILE"),
        help="read a data set from an .npz file",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = {name: Path(path) for name, path in args.data}
    loaded: dict[str, data.ImageData] = {}

    def one(name: str, seed: int) -> dict[str, Any]:
        case = CASES[name]
        if case.data not in loaded:
            arrays = files.get(case.data)
            loaded[case.data] = data.load(
                case.data, args.data_root, arrays=arrays, num_test=5000
            )
        return measure(case, seed, loaded[case.data])

    settings = {name: asdict(CASES[name]) for name in args.cases}
    publish(args.out, table(run_missing(args.out, settings, args.seeds, one)))


if __name__ == "__main__":
    main()
