"""What does a rewind cost, how often is it free, and does a restart win?

    python -m benchmarks.filtered_rewind --data-root DIR --seeds 5

A small network is trained by DP-SGD (6 epochs of 5 updates, noise multiplier 2) on
images of Fashion-MNIST (5,000; a perceptron on halved images) and of CIFAR-10 (2,500;
two convolutions), from random weights and from a public start: ordinary SGD on 5,000
other images. The state of every update is saved. The training is made twice, once with
the deletion policy ε = 1 and once with ε = 8 (δ = 1e-5), because a policy is fixed
before it. The rewinds are those of the public ``Unlearner.rewind``, exact and with the
policy. What policies of ε = 2 and 4 would cost is read from the record of the first
training: recording does not depend on the policy.

free, cost  share of the examples whose deletion needs no computation, and mean share of
            the training to be run again over all examples; the same where the filter
            decides alone, with a state at every update and with one every epoch
rewound     test accuracy after rewinds that were really run: one random example that is
            not free, ten random ones, and an exact rewind of one
restart     test accuracy of ordinary SGD without noise from the same start, on all but
            ten examples, with as many samples as the mean rewind of one example. It is
            exact (ε = 0), and it is what a rewind has to beat. *Overtakes* is the cost
            at which it first is as accurate as the trained model

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
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import data
from benchmarks.common.command_line import parser_of
from benchmarks.common.models import mlp
from benchmarks.common.report import markdown
from benchmarks.common.seeds import add_options, over_seeds, publish, run_missing
from opacus_pi import PrivacyEngine, Recorder, Unlearner
from opacus_pi.accounting.filtered_rewind import (
    DeletionPolicy,
    restart_update,
    restart_updates,
)
from opacus_pi.recording import Checkpoints

OUT = Path("benchmarks/results/filtered_rewind.json")
EPSILONS = (1.0, 2.0, 4.0, 8.0)
OF_ONE, OF_GROUPS = 1.0, 8.0  # policies of trainings, and what is rewound in them
NUM_CHECKED = 2  # examples whose plan is compared with the shares
NUM_EVALUATIONS = 20  # of the restart
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
    public_epochs: int = 6
    sample_rate: float = 0.2
    num_epochs: int = 6
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
    for name, size in (("fashion-mnist", 5_000), ("cifar10", 2_500))
    for start in ("public", "random")
}


def new_model(case: Case) -> nn.Module:
    """Return an untrained network, drawn from torch's global generator."""
    if case.data == "fashion-mnist":
        halved = nn.AvgPool2d(2)
        return nn.Sequential(halved, *mlp((1, 14, 14), widths=(64,)))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
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


class Setting:
    """The data, the start and the restarts of one seed of a case.

    Args:
        case: What to train.
        seed: Of everything random.
        images: The data set.
    """

    def __init__(self, case: Case, seed: int, images: data.ImageData) -> None:
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

    def restarted(self, costs: list[float]) -> list[float]:
        """Return the test accuracy of restarts from the start, at given costs."""
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


