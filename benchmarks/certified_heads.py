"""What do certificates of linear heads cost, and how fast is the exact one computed?

    python -m benchmarks.certified_heads        # digits
    python -m benchmarks.certified_heads --data-root DIR

With --data-root, also Fashion-MNIST and CIFAR-10, whose files must be in DIR. With
--only cifar10, or another data set, or speed, the rest of the stored results is kept.

Routes: ε ≤ 1 at δ = 1e-5, both directions, by different methods on the same rows. The
rows of images in colour or of clothes are features of a small network that was trained
on other images of the data set: 12,000 of Fashion-MNIST, 40,000 of CIFAR-10.
Constants are fixed beforehand: rows of norm 1, L = 1 + λ (ridge) or ½ + λ (softmax).

Speed: examples whose exact ε is computed in one second, both directions, against the
number of features, on random rows with a spectrum like that of features.

Results: OUT/certified_heads.json, and docs/certified-heads.md.
"""

import json
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.command_line import parser_of
from benchmarks.common.head_data import (
    EXTRACTORS,
    NUM_CLASSES,
    HeadData,
    digits,
    network_features,
)
from benchmarks.common.report import environment, write_json
from benchmarks.common.report import markdown as table_of
from benchmarks.head_routes import (
    DELTA,
    EPSILON,
    NewtonHead,
    chien_steps,
    high_probability_steps,
    newton_noise,
)
from opacus_pi.unlearning.heads import RidgeHead, SoftmaxHead, unit_rows

ROOT = Path(__file__).parents[1]
WIDTHS = (64, 128, 256, 512, 1024)
NAMES = ("digits", *EXTRACTORS)
SAMPLE, SETS, FEW = 400, 5, 40
RIDGE = {"regularisation": 0.01, "num_steps": 1000, "noise_std": 3e-3}
SOFTMAX = {"regularisation": 0.003, "num_steps": 300, "noise_std": 0.05}


def routes(data: HeadData, num_seeds: int) -> Iterator[dict[str, Any]]:
    """Yield one row for each route."""
    sample = np.random.default_rng(0).permutation(len(data.train[1]))[:SAMPLE]
    sets = [sample[10 * i : 10 * i + 10] for i in range(SETS)]
    yield from _ridge(data, sample, sets, num_seeds)
    yield from _softmax(data, sample, sets, num_seeds)
    yield _newton(data, sample, num_seeds)


def _spread(values: Any) -> list[float]:
    """Return median and largest value."""
    return [float(np.median(values)), float(np.max(values))]


def _accuracies(data: HeadData, make: Any, forget: np.ndarray, num_seeds: int) -> dict:
    """Return test accuracies before and after forgetting a set, mean and deviation."""
    before, after = [], []
    for seed in range(num_seeds):
        head = make(seed).fit(*data.train)
        before.append(head.score(*data.test))
        head.forget(forget, epsilon=EPSILON, delta=DELTA)
        after.append(head.score(*data.test))
    return {
        name: [float(np.mean(v)), float(np.std(v, ddof=1))]
        for name, v in (("trained", before), ("unlearned", after))
    }


def _ridge(
    data: HeadData, sample: np.ndarray, sets: list[np.ndarray], num_seeds: int
) -> Iterator[dict[str, Any]]:
    """Yield the exact route and the one with high probability."""

    def make(seed: int) -> RidgeHead:
        return RidgeHead(num_classes=NUM_CLASSES, seed=seed, **RIDGE)

    head = make(0).fit(*data.train)
    shared = {"data": data.name, "head": "ridge", "retraining": head.num_steps}
    shared |= _accuracies(data, make, sets[0], num_seeds)
    yield shared | {
        "route": "exact (ours)",
        "noise": head.noise_std,
        "epsilon": _spread(head.epsilons(DELTA, indices=sample)),
        "steps": _spread(head.steps_to(EPSILON, DELTA, indices=sample)),
        "steps of ten": _spread([head.cost(s, delta=DELTA).num_steps for s in sets]),
    }
    pairs = [
        high_probability_steps(head, head._features[i], head._targets[i])
        for i in sample[:FEW]
    ]
    epsilons, steps = zip(*pairs, strict=True)
    yield shared | {
        "route": "high probability (Benarroch et al. 2026, reconstructed)",
        "noise": head.noise_std,
        "epsilon": _spread(epsilons),
        "steps": _spread(steps),
        "steps of ten": None,
    }


