"""``opacus-pi unlearn``: forget a set of examples, and write down what was done.

The order of the steps is the point. Everything that can be wrong with the arguments is
checked first: settings, data sets, ids, weights, and whether the ledgers are of these
weights. Only then is the request entered in the deletion log, because an entry cannot
be removed. Then the library unlearns, and at last the result directory gets its
name.

With ``--checkpoints`` nothing is fine-tuned: the library goes back to a saved state of
the training, and trains the rest without the examples.

*Guarantee.* If the command fails or is killed, no incomplete result exists. A request
that was entered stays pending, and repeating the command carries it out once, or writes
the result of the run that was carried out.

*What breaks it.* Weights that are changed or removed beside the log: then the library
refuses to continue.
"""

import argparse
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Subset

from opacus_pi._validate import distinct_indices
from opacus_pi.accounting.conversion import large_delta
from opacus_pi.cli.errors import BadInput, about, one_line
from opacus_pi.cli.inputs import (
    import_collate,
    import_criterion,
    import_data_set,
    import_train_set,
    load_model,
    read_ledgers,
)
from opacus_pi.cli.methods import make_method
from opacus_pi.cli.output import answer, table
from opacus_pi.cli.owners import Owned, read_request, shared_text
from opacus_pi.cli.progress import ProgressLines
from opacus_pi.cli.recorded_weights import (
    require_ledgers_of,
    require_recorded_weights,
    require_weights_of_log,
)
from opacus_pi.cli.rewinds import rewind_options
from opacus_pi.cli.run_files import new_directory
from opacus_pi.cli.sets import make_sets, require_batches, require_unseen
from opacus_pi.cli.submission import require_loggable, said_if_pending, submit
from opacus_pi.gradients.fallback import MODEL_ERRORS
from opacus_pi.ledger.erased_examples import erased_in, not_erased
from opacus_pi.ledger.fingerprint import fingerprint
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger
from opacus_pi.models.predictions import predict
from opacus_pi.models.weights_name import weights_name
from opacus_pi.unlearning import Unlearner, UnlearningResult
from opacus_pi.unlearning.deletion_log import DeletionLog, verify
from opacus_pi.unlearning.listed_requests import list_requests
from opacus_pi.unlearning.plan import LATER
from opacus_pi.unlearning.requests import DeletionRequests, requested_indices
from opacus_pi.unlearning.rewind import OtherWeights
from opacus_pi.unlearning.saved_result import WEIGHTS, save_result
from opacus_pi.unlearning.watching import Evaluate

_NO_RESULT = (
    "Nothing is left to do, and nothing was written: an earlier release made the last "
    "run, and did not store its result. The weights beside the log honour every "
    "request, but never give that file to others: it lists the forgotten examples. The "
    "next run stores its result."
)

_CARRIED_OUT = (
    "The request was carried out, and nothing is lost: the weights are beside the log. "
    "Repeat the command, if needed with another --out, to write the result."
)
_OF_THIS_COMMAND = (
    " This is about the examples that this command names. Whether examples of the "
    "other requests of the run are of several persons was not looked at."
)


