"""``opacus-pi evaluate``: metrics of a model, compared with retrained models.

A metric of an unlearned model says little alone, because the right value differs from
task to task: it is the value of a model that was retrained without the forget set. So
the command shows both, with the distance, and the loss barriers between the models. A
"retrained" model with the weights of the evaluated one would make every distance zero,
and is refused.
"""

import argparse
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, Subset

from opacus_pi._types import ArrayLike
from opacus_pi.accounting import fingerprint
from opacus_pi.cli.errors import BadInput, about
from opacus_pi.cli.evaluated import subject_of
from opacus_pi.cli.inputs import (
    import_collate,
    import_criterion,
    import_data_set,
    import_train_set,
    load_model,
)
from opacus_pi.cli.output import answer, cell, table
from opacus_pi.cli.owners import read_request
from opacus_pi.cli.sets import Sets, make_sets, require_batches, require_unseen
from opacus_pi.evaluation import (
    aligned,
    loss_barrier,
    pairwise_barriers,
    permutation_spec,
)
from opacus_pi.evaluation.oracle import retrained_without
from opacus_pi.files.checksummed_json import with_json_checksum
from opacus_pi.models.batches import inputs_and_targets
from opacus_pi.models.collating import Collating
from opacus_pi.report.run import Barriers
from opacus_pi.unlearning.requests import requested_indices

FORMAT = "opacus_pi.cli.evaluate.v1"
_NUM_POINTS = 2000  # of the retain set, on which barriers are measured


def run(options: argparse.Namespace) -> int:
    """Compute the metrics and print them.

    The models are loaded before the first metric is computed, so that a wrong file is
    reported at once and not after minutes.

    Args:
        options: The parsed arguments of ``evaluate``.

    Returns:
        The exit code.

    Raises:
        BadInput: If a file or an object cannot be used, the test set is the training
            set, or a retrained model has the weights of another model or was trained
            without other examples.
    """
    train_set, gone = import_train_set(options)
    test_set = import_data_set("--test", options.test_set)
    require_unseen(train_set, test_set, gone)
    forget, _ = read_request(options, lambda: fingerprint(train_set))
    criterion = import_criterion(options)
    collate = import_collate(options)
    require_batches(train_set, gone, collate)
    sets = make_sets(
        *(train_set, test_set, forget, criterion, options.seed, gone),
        collate_fn=collate,
    )
    if not len(sets.forget):
        raise BadInput(
            f"{_named_by(options)}: all of these examples may have been erased from "
            "the data set, "
            "so nothing can be measured on them. Name examples that can be read."
        )
    network = load_model(options, options.weights)
    oracles = [load_model(options, path, "--oracle") for path in options.oracle]
    _require_different_weights(options, [network, *oracles])
    requested = requested_indices(options.log, len(train_set)) if options.log else ()
    unchecked = _require_retrained_without(options.oracle, train_set, forget, requested)
    retrained = [sets.metrics(oracle) for oracle in oracles]
    metrics = sets.metrics(network)
    barriers = _barriers(network, oracles, sets, options.match)
    facts = {
        "format": FORMAT,
        "subject": subject_of(train_set, forget, network),
        "num_forget": len(sets.forget),
        "num_retain": len(sets.retain),
        "num_test": len(test_set),
        "metrics": metrics,
        "oracle": {name: [each[name] for each in retrained] for name in metrics}
        if retrained
        else None,
        "barriers": barriers,
        "oracles_not_checked": unchecked,
    }
    answer(options, with_json_checksum(facts), _text(facts, barriers))
    return 0


def _named_by(options: argparse.Namespace) -> str:
    """Return the argument that names the examples to forget."""
    return "--forget-person" if options.forget_person else "--forget"


def _require_different_weights(
    options: argparse.Namespace, models: list[nn.Module]
) -> None:
    """Refuse an oracle with the weights of the evaluated model or of another one.

    Args:
        options: The parsed arguments, which name the files.
        models: The evaluated model, then the oracles in the order of ``--oracle``.

    Raises:
        BadInput: If two of them have equal weights.
    """
    files = [f"--weights {options.weights}", *options.oracle]
    states = [model.state_dict() for model in models]
    pairs = combinations(zip(files, states, strict=True), 2)
    for (one_file, one), (other_file, other) in pairs:
        if _equal(one, other):
            raise BadInput(
                f"--oracle: {other_file} holds the same weights as {one_file}, so "
                "every distance between them is 0. Name weights of models that "
                "were retrained without the forget set, each with its own seed."
            )


