"""``opacus-pi unlearn``: forget a set, and write down what was done."""

import argparse
import functools
import hashlib
import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opacus_pi.cli.arguments import (
    add_batch_size,
    add_data,
    add_delta,
    add_forget,
    add_ledgers,
    add_model,
    add_output,
    count,
    criterion,
    data_set,
    indices,
    ledgers,
    model,
)
from opacus_pi.cli.errors import BadInput, about
from opacus_pi.cli.methods import add_method, make_method
from opacus_pi.cli.output import answer, table
from opacus_pi.cli.run_files import new_directory, save_run
from opacus_pi.cli.sets import make_sets, require_unseen
from opacus_pi.unlearning import Unlearner, UnlearningResult
from opacus_pi.unlearning.requests import DeletionRequests

HELP = "forget a set of training examples"
DESCRIPTION = """\
Fine-tune a trained model on what stays, by a method that makes it forget the rest.
Writes a new directory: weights.safetensors, record.json (what was run; it names the
forgotten examples), trace.json (metrics over epochs, with --test), guarantee.json (what
may be claimed; more with --ledger). Nothing is written before the run is done.

With --record the request is first taken down in an append-only, hash-chained deletion
record; later requests go on from the weights kept beside it (FILE.safetensors), so that
everything ever asked for stays forgotten. After a crash repeat the same command: what
is still pending in the record is carried out first, with the settings of the command
that finds it, and the answer says so.

--model, --data and --test import and run your own code."""
EXAMPLES = """\
examples:
  opacus-pi unlearn --model my_project:build --weights model.safetensors \\
      --data my_project:train_set --forget 3,17 --out forgotten
  opacus-pi unlearn --model my_project:build --weights model.pt \\
      --data my_project:train_set --test my_project:test_set --forget ids.txt \\
      --method langevin --set noise_std=0.02 --epochs 10 \\
      --ledger ledger.safetensors --record deletions.jsonl --out forgotten"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser, weights=True)
    add_data(parser, test_is_required=False)
    add_forget(parser)
    add_method(parser)
    parser.add_argument(
        "--epochs",
        dest="num_epochs",
        type=count,
        default=25,
        help="passes over what stays (default 25)",
    )
    add_batch_size(parser)
    for flag, number, words in (
        ("--learning-rate", 0.01, "of SGD"),
        ("--momentum", 0.9, "of SGD"),
    ):
        parser.add_argument(
            flag, type=float, default=number, help=f"{words} (default {number})"
        )
    add_ledgers(parser, "--ledger", default=[])
    add_delta(parser)
    parser.add_argument(
        "--record", metavar="FILE.jsonl", help="the deletion record to append to"
    )
    parser.add_argument(
        "--request-id",
        metavar="NAME",
        help="name of the request in the record (default: made from the ids)",
    )
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="a new directory for the result"
    )
    add_output(parser, file=False)


def run(options: argparse.Namespace) -> int:
    """Unlearn, save and print."""
    if options.request_id and not options.record:
        raise BadInput("--request-id: there is no record. Add --record FILE.jsonl.")
    method = make_method(options.method, options.settings)
    make_optimizer = _optimizer(options)
    runs = ledgers(options.ledger, None, "--ledger") if options.ledger else None
    train_set = data_set("--data", options.train_set)
    test_set = _test_set(options, train_set)
    forget = indices(options.forget_indices)
    unlearner = Unlearner(
        model(options, options.weights),
        criterion=criterion(options),
        method=method,
        optimizer=make_optimizer,
        ledger=runs,
        generator=torch.Generator().manual_seed(options.seed),
    )
    with new_directory(options.out) as directory:
        result, facts = _carried_out(options, unlearner, train_set, test_set, forget)
        if result is not None:
            save_run(directory, result)
    facts |= {"format": "opacus_pi.cli.unlearn.v1", "out": options.out}
    facts |= _facts(result, options.delta)
    answer(options, facts, _words(facts, result))
    return 0


def _carried_out(
    options: argparse.Namespace,
    unlearner: Unlearner,
    train_set: Any,
    test_set: Any,
    forget: NDArray[np.int64],
) -> tuple[UnlearningResult | None, dict[str, Any]]:
    """The result, None if it was carried out before; what the record says."""
    settings = {"num_epochs": options.num_epochs, "batch_size": options.batch_size}
    if not options.record:
        settings |= _evaluation(options, train_set, test_set, forget, [])
        return unlearner.unlearn(train_set, forget, **settings), {}
    with about("--record", "Restore the file from a copy, or name another."):
        requests = DeletionRequests(options.record, len(train_set))
    name = options.request_id or _name(forget)
    requests.submit(name, indices=forget)
    entries = requests.record.entries()
    asked = [e["body"]["indices"] for e in entries if e["kind"] == "request"]
    gone = np.concatenate(asked)
    settings |= _evaluation(options, train_set, test_set, forget, gone)
    results = requests.process(unlearner, train_set, **settings)
    new = requests.record.entries()[len(entries) :]
    done = [e["body"] for e in new if e["kind"] == "done"]
    found = {
        "request_id": name,
        "deletion_record": options.record,
        "head": requests.record.head,
        "weights": str(requests.weights_path),
        "also_carried_out": [
            _pending(body) for body in done if "run" in body and body["ids"] != [name]
        ],
    }
    runs = [body["ids"] for body in done if "run" in body]
    own = (one for ids, one in zip(runs, results, strict=True) if ids == [name])
    return next(own, None), found


def _pending(body: dict[str, Any]) -> dict[str, Any]:
    """What was done about a request that an earlier command had left."""
    return {
        "request_id": body["ids"][0],
        "num_forget": len(body["run"]["forget_indices"]),
        "method": body["run"]["method"],
        "num_steps": body["run"]["num_steps"],
    }


def _test_set(options: argparse.Namespace, train_set: Any) -> Any:
    """The unseen examples, checked before a request is taken down; None without."""
    if options.test_set is None:
        return None
    test_set = data_set("--test", options.test_set)
    require_unseen(train_set, test_set)
    return test_set


def _evaluation(
    options: argparse.Namespace, train_set: Any, test_set: Any, forget: Any, gone: Any
) -> dict[str, Any]:
    """How the run is evaluated: not at all without a test set."""
    if test_set is None:
        return {}
    loss = criterion(options)
    sets = make_sets(train_set, test_set, forget, loss, options.seed, gone)
    return {"evaluate": sets.metrics}


def _optimizer(options: argparse.Namespace) -> Any:
    """SGD, refused before anything is run where its settings are bad."""
    make = functools.partial(
        torch.optim.SGD, lr=options.learning_rate, momentum=options.momentum
    )
    try:
        make([torch.nn.Parameter(torch.zeros(1))])
    except ValueError as error:
        raise BadInput(
            f"--learning-rate, --momentum: {error}. 0.01 and 0.9 are usual."
        ) from error
    return make


def _name(forget: NDArray[np.int64]) -> str:
    """A name for a request that the same ids get again."""
    ids = json.dumps(sorted(forget.ravel().tolist())).encode()
    return f"ids-{hashlib.sha256(ids).hexdigest()[:16]}"


def _facts(result: UnlearningResult | None, delta: float) -> dict[str, Any]:
    """What the run was, for programs."""
    if result is None:
        return {"carried_out": False}
    metrics = result.trace.metrics
    return {
        "carried_out": True,
        "num_steps": result.record["num_steps"],
        "seconds": result.record["seconds"],
        "before": {name: values[0] for name, values in metrics.items()},
        "after": {name: values[-1] for name, values in metrics.items()},
        "delta": delta,
        "epsilon": result.guarantee.epsilon(delta),
        "guarantee": json.loads(result.guarantee.to_json()),
    }


def _words(facts: dict[str, Any], result: UnlearningResult | None) -> str:
    """The answer for people."""
    also = [_also(one) for one in facts.get("also_carried_out", [])]
    if result is None:
        before = (
            f"Request {facts['request_id']} was carried out before: nothing to do.\n"
            f"The weights that honour every request: {facts['weights']}."
        )
        return "\n\n".join([*also, before])
    size = len(result.record["forget_indices"])
    done = (
        f"Forgot {size} example{'s' * (size > 1)} by "
        f"{result.record['method']}: {facts['num_steps']} updates, "
        f"{facts['seconds']:.1f} s. Written to {facts['out']}."
    )
    parts = [*also, done]
    if facts["before"]:
        rows = [(n, v, facts["after"][n]) for n, v in facts["before"].items()]
        parts.append(table(("metric", "before", "after"), rows))
    parts.append(result.guarantee.text(facts["delta"]))
    if "head" in facts:
        parts.append(
            f"Recorded in {facts['deletion_record']} as {facts['request_id']}. "
            f"Keep its head elsewhere, to notice a cut-off end:\n{facts['head']}"
        )
    return "\n\n".join(parts)


def _also(one: dict[str, Any]) -> str:
    """What else was carried out, for people."""
    size = one["num_forget"]
    return (
        f"Request {one['request_id']} was still pending in the record: it was carried "
        f"out too, with the settings of this command. Forgot {size} "
        f"example{'s' * (size > 1)} by {one['method']}: {one['num_steps']} updates."
    )