def run(options: argparse.Namespace) -> int:
    """Unlearn, save the result and print it.

    Args:
        options: The parsed arguments of ``unlearn``.

    Returns:
        The exit code. A request that an earlier command carried out is a success: the
        directory then has the result of the last run, which covers it.

    Raises:
        BadInput: If an argument, a file or an object cannot be used.
        ValueError: If the library refuses a value, or the weights file beside the
            deletion log: it does not belong to the log or does not fit the model.
    """
    _take_back_unfinished(options.log)
    going_back = rewind_options(options)
    method = make_method(options.method, options.settings)
    make_optimizer = None if going_back else _optimizer(options)
    runs = _ledgers(options)
    train_set, gone = import_train_set(options, must_exist=False)
    require_ledgers_of(options, runs or [], fingerprint(train_set))
    test_set = _test_set(options, train_set, gone)
    forget, owned = _request(options, train_set)
    if options.log and len(forget):
        require_loggable([*owned], options.request_id)
        distinct_indices("indices", forget, len(train_set))
    criterion = import_criterion(options)
    model = load_model(options, options.weights)
    collate = import_collate(options)
    require_batches(train_set, [*gone, *forget], collate)
    if test_set is not None:
        _require_evaluable(model, test_set, criterion, collate)
    unlearner = Unlearner(
        model,
        criterion=criterion,
        method=method,
        optimizer=make_optimizer,
        ledger=runs,
        generator=_generator(options.seed),
    )

    # What cannot be carried out is found before the request is entered.
    if not options.log or not os.path.exists(options.log):
        require_recorded_weights(options, unlearner, forget, going_back)
    elif going_back and len(forget):
        with suppress(OtherWeights):  # the run has the weights beside the log
            unlearner.plan_rewind(forget, **going_back)

    settings = _settings(options, going_back, collate)
    evaluation_of = _evaluation_of(options, train_set, test_set, criterion, collate)
    with new_directory(options.out) as directory:
        result: UnlearningResult | None
        if options.log:
            more = settings, evaluation_of, going_back
            found = _carry_out(options, unlearner, train_set, forget, owned, *more)
            result, request = found
        else:
            carry_out = unlearner.rewind if going_back else unlearner.unlearn
            settings = {**settings, "evaluate": evaluation_of(forget)}
            result, request = carry_out(train_set, forget, **settings), {}
        _save(options, directory, result)
    facts = {"format": "opacus_pi.cli.unlearn.v1", "out": options.out}
    facts |= _run_facts(result, options.delta, train_set, test_set) | request
    facts |= {"num_erased": len(erased_in(train_set)), "also_of": options.also_of}
    answer(options, facts, _text(facts, result))
    return 0


def _ledgers(options: argparse.Namespace) -> list[GradNormLedger] | None:
    """Return the ledgers, or None; a log needs one unless the user says otherwise.

    A request is carried out once. If the ledger is forgotten, no bound can be claimed
    for it any more.

    Args:
        options: The parsed arguments.

    Raises:
        BadInput: If there is a log, and neither a ledger nor ``--without-ledger``.
    """
    if options.log and not options.ledger and not options.without_ledger:
        raise BadInput(
            "--ledger: none is named, so no bound could be claimed, and a request is "
            "carried out only once. Nothing was entered. Add --ledger LEDGER, the "
            "ledger of the training. If there is none, add --without-ledger: the "
            "guarantee is then empirical."
        )
    return read_ledgers(options.ledger, "--ledger") if options.ledger else None


def _save(
    options: argparse.Namespace, directory: Path, result: UnlearningResult | None
) -> None:
    """Save the result, if there is one; an error then says what was done before.

    Args:
        options: The parsed arguments; ``after_error`` is printed after an error.
        directory: The new directory.
        result: The run, or None.
    """
    if result is not None:
        options.after_error = _CARRIED_OUT * bool(options.log)
        save_result(directory, result, options.delta)
    options.after_error = ""


def _num_evaluated(result: UnlearningResult, train_set: Any, test_set: Any) -> int:
    """Return of how many examples the metrics of the retain set are, 0 if of none.

    Args:
        result: The run.
        train_set: The training set.
        test_set: The test set, or None. As many examples of the retain set are drawn.
    """
    if test_set is None:
        return 0
    gone = {*result.record["forget_indices"], *result.record["forgotten_before"]}
    return min(len(train_set) - len(gone), len(test_set))


def _settings(
    options: argparse.Namespace, going_back: dict[str, Any], collate_fn: Any
) -> dict[str, Any]:
    """Return the settings of the run that the library carries out.

    Args:
        options: The parsed arguments.
        going_back: The arguments of a rewind; empty: no rewind.
        collate_fn: Makes a batch of a list of items; None: torch's own.
    """
    own = {
        "num_epochs": options.num_epochs,
        "batch_size": options.batch_size,
        "callbacks": [ProgressLines(options.num_epochs)],
    }
    return {**(going_back or own), "collate_fn": collate_fn}