def _softmax(
    data: HeadData, sample: np.ndarray, sets: list[np.ndarray], num_seeds: int
) -> Iterator[dict[str, Any]]:
    """Yield the bound with data-free constants, and that of Chien et al."""

    def make(seed: int) -> SoftmaxHead:
        return SoftmaxHead(num_classes=NUM_CLASSES, seed=seed, **SOFTMAX)

    head = make(0).fit(*data.train)
    shared = {"data": data.name, "head": "softmax", "retraining": head.num_steps}
    shared |= _accuracies(data, make, sets[0], num_seeds) | {"noise": head.noise_std}
    yield shared | {
        "route": "shifted divergence (ours)",
        "epsilon": _spread(head.epsilons(DELTA, indices=sample)),
        "steps": _spread(head.steps_to(EPSILON, DELTA, indices=sample)),
        "steps of ten": _spread([head.cost(s, delta=DELTA).num_steps for s in sets]),
    }
    one, ten = chien_steps(head, 1), chien_steps(head, 10)
    yield shared | {
        "route": "Chien et al. 2024",
        "epsilon": [one[0]] * 2,
        "steps": [float(one[1])] * 2,
        "steps of ten": [float(ten[1])] * 2,
    }


def _newton(data: HeadData, sample: np.ndarray, num_seeds: int) -> dict[str, Any]:
    """Return the row of Newton removal, with noise for the worst of the sample."""
    rows, labels = data.train
    penalty = SOFTMAX["regularisation"]
    plain = NewtonHead(rows, labels, penalty, 0.0, np.random.default_rng(0))
    residuals = plain.residuals(sample)
    sigma = newton_noise(float(residuals.max()))
    scores = [
        NewtonHead(rows, labels, penalty, sigma, np.random.default_rng(s)).score(
            *data.test
        )
        for s in range(num_seeds)
    ]
    return {
        "data": data.name,
        "head": "one against all",
        "route": "Newton removal with noise (Guo et al. 2020)",
        "noise": sigma,
        "epsilon": [EPSILON * float(np.median(residuals) / residuals.max()), EPSILON],
        "steps": [1.0, 1.0],
        "steps of ten": None,
        "retraining": None,
        "trained": [float(np.mean(scores)), float(np.std(scores, ddof=1))],
        "unlearned": None,
    }


def speed(width: int, num_rows: int, num_dense: int = 3) -> dict[str, float]:
    """Return how many examples a second are compared, in few dimensions and in all.

    Args:
        width: Features.
        num_rows: Rows of training.
        num_dense: Examples that are compared in all dimensions.
    """
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(num_rows, width)) * np.arange(1, width + 1) ** -0.7
    labels = rng.integers(NUM_CLASSES, size=num_rows)
    head = RidgeHead(num_classes=NUM_CLASSES, seed=0, **RIDGE)
    head.fit(unit_rows(rows), labels)
    begin = time.perf_counter()
    small = head._compression()
    prepared = time.perf_counter() - begin
    times, used = [], []
    for _ in range(3):
        begin, cpu = time.perf_counter(), time.process_time()
        found = head.epsilons(DELTA)
        times.append(time.perf_counter() - begin)
        used.append(time.process_time() - cpu)
    begin, some = time.perf_counter(), np.arange(num_dense)
    exact = head._one_by_one(some, [0], DELTA, "hockey-stick")[0]
    dense = (time.perf_counter() - begin) / num_dense
    return {
        "features": width,
        "examples": num_rows,
        "functions": small.functions.shape[1],
        "preparation": prepared,
        "per second": num_rows / min(times),
        "core milliseconds": 1e3 * min(used) / num_rows,
        "dense milliseconds": 1e3 * dense,
        "largest excess": float((found[some] / exact - 1).max()),
    }


def speeds(num_rows: int) -> dict[str, Any]:
    """Return the speed at every width, and the load of the machine meanwhile."""
    found = [speed(width, num_rows) for width in WIDTHS]
    return {"speed": found, "load": os.getloadavg()[0]}


def markdown(found: dict[str, Any]) -> str:
    """Return the page of the results."""
    head = ("data", "head and route", "noise", "ε before", "steps to ε ≤ 1", "ten")
    head += ("retraining", "accuracy, trained", "unlearned ten")
    rows: list[tuple[str, ...]] = [head]
    for row in found["routes"]:
        rows.append(
            (
                row["data"],
                f"{row['head']}: {row['route']}",
                f"{row['noise']:.2g}",
                _pair(row["epsilon"], ".2f"),
                _pair(row["steps"], ".0f"),
                _pair(row["steps of ten"], ".0f"),
                str(row["retraining"] or "–"),
                _percent(row["trained"]),
                _percent(row["unlearned"]),
            )
        )
    speeds: list[tuple[str, ...]] = [
        ("features", "functions", "examples a second", "core ms each", "in all "
         "dimensions, ms", "largest excess")
    ]  # fmt: skip
    for row in found["speed"]:
        speeds.append(
            (
                str(row["features"]),
                str(row["functions"]),
                f"{row['per second']:.0f}",
                f"{row['core milliseconds']:.2f}",
                f"{row['dense milliseconds']:.0f}",
                f"{row['largest excess']:.0e}",
            )
        )
    return _PAGE.format(
        routes=table_of(rows),
        speed=table_of(speeds),
        seeds=found["num_seeds"],
        cores=found["environment"]["cores"],
        load=found["load"],
    )