class Trained:
    """One training under one deletion policy, and its rewinds.

    Args:
        setting: Data and start.
        epsilon: Of the policy.
        folder: An empty folder for the states.
    """

    def __init__(self, setting: Setting, epsilon: float, folder: Path) -> None:
        case = setting.case
        self.setting = setting
        self.policy = DeletionPolicy(epsilon, case.delta)
        self.states = Checkpoints(folder, every=1, deletion_policy=self.policy)
        self.engine = PrivacyEngine(
            accountant="prv", recorder=Recorder(checkpoints=self.states)
        )
        model = copy.deepcopy(setting.start).train()
        self.model, optimizer, loader = self.engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=case.learning_rate),
            data_loader=DataLoader(
                setting.private, batch_size=round(case.sample_rate * case.num_train)
            ),
            noise_multiplier=case.noise_multiplier,
            max_grad_norm=case.max_grad_norm,
        )
        for _ in range(case.num_epochs):
            for x, y in loader:
                optimizer.zero_grad()
                CRITERION(self.model(x), y).backward()
                optimizer.step()
        self.accuracy = accuracy(model, setting.test)
        self.record = self.states.record
        self.worst_case = float(self.engine.get_epsilon(case.delta))

    def unlearner(self) -> Unlearner:
        """Return an unlearner that has forgotten nothing yet."""
        seed = int(self.setting.rng.integers(2**62))
        return Unlearner(
            self.engine,
            criterion=CRITERION,
            generator=torch.Generator().manual_seed(seed),
        )

    def check_plans(self) -> None:
        """Compare the shares with the plans of the unlearner for a few examples.

        Raises:
            RuntimeError: If one differs.
        """
        some = self.setting.rng.choice(self.record.num_examples, NUM_CHECKED)
        plans = [
            self.unlearner().plan_rewind(
                [int(i)], checkpoints=self.states, deletion_policy=self.policy
            )
            for i in some
        ]
        expected = self.starts(self.policy.epsilon)[some]
        if [plan.start for plan in plans] != expected.tolist():
            raise RuntimeError("A plan differs from the filter and the worst case.")

    def starts(self, epsilon: float) -> NDArray[np.int64]:
        """Return for each single example after which update its rewind starts.

        Args:
            epsilon: Of the policy.
        """
        if self.worst_case <= epsilon:
            return np.full(self.record.num_examples, self.record.num_steps)
        return self.by_filter(epsilon, 1)

    def by_filter(self, epsilon: float, every: int) -> NDArray[np.int64]:
        """Return the same where the filter decides alone.

        Args:
            epsilon: Of the policy.
            every: Updates from state to state.
        """
        mu = DeletionPolicy(epsilon, self.setting.case.delta).mu
        return restart_updates(self.record, mu, range(0, self.record.num_steps, every))

    def costs(self, epsilon: float) -> dict[str, float]:
        """Return shares and costs of the deletions under a policy.

        Args:
            epsilon: Of the policy.
        """
        case, record = self.setting.case, self.record
        by_state = round(1 / case.sample_rate)
        group = self.setting.rng.choice(case.num_train, case.group_size, replace=False)
        mu = DeletionPolicy(epsilon, case.delta).mu
        of_group = restart_update(record, group, mu, self.states.steps)
        found = {"group_cost": 1 - of_group / record.num_steps}
        for name, starts in (
            ("", self.starts(epsilon)),
            ("filter_", self.by_filter(epsilon, 1)),
            ("sparse_", self.by_filter(epsilon, by_state)),
        ):
            found[f"{name}free"] = float((starts == record.num_steps).mean())
            found[f"{name}cost"] = float(1 - starts.mean() / record.num_steps)
        return found

    def exact_cost(self) -> float:
        """Return the mean cost of an exact rewind of one example."""
        first = np.minimum(self.record.first_updates(), self.record.num_steps + 1)
        return float(1 - (first - 1).mean() / self.record.num_steps)

    def rewound(
        self, forget: NDArray[np.int64], *, is_exact: bool = False
    ) -> tuple[float, float]:
        """Return the test accuracy after a rewind that is run, and its cost.

        Args:
            forget: The examples.
            is_exact: Whether to go back to before their first use, without the policy.
        """
        result = self.unlearner().rewind(
            self.setting.private,
            forget,
            checkpoints=self.states,
            deletion_policy=None if is_exact else self.policy,
        )
        cost = result.record["num_steps"] / self.record.num_steps
        return accuracy(result.model, self.setting.test), cost


def of_one(trained: Trained) -> dict[str, Any]:
    """Return what deletions cost, and two rewinds of one example that were run."""
    trained.check_plans()
    case, total = trained.setting.case, trained.record.num_steps
    starts = trained.starts(OF_ONE)
    expensive = np.flatnonzero(starts < total)
    one = trained.setting.rng.choice(expensive if expensive.size else case.num_train, 1)
    single, single_cost = trained.rewound(one)
    exact, exact_cost = trained.rewound(one, is_exact=True)
    return {
        "trained": trained.accuracy,
        "worst_case_epsilon": trained.worst_case,
        "exact_cost": trained.exact_cost(),
        "exact_accuracy": exact,
        "exact_run_cost": exact_cost,
        "single_accuracy": single,
        "single_run_cost": single_cost,
        "policies": {f"{e:g}": trained.costs(e) for e in EPSILONS},
    }


def of_groups(trained: Trained) -> dict[str, Any]:
    """Return a rewind of ten examples that was run, and one of a single example."""
    trained.check_plans()
    case, rng = trained.setting.case, trained.setting.rng
    group = rng.choice(case.num_train, case.group_size, replace=False)
    ten, ten_cost = trained.rewound(group)
    one, one_cost = trained.rewound(group[:1])
    return {
        "group_trained": trained.accuracy,
        "group_accuracy": ten,
        "group_run_cost": ten_cost,
        "free_accuracy": one,
        "free_run_cost": one_cost,
    }


def measure(case: Case, seed: int, images: data.ImageData) -> dict[str, Any]:
    """Train once for each policy; return accuracies, and what deletions cost."""
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setting = Setting(case, seed, images)
        for epsilon, rewinds in ((OF_ONE, of_one), (OF_GROUPS, of_groups)):
            with tempfile.TemporaryDirectory() as folder:
                found |= rewinds(Trained(setting, epsilon, Path(folder)))
    policies = found["policies"]
    costs = [policies[f"{epsilon:g}"]["cost"] for epsilon in EPSILONS]
    shares = [i / NUM_EVALUATIONS for i in range(NUM_EVALUATIONS + 1)]
    accuracies = setting.restarted([*costs, *shares])
    for epsilon, value in zip(EPSILONS, accuracies, strict=False):
        policies[f"{epsilon:g}"]["restart_accuracy"] = value
    curve = dict(zip(shares, accuracies[len(EPSILONS) :], strict=True))
    reached = [share for share, value in curve.items() if value >= found["trained"]]
    return found | {
        "start": curve[0.0],
        "full_restart": curve[1.0],
        "overtakes": min(reached, default=None),
    }