def _take_back_unfinished(log: str | None) -> None:
    """Take back what a killed process left of a write, before the log is read.

    Args:
        log: Path of the deletion log; None: no log was named.
    """
    if log and os.path.exists(log):
        with about("--log", "Restore the file from a copy, or name another."):
            DeletionLog(os.path.realpath(log))


def _request(
    options: argparse.Namespace, train_set: Any
) -> tuple[NDArray[np.int64], Owned]:
    """Return the examples to forget, and those of each person that is named.

    Args:
        options: The parsed arguments.
        train_set: The training set.

    Raises:
        BadInput: If they cannot be read, or ``--pending`` is given without a log.
    """
    if not options.pending:
        return read_request(options, lambda: fingerprint(train_set))
    options.also_of = {}
    with about("--log", "Name a log with requests: --pending enters none."):
        rows = list_requests(options.log)
    pending = [np.array(r.indices) for r in rows if r.state == "pending"]
    return np.unique(np.concatenate([np.empty(0, np.int64), *pending])), {}


def _evaluation_of(
    options: argparse.Namespace,
    train_set: Any,
    test_set: Any,
    criterion: Any,
    collate_fn: Any,
) -> Callable[..., Evaluate | None]:
    """Return a function from what a run forgets to its metrics.

    It is given the examples that the run forgets, also those of requests that earlier
    commands left pending, and those of all requests, which the retain set excludes. It
    returns None if there is nothing to evaluate on.

    Args:
        options: The parsed arguments; their seed is that of the draw from the retain
            set.
        train_set: The training set.
        test_set: The test set, or None.
        criterion: The criterion.
        collate_fn: Makes a batch of a list of items; None: torch's own.
    """

    def evaluation(
        forgotten: NDArray[np.int64], all_requested: Iterable[int] = ()
    ) -> Evaluate | None:
        if test_set is None or not len(not_erased(train_set, forgotten)):
            return None
        sets = make_sets(
            *(train_set, test_set, forgotten, criterion, options.seed or 0),
            forgotten_before=list(all_requested),
            collate_fn=collate_fn,
        )
        return sets.metrics

    return evaluation


def _generator(seed: int | None) -> torch.Generator:
    """Return the generator of a run.

    Anyone who knows the seed can compute the noise, and two runs with one seed may have
    the same noise. So the default is not a fixed seed.

    Args:
        seed: The user's, for a run that can be repeated; None: chosen by the operating
            system.
    """
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed)


def _carry_out(
    options: argparse.Namespace,
    unlearner: Unlearner,
    train_set: Any,
    forget: NDArray[np.int64],
    owned: Owned,
    settings: dict[str, Any],
    evaluation_of: Callable[..., Evaluate | None],
    going_back: dict[str, Any],
) -> tuple[UnlearningResult | None, dict[str, Any]]:
    """Enter the requests in the deletion log, and carry out every pending request.

    Each person that is named has a request of its own. All pending requests, also of
    earlier commands, are carried out in one run: if runs followed each other, the noise
    of the training would not cover what the first run learned from the examples of the
    second, and only the last weights would honour every request.

    Args:
        options: The parsed arguments.
        unlearner: Made from the trained model; it continues from the weights beside
            the log if requests were carried out before.
        train_set: The training set.
        forget: The examples that this command names.
        owned: Those of each person; empty if positions are named.
        settings: The settings of the run.
        evaluation_of: From the examples that the run forgets, and those that all
            requests name, to its evaluation.
        going_back: The arguments of a rewind; empty: no rewind.

    Returns:
        The result of this command's own requests, or of the last run if earlier
        commands carried them out, None if no result of it is stored; facts about the
        log and about other requests that were pending.
    """
    has_earlier = os.path.exists(options.log)
    with about("--log", "Restore the file from a copy, or name another."):
        requests = DeletionRequests(
            options.log, len(train_set), owned, data_set=fingerprint(train_set)
        )
        verify(requests.log.path)
    continues = _resume(options, requests, unlearner) and not going_back
    if has_earlier:  # else the weights were compared before the log was made
        pending = [np.array(request.indices) for request in requests.pending]
        first = np.unique(np.concatenate([*pending, forget]))
        if len(first):
            require_recorded_weights(options, unlearner, first, going_back)
    names = [request.request_id for request in requests.pending]
    if not options.pending:
        names = submit(requests, forget, owned, options.request_id)
    asked = {request.request_id for request in requests.pending}
    before = requested_indices(options.log, len(train_set)).tolist()
    with said_if_pending(options, requests, names):
        results = requests.process(
            unlearner,
            train_set,
            together=True,
            evaluation_of=lambda forgotten: evaluation_of(forgotten, before),
            **settings,
        )
    own, facts = _outcome(results, names, asked)
    facts |= {
        "persons": [*owned],
        "deletion_log": options.log,
        "log_is_new": not has_earlier,
        "continues_from_log": continues,
        "head": requests.log.head,
        "weights": str(requests.weights_path),
    }
    return own or requests.last_result(unlearner.model, names), facts


