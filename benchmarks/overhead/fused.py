"""One fused evaluation, compared with a separate pass for each of its seven numbers.

UA, mean loss and mean confidence need the forget set, RA the retain set, TA the test
set, membership inference all three, and the attacker's own accuracy the last two. With
f, r and t examples, one pass over each set costs f + r + t. A pass for each number
costs 4 f + 3 r + 3 t, so the fused evaluation costs 0.31 of it at the sizes used here.
If one attack gives both of its numbers, the separate passes cost 4 f + 2 r + 2 t; the
share is then 0.42, and no evaluation can do better.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.common.models import small_cnn
from benchmarks.overhead.table import Row
from benchmarks.overhead.timing import interleaved
from opacus_pi import evaluation

TARGET = 0.4
CASES = ["small-cnn"]
ROUNDS = 5
SIZES = {"forget": 1000, "retain": 2000, "test": 2000}
SHAPE = (1, 28, 28)


def measure(case: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the time of ``evaluation.evaluate`` relative to separate passes."""
    torch.manual_seed(0)
    model, criterion = small_cnn(SHAPE), nn.CrossEntropyLoss()
    sets = {
        name: TensorDataset(torch.randn(n, *SHAPE), torch.randint(0, 10, (n,)))
        for name, n in SIZES.items()
    }

    def predictions(name: str) -> evaluation.Predictions:
        return evaluation.predict(model, sets[name], criterion)

    def attack(*names: str) -> None:
        of = {name: predictions(name).confidences for name in names}
        forget = of.get("forget", of["test"])
        evaluation.membership_inference(of["retain"], of["test"], forget)

    def one_attack() -> None:
        evaluation.unlearning_accuracy(predictions("forget").correct)
        evaluation.accuracy(predictions("retain").correct)
        evaluation.accuracy(predictions("test").correct)
        predictions("forget").losses.mean()
        predictions("forget").confidences.mean()
        attack("forget", "retain", "test")

    def each_number() -> None:
        one_attack()
        attack("retain", "test")  # the attacker's own accuracy needs no forget set

    def fused() -> None:
        evaluation.evaluate(model, criterion, **sets)

    for call in (fused, one_attack):
        call()
    return {
        "a_pass_for_each_number": interleaved(each_number, fused, rounds),
        "one_attack_for_both_its_numbers": interleaved(one_attack, fused, rounds),
    }


def rows(found: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of the table."""
    for result in found.values():
        once = result["one_attack_for_both_its_numbers"]["busy"]["ratio"]
        comparison = (
            f"with one attack for both of its numbers {once:.3f} (least possible 0.417)"
        )
        quantity = "fused evaluation over a pass for each of its seven numbers"
        yield Row(quantity, TARGET, result["a_pass_for_each_number"], comparison)
