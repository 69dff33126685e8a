"""Errors of per-example gradient norms against float64, on a trained network.

A well-fitted example has a probability near 1 at its label. In float32 the difference
to 1 cancels, and the gradient norm loses its digits with it.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import data
from benchmarks.common.models import small_cnn
from benchmarks.overhead.norms import exact_norms
from benchmarks.overhead.peers import CONTENDERS, CRITERION, Unsupported, rejections
from benchmarks.overhead.table import Row

TARGET = 1e-5
NUM_EPOCHS = 60
NAMES = {"digits": "a small CNN trained on the digits"}


def measure(case: str) -> dict[str, Any]:
    """Return quantiles of each contender's relative errors, or why it has none."""
    torch.manual_seed(0)
    images, labels = data.load(case).train.tensors
    images = F.interpolate(images, size=(28, 28), mode="bilinear")
    model = small_cnn((1, 28, 28))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(NUM_EPOCHS):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            CRITERION(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    truth = exact_norms(model, images, labels)
    found: dict[str, Any] = {}
    for name in (name for name in CONTENDERS if name not in ("plain", "limit")):
        try:
            with rejections(name):
                norms = CONTENDERS[name](copy.deepcopy(model), images, labels)()
        except Unsupported as reason:
            found[name] = str(reason)
            continue
        errors = (norms.detach() / truth - 1).abs()
        found[name] = {
            "median": float(errors.median()),
            "p99": float(errors.quantile(0.99)),
            "max": float(errors.max()),
        }
    return found


def rows(found: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of the table."""
    for case, by_name in found.items():
        p99 = {n: e["p99"] for n, e in by_name.items() if isinstance(e, dict)}
        mine = p99.pop("ours")
        shown = "; ".join(f"{name} {error:.1e}" for name, error in p99.items())
        quantity = f"norm error against float64, 99th percentile, {NAMES[case]}"
        yield Row(quantity, TARGET, mine, shown, form=".1e")