def _outcome(
    results: list[UnlearningResult], names: list[str], asked: set[str]
) -> tuple[UnlearningResult | None, dict[str, Any]]:
    """Return the result of this command's own requests, and what was done for each.

    Args:
        results: Of the runs that this command made or finished.
        names: Of this command's requests.
        asked: Names of the requests that were pending before.
    """
    is_own = [not set(names).isdisjoint(r.record["requests"]) for r in results]
    own = next(itertools.compress(results, is_own), None)
    done = [] if own is None else own.record["requests"]
    return own, {
        "carried_out": own is not None,
        "request_id": names[0] if len(names) == 1 else None,
        "request_ids": names,
        "done_before": [n for n in names if n not in done and n not in asked],
        "forgotten_before": [n for n in names if n not in done and n in asked],
        "together_with": [name for name in done if name not in names],
        "also_carried_out": [_pending(r.record) for r in results if r is not own],
    }


def _resume(
    options: argparse.Namespace, requests: DeletionRequests, unlearner: Unlearner
) -> bool:
    """Take the weights beside the log; return whether there are any.

    Args:
        options: The parsed arguments.
        requests: The requests of the log.
        unlearner: Made from the model with ``--weights``.

    Raises:
        BadInput: If ``--weights`` are of another model than the log.
    """
    given = weights_name(unlearner.model)
    options.after_error = "Nothing was entered." * (not options.pending)
    requests.resume(unlearner)  # refuses the log of another model
    options.after_error = ""
    continues = requests.weights_path.exists()
    if continues and not options.checkpoints:
        require_weights_of_log(options, given, unlearner)
    return continues


def _pending(record: dict[str, Any]) -> dict[str, Any]:
    """Return what was done about requests that earlier commands left pending."""
    return {
        "request_ids": record["requests"],
        "num_forget": len(record["forget_indices"]),
        "method": record["method"],
        "num_steps": record["num_steps"],
    }


def _test_set(
    options: argparse.Namespace, train_set: Any, gone: NDArray[np.int64]
) -> Any:
    """Import and check the test set before a request is entered; None if not named.

    Without a test set there are no metrics, because membership inference needs unseen
    examples.

    Args:
        options: The parsed arguments.
        train_set: The training set, which must be another one.
        gone: Positions in it that are not read: these examples were forgotten before.

    Raises:
        BadInput: If the test set cannot be imported or is the training set.
    """
    if options.test_set is None:
        return None
    test_set = import_data_set("--test", options.test_set)
    require_unseen(train_set, test_set, gone)
    return test_set


