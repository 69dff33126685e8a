"""``opacus-pi evaluate``: has a model forgotten, judged beside retrained ones."""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from opacus_pi.cli.arguments import (
    add_data,
    add_forget,
    add_model,
    add_output,
    criterion,
    data_set,
    indices,
    model,
)
from opacus_pi.cli.errors import BadInput
from opacus_pi.cli.output import answer, cell, table
from opacus_pi.cli.sets import Sets, make_sets, require_unseen
from opacus_pi.evaluation import (
    aligned,
    loss_barrier,
    pairwise_barriers,
    permutation_spec,
)
from opacus_pi.report import Barriers
from opacus_pi.report.run import MEANING

FORMAT = "opacus_pi.cli.evaluate.v1"
HELP = "accuracies, membership inference, and the distance from retrained models"
DESCRIPTION = """\
Metrics of one model on the forget set, on a part of what stays (as large as the test
set) and on the test set. No value is good in itself: name the weights of models
retrained without the forget set (--oracle) to see the values to reach, and the loss
barriers to them.

--model, --data and --test import and run your own code."""
EXAMPLES = (
    """\
the metrics:
"""
    + "\n".join(f"  {name:21}{words}" for name, words in MEANING.items())
    + """

examples:
  opacus-pi evaluate --model my_project:build --weights forgotten/weights.safetensors \\
      --data my_project:train_set --test my_project:test_set --forget ids.txt
  opacus-pi evaluate --model my_project:build --weights forgotten/weights.safetensors \\
      --data my_project:train_set --test my_project:test_set --forget ids.txt \\
      --oracle retrained1.pt retrained2.pt --match --out forgotten/evaluation.json"""
)
_NUM_POINTS = 2000  # of the training set, for the barriers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser, weights=True)
    add_data(parser, test_is_required=True)
    add_forget(parser)
    parser.add_argument(
        "--oracle",
        nargs="+",
        metavar="WEIGHTS",
        default=[],
        help="state dicts of models retrained without the forget set",
    )
    parser.add_argument(
        "--match",
        action="store_true",
        help="match hidden units before the barriers are taken",
    )
    add_output(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate and print."""
    train_set = data_set("--data", options.train_set)
    test_set = data_set("--test", options.test_set)
    require_unseen(train_set, test_set)
    forget = indices(options.forget_indices)
    sets = make_sets(train_set, test_set, forget, criterion(options), options.seed)
    network = model(options, options.weights)
    oracles = [model(options, path, "--oracle") for path in options.oracle]
    _require_others(options, [network, *oracles])
    found = [sets.metrics(oracle) for oracle in oracles]
    metrics = sets.metrics(network)
    barriers = _barriers(network, oracles, sets, options.match)
    facts = {
        "format": FORMAT,
        "num_forget": len(sets.forget),
        "num_retain": len(sets.retain),
        "num_test": len(test_set),
        "metrics": metrics,
        "oracle": {k: [one[k] for one in found] for k in metrics} if found else None,
        "barriers": barriers,
    }
    answer(options, facts, _words(facts, barriers))
    return 0


def _require_others(options: argparse.Namespace, models: list[nn.Module]) -> None:
    """Refuse an oracle with the weights of the judged model, or of another oracle."""
    files = [f"--weights {options.weights}", *options.oracle]
    states = [model.state_dict() for model in models]
    for k in range(1, len(states)):
        for i in range(k):
            if _equal(states[i], states[k]):
                raise BadInput(
                    f"--oracle: {files[k]} holds the same weights as {files[i]}, so "
                    "every distance between them is 0. Name weights of models that "
                    "were retrained without the forget set, each with a seed of its "
                    "own."
                )


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two state dicts of one architecture hold the same tensors."""
    return all(
        torch.equal(value, other[name])
        for name, value in one.items()
        if isinstance(value, torch.Tensor)
    )


def _barriers(
    network: nn.Module, oracles: list[nn.Module], sets: Sets, match: bool
) -> Barriers | None:
    """Loss barriers on a part of what stays."""
    if not oracles:
        return None
    part = Subset(sets.retain, range(min(len(sets.retain), _NUM_POINTS)))
    spec = None
    if match:
        spec = permutation_spec(network, next(iter(DataLoader(part, 2)))[0])
    twins = oracles if spec is None else [aligned(network, o, spec) for o in oracles]
    loss = sets.criterion
    return Barriers(
        to_oracles=[loss_barrier(network, twin, part, loss) for twin in twins],
        between_oracles=[]
        if len(oracles) < 2
        else pairwise_barriers(oracles, part, loss, spec=spec).tolist(),
        matched=match,
    )


def _words(facts: dict[str, Any], barriers: Barriers | None) -> str:
    """The answer for people."""
    oracle = facts["oracle"]
    header = ["metric", "model"]
    rows = [[name, value] for name, value in facts["metrics"].items()]
    if oracle:
        header += [f"retrained ({len(next(iter(oracle.values())))})", "distance"]
        rows = [
            [name, value, _spread(oracle[name]), abs(value - np.mean(oracle[name]))]
            for name, value in rows
        ]
    parts = [
        f"Examples: {facts['num_forget']} to forget, {facts['num_retain']} of those "
        f"that stay, {facts['num_test']} unseen.",
        table(header, rows),
    ]
    if barriers is None:
        parts.append("Without --oracle there is nothing to judge these numbers by.")
    else:
        how = "hidden units matched" if barriers.matched else "weights as they are"
        parts.append(
            f"Loss barriers ({how}): to retrained models "
            f"{_spread(barriers.to_oracles)}; between them "
            f"{_spread(barriers.between_oracles)}."
        )
    return "\n\n".join(parts)


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if len(values) < 2:
        return cell(float(values[0])) if values else "unknown (one model)"
    return f"{cell(np.mean(values))} ± {cell(np.std(values, ddof=1))}"