def _require_retrained_without(
    paths: list[str], train_set: Any, forget: NDArray[np.int64], requested: ArrayLike
) -> list[str]:
    """Refuse oracles that were retrained without other examples than the forget set.

    Args:
        paths: The files of ``--oracle``.
        train_set: The training set.
        forget: Positions of the forget set.
        requested: Positions that the requests of the log name; empty without a log.

    Returns:
        The files that do not say what their model was trained without.

    Raises:
        BadInput: If a file says that other examples were left out.
    """
    unchecked = []
    for path in paths:
        with about("--oracle", "Pass a file that OracleCache wrote, unedited."):
            left_out = retrained_without(path, train_set, forget)
        if left_out is None:
            unchecked.append(path)
        elif not left_out:
            every = np.union1d(forget, np.asarray(requested, dtype=np.int64))
            if len(every) > len(forget) and retrained_without(path, train_set, every):
                raise BadInput(
                    f"--oracle: the model in {path} was retrained without "
                    f"{len(every) - len(forget)} other examples, too: those of the "
                    "other requests in the log. Name the examples of all requests "
                    f"({len(every)}) with --forget or --forget-person."
                )
            raise BadInput(
                f"--oracle: the model in {path} was retrained without other examples "
                "than this forget set, or on another data set, so it is not the model "
                "to compare with. Name models that were retrained without exactly "
                "this forget set."
            )
    return unchecked


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two state dicts of one architecture have equal tensors.

    Entries that are not tensors (extra state of a module) are not compared.
    """
    return all(
        torch.equal(value, other[name])
        for name, value in one.items()
        if isinstance(value, torch.Tensor)
    )


def _barriers(
    network: nn.Module, oracles: list[nn.Module], sets: Sets, match: bool
) -> Barriers | None:
    """Measure loss barriers on a part of the retain set.

    The part is its first 2,000 examples. A barrier needs the loss at eleven points of
    each line, so the whole set would take most of the command's time.

    Args:
        network: The evaluated model.
        oracles: Retrained models, maybe none.
        sets: The sets and the loss.
        match: Whether to permute the hidden units of each retrained model first, so
            that they correspond to those of the evaluated model. Networks that differ
            only by a permutation have barrier 0 then.

    Returns:
        The barriers, or None without retrained models.
    """
    if not oracles:
        return None
    chosen = Subset(sets.retain, range(min(len(sets.retain), _NUM_POINTS)))
    part = DataLoader(chosen, 256, collate_fn=Collating(sets.collate_fn))
    spec = None
    if match:
        spec = permutation_spec(network, inputs_and_targets(next(iter(part)))[0])
    matched = oracles if spec is None else [aligned(network, o, spec) for o in oracles]
    loss = sets.criterion
    return Barriers(
        to_oracles=[loss_barrier(network, oracle, part, loss) for oracle in matched],
        between_oracles=[]
        if len(oracles) < 2
        else pairwise_barriers(oracles, part, loss, spec=spec).tolist(),
        matched=match,
    )


def _text(facts: dict[str, Any], barriers: Barriers | None) -> str:
    """Return the answer as text for a person.

    Args:
        facts: The answer for programs.
        barriers: The barriers in it, or None without retrained models.
    """
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
        f"Examples: {facts['num_forget']} in the forget set, {facts['num_retain']} of "
        f"the retain set, {facts['num_test']} in the test set.",
        table(header, rows),
    ]
    if facts["oracles_not_checked"]:
        parts.append(
            "Not checked: whether these models were retrained without this forget set: "
            f"{', '.join(facts['oracles_not_checked'])}. Their files do not say what "
            "was left out; files of OracleCache do."
        )
    if barriers is None:
        parts.append(
            "These numbers can only be judged beside those of retrained models: name "
            "their weights with --oracle."
        )
    else:
        how = "hidden units matched" if barriers.matched else "weights as they are"
        parts.append(
            f"Loss barriers ({how}): to retrained models "
            f"{_spread(barriers.to_oracles)}; between them "
            f"{_spread(barriers.between_oracles)}."
        )
    return "\n\n".join(parts)


def _spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation as text, or the only value.

    Args:
        values: One number for each retrained model, or for each pair of them. With a
            single retrained model there is no pair, and the barrier between pairs is
            unknown.
    """
    if len(values) < 2:
        return cell(float(values[0])) if values else "unknown (one model)"
    return f"{cell(np.mean(values))} ± {cell(np.std(values, ddof=1))}"