def _require_evaluable(
    model: nn.Module, test_set: Any, criterion: Any, collate_fn: Any
) -> None:
    """Evaluate the model on two test examples before a request is entered.

    Args:
        model: The trained model.
        test_set: The test set.
        criterion: The criterion.
        collate_fn: Makes a batch of a list of items; None: torch's own.

    Raises:
        BadInput: If the test set is no data set of inputs and labels for this model.
    """
    few = Subset(test_set, range(min(2, len(test_set))))
    try:
        predict(model, few, criterion, collate_fn=collate_fn)
    except (*MODEL_ERRORS, ValueError) as error:
        raise BadInput(
            f"--test: the model cannot be evaluated on it: {one_line(error)}. Name a "
            "data set like that of --data."
        ) from error


def _optimizer(options: argparse.Namespace) -> Any:
    """Return a function that makes the optimizer, SGD with the user's settings.

    An optimizer of one dummy weight is made first, because torch checks the settings
    only then. A bad setting must be found before the request is entered in the log.

    Raises:
        BadInput: If torch refuses a setting.
    """
    make = functools.partial(
        torch.optim.SGD, lr=options.learning_rate, momentum=options.momentum
    )
    try:
        make([torch.nn.Parameter(torch.zeros(1))])
    except ValueError as error:
        raise BadInput(
            f"--learning-rate, --momentum: {error}. Try --learning-rate 0.01 "
            "--momentum 0.9."
        ) from error
    return make


def _run_facts(
    result: UnlearningResult | None, delta: float, train_set: Any, test_set: Any
) -> dict[str, Any]:
    """Return what was run and what may be claimed, as JSON facts.

    Args:
        result: The run; None if the request had been carried out before.
        delta: δ at which ε is stated.
        train_set: The training set.
        test_set: The test set, or None.
    """
    if result is None:
        return {"carried_out": False}
    metrics, epsilon = result.trace.metrics, result.guarantee.epsilon(delta)
    is_before = result.trace.begins_before
    has_epsilon = math.isfinite(epsilon)
    return {
        "carried_out": True,
        "num_steps": result.record["num_steps"],
        "seconds": result.record["seconds"],
        "before": {name: values[0] for name, values in metrics.items() if is_before},
        "after": {name: values[-1] for name, values in metrics.items()},
        "num_retain_evaluated": _num_evaluated(result, train_set, test_set),
        "delta": delta,
        "epsilon": epsilon,
        "large_delta": large_delta(delta, len(train_set)) if has_epsilon else "",
        "guarantee": json.loads(result.guarantee.to_json()),
    }


def _text(facts: dict[str, Any], result: UnlearningResult | None) -> str:
    """Return the answer as text for a person.

    It first reports requests of earlier commands, then this one: what was run, the
    metrics, what may be claimed, and the head of the log to keep.

    Args:
        facts: The answer for programs.
        result: The run; None if an earlier command carried the request out.
    """
    parts = [
        "Still pending in the log, and carried out with the settings of this command: "
        f"{', '.join(other['request_ids'])}. "
        f"{_forgot(other['num_forget'], other['method'], other['num_steps'])}."
        for other in facts.get("also_carried_out", [])
    ]
    if facts["num_erased"]:
        parts.insert(0, _erased(facts["num_erased"]))
    if result is None:
        return "\n\n".join([*parts, f"{' '.join(_done_before(facts))} {_NO_RESULT}"])
    if facts["carried_out"]:
        record = result.record
        size, method = len(record["forget_indices"]), record["method"]
        parts.append(
            f"{_forgot(size, method, facts['num_steps'])}, {facts['seconds']:.1f} s."
            f"{_left_out(record)} Written to {facts['out']}."
        )
    else:
        parts.append(
            f"{' '.join(_done_before(facts))} Nothing is left to do. Written to "
            f"{facts['out']}: the weights that honour every request "
            f"({WEIGHTS}), with what the last run claims for all of them."
        )
    if facts["after"]:
        parts.append(_metrics(facts))
    parts.append(result.guarantee.text(facts["delta"]))
    if facts["large_delta"]:
        parts.append(facts["large_delta"])
    if facts["also_of"]:
        only = _OF_THIS_COMMAND * bool(facts.get("together_with"))
        parts.append(shared_text(facts["also_of"]) + only)
    if "head" in facts and facts["carried_out"]:
        if result.guarantee.kind.startswith("certified") and facts["num_steps"]:
            parts += [LATER] * (not result.record["method"].endswith("rewind"))
        parts += _of_log(facts)
    return "\n\n".join(parts)