def _pair(values: list[float] | None, form: str) -> str:
    """Return median and largest value as text."""
    return "–" if values is None else " / ".join(f"{v:{form}}" for v in values)


def _percent(values: list[float] | None) -> str:
    """Return mean and standard deviation in percent as text."""
    return "–" if values is None else f"{100 * values[0]:.1f} ± {100 * values[1]:.1f}"


_PAGE = """# Certified heads: cost and speed

This page compares routes to a certificate for linear heads, and says how fast the
exact one is computed. [Heads that forget with a certificate](how-to/heads.md) shows
how to use them.

```text
python -m benchmarks.certified_heads --data-root DIR
```

## Cost

ε ≤ 1 at δ = 1e-5. Pairs are the median and the largest of 400 examples (40 for the
route with high probability), or of 5 random sets of ten. Accuracies are those on the
test set: mean ± standard deviation of {seeds} seeds of the noise. *Noise* is the
standard deviation that a step adds to a weight. For Newton removal it is that of the
linear term of the objective, a sum over all rows.

{routes}

How to read it:

* Of these routes only the exact one and the route with high probability distinguish
  examples. The exact one has no slack.
* The features of Fashion-MNIST and CIFAR-10 come from a small network that was trained
  on other images of the data set (12,000 and 40,000) and then frozen. It is weak on
  CIFAR-10, and that limits the accuracy of all routes.
* Retraining is always possible. Where the steps are not far below those of retraining,
  retrain: that gives ε = 0.
* A ridge head can also be solved in closed form. Then one removal costs less than an
  unlearning step, and is exact. The certificate is for heads that must be trained by
  noisy steps, and it is a measure of how hard each example is to forget.
* The text of Benarroch et al. 2026 was not available to us beyond its abstract and
  summaries. The row is our reconstruction of the route that they describe. It holds
  except with probability δ/2.
* Chien et al. bound replaced points, the others removed ones. Their bound is evaluated
  with the tighter conversion.
* Newton removal makes one step. Its noise is large enough to hide the error of this
  step for the worst example of the sample. The constant of the Gaussian mechanism and
  the bound are the published ones.

## Speed

ε of every example before unlearning, both directions, 10 classes, on {cores} cores that
other programs used as well (load average {load:.1f}). *Core ms* counts the processor
time of one example, so two free cores do 2000 / *core ms* examples a second. *Largest
excess* compares with the same examples in all dimensions: it is what rounding up has
added.

{speed}

The work grows with the square of the number of features at most: every row is turned
into the eigenbasis of all rows. The number of functions hardly grows. In all dimensions
it grows with the cube.

## Which examples are hard to forget?

The exact ε of examples against scores that need less, on digits:

![Scores against the exact ε](head_difficulty.png)

`python -m benchmarks.head_difficulty` makes the figure, and its `--help` explains the
scores.
"""


def main() -> None:
    """Parse the command line, run everything, and write the results."""
    parser = parser_of("benchmarks.certified_heads", __doc__)
    parser.add_argument("--data-root", type=Path, help="folder of torchvision's data")
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--num-train", type=int, default=5000)
    parser.add_argument("--num-rows", type=int, default=2000, help="of the speed part")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs")
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--only", choices=NAMES, help="measure one data set, keep what is stored"
    )
    only.add_argument(
        "--only-speed", action="store_true", help="keep the routes that are stored"
    )
    args = parser.parse_args()
    named = NAMES if args.data_root is not None else NAMES[:1]
    if args.only:
        named = (args.only,)
    measured = () if args.only_speed else named
    rows = [
        row for name in measured for row in routes(_data(name, args), args.num_seeds)
    ]
    publish(_joined(rows, args), args)


def _data(name: str, args: Namespace) -> HeadData:
    """Return the rows of one data set."""
    if name == "digits":
        return digits()
    return network_features(name, args.data_root, args.num_train)


def _joined(rows: list[dict[str, Any]], args: Namespace) -> dict[str, Any]:
    """Return all results: those measured now, and otherwise those that are stored."""
    found: dict[str, Any] = {}
    if args.only or args.only_speed:
        found = json.loads((args.out / "certified_heads.json").read_text("utf-8"))
    new = {row["data"] for row in rows}
    kept = [row for row in found.get("routes", []) if row["data"] not in new]
    found |= {"settings": {"ridge": RIDGE, "softmax": SOFTMAX, "delta": DELTA}}
    found |= {"routes": [*kept, *rows]}
    if not args.only:
        found |= {"num_seeds": args.num_seeds} | speeds(args.num_rows)
        found |= {"environment": environment()}
    return found


def publish(found: dict[str, Any], args: Namespace) -> None:
    """Write the results and their page."""
    write_json(args.out / "certified_heads.json", found)
    page = markdown(found)
    (args.page / "certified-heads.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