def table(cases: dict[str, Any]) -> str:
    """Return the Markdown page: trainings, what deletions cost, what rewinds gave."""
    runs = [("case", "seeds", *_RUNS.values())]
    rewinds = [("case", *_REWINDS.values())]
    costs = [("case", "ε", *_COSTS.values())]
    for name in (name for name in CASES if name in cases):
        seeds = list(cases[name]["seeds"].values())
        if not seeds:
            continue
        worst = over_seeds((seed["worst_case_epsilon"] for seed in seeds), ".2f")
        shares = [_cell(seeds, key) for key in _RUNS if key != "worst_case_epsilon"]
        runs.append((name, str(len(seeds)), worst, *shares))
        rewinds.append((name, *(_cell(seeds, key) for key in _REWINDS)))
        for epsilon in (f"{e:g}" for e in EPSILONS):
            found = [seed["policies"][epsilon] for seed in seeds]
            costs.append((name, epsilon, *(_cell(found, key) for key in _COSTS)))
    tables = (markdown(rows) for rows in (runs, costs, rewinds))
    return _NOTE + "\n\n".join(tables) + "\n"


_RUNS = {
    "worst_case_epsilon": "worst-case ε",
    "start": "start",
    "trained": "trained",
    "full_restart": "restart, whole cost",
    "overtakes": "restart overtakes at cost",
    "exact_cost": "cost, exact rewind",
}
_COSTS = {
    "free": "free",
    "cost": "cost",
    "filter_free": "free by the filter",
    "filter_cost": "cost by the filter",
    "sparse_free": "free by the filter, state per epoch",
    "sparse_cost": "cost by the filter, state per epoch",
    "group_cost": "cost, 10 examples",
    "restart_accuracy": "restart at equal cost",
}
_REWINDS = {
    "trained": "trained, ε = 1",
    "single_accuracy": "rewound, 1 example",
    "single_run_cost": "its cost",
    "exact_accuracy": "rewound exactly",
    "exact_run_cost": "its cost",
    "group_trained": "trained, ε = 8",
    "group_accuracy": "rewound, 10 examples",
    "group_run_cost": "its cost",
    "free_accuracy": "kept, 1 example",
    "free_run_cost": "its cost",
}


def _cell(found: list[dict[str, Any]], key: str) -> str:
    """Return a share over the seeds in percent; a dash where there is none."""
    values = [100 * one[key] for one in found if one.get(key) is not None]
    if not values:
        return "-"
    some = f" ({len(values)} of {len(found)})" if len(values) < len(found) else ""
    return over_seeds(values, ".1f") + some


_NOTE = """# Rewinds: how often free, at what cost, and whether a restart wins

Made by `python -m benchmarks.filtered_rewind`; its `--help` explains the columns.
δ = 1e-5, single examples unless it says otherwise. Everything but ε is in percent: mean
over seeds [least, largest]. *Cost* is the share of the training that is run again; in
the table of costs it is the mean over all examples, the free ones too. All rewinds were
run by `Unlearner.rewind`.

* **Above the worst case everything is free.** The accountant's ε for any example is
  2.71 here. With a policy of ε = 4 or 8 the trained model is kept for every single
  request, without states, filter or rewind. The columns *by the filter* say what the
  filter alone would give there: nothing that the worst case does not.
* **The filter helps below it, where gradients are small.** At ε = 1 and 2 it makes a
  quarter and a third of the deletions free on Fashion-MNIST from the public start, and
  about 1 % or less elsewhere. There one clipped update already exceeds the policy of
  ε = 1, so that a filtered rewind costs as much as an exact one. With one state per
  epoch nearly nothing is free at ε = 1, and ten examples go back almost to the start.
* **A restart wins from random weights.** Ordinary SGD from the same start, with as many
  samples as the mean rewind, forgets exactly (ε = 0) and is at ε = 1 and 2 far more
  accurate. A rewound model stays a DP-SGD model: as accurate as before, not more.
* **From the public start the two are close**, at most 2 points apart on average: the
  private training adds almost nothing to it on Fashion-MNIST, and about 2 points on
  CIFAR-10. That favours the restart, too: no noise, no states, and ε = 0.
* **What remains for rewinds** is the free share: it needs no computation and no access
  to the data that stay. Use the worst case where it suffices; restart where something
  must be trained again.

A longer training (150 updates on twice the images) gave the same picture: 30 and 37 %
free at ε = 1 and 2 on Fashion-MNIST from the public start, below 1 % elsewhere.

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