def _metrics(facts: dict[str, Any]) -> str:
    """Return the metrics as a table, and the sets that they were computed on.

    Args:
        facts: The answer for programs. Without metrics from before the run, the weights
            of ``--weights`` were not used.
    """
    before, after = facts["before"], facts["after"]
    header = ("metric", *["before"] * bool(before), "after")
    rows = [
        (name, *([before[name]] if before else []), value)
        for name, value in after.items()
    ]
    if not facts["carried_out"]:
        return table(header, rows)
    return (
        f"{table(header, rows)}\n"
        f"Metrics of the retain set are of {facts['num_retain_evaluated']} examples, "
        "drawn at random. All examples are read as --data and --test return them: with "
        "random augmentation, if these have any."
    )


def _erased(number: int) -> str:
    """Return a sentence about a training set from which examples were erased.

    Args:
        number: How many forgotten examples are not read.
    """
    words = f"{number} forgotten example{'s' * (number > 1)}"
    return (
        f"{words} may have been erased from the data set and will not be read. The "
        "remaining examples agree with the fingerprint in the deletion log."
    )


def _of_log(facts: dict[str, Any]) -> list[str]:
    """Return the paragraphs about the log: what the run carried out, and the head.

    Args:
        facts: The answer for programs, of a command with ``--log``.
    """
    names, persons = facts["request_ids"], facts["persons"]
    if len(persons) > 1:
        pairs = zip(names, persons, strict=True)
        names = [f"{name} for {person}" for name, person in pairs]
    notes = _done_before(facts) + [
        f"Request {name} was still pending in the log: its examples were forgotten in "
        "the same run."
        for name in facts["together_with"]
    ]
    if facts["continues_from_log"] and facts["carried_out"]:
        notes.append(
            f"The run started from the weights beside the log, {facts['weights']}, "
            "which honour the earlier requests, and replaced them."
        )
    if facts["log_is_new"]:
        notes.append(
            f"{facts['deletion_log']} is a new log. If requests about this model were "
            "entered in another log before, the model does not honour them."
        )
    return [
        *notes,
        f"Entered in {facts['deletion_log']} as {', '.join(names)}. Keep the "
        "head of the log elsewhere: with it, 'opacus-pi verify' finds out whether "
        f"this entry or an earlier one is removed.\n{facts['head']}",
    ]


def _done_before(facts: dict[str, Any]) -> list[str]:
    """Return a sentence for each request of this command that needed no run."""
    if not facts["request_ids"]:
        return ["No request is pending."]
    return [
        *(f"Request {name} was carried out before." for name in facts["done_before"]),
        *(
            f"All examples of request {name} were forgotten before, by earlier "
            "requests: nothing was trained for it, and the log now says that it was "
            "carried out."
            for name in facts["forgotten_before"]
        ),
    ]


def _left_out(record: dict[str, Any]) -> str:
    """Return a sentence about examples of earlier requests; empty if there are none.

    Args:
        record: Of the run, which also leaves these examples out.
    """
    more = len({*record["forgotten_before"]} - {*record["forget_indices"]})
    if not more:
        return ""
    return (
        f" It also left out the {more} other example{'s' * (more > 1)} of earlier "
        "requests."
    )


def _forgot(size: int, method: str, num_steps: int) -> str:
    """Return the start of a sentence: how many examples were forgotten, and how."""
    return f"Forgot {size} example{'s' * (size > 1)} by {method}: {num_steps} updates"
