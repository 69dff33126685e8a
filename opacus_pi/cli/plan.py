"""``opacus-pi plan``: predict what forgetting a set will take.

Nothing is trained, and no weights are read. The difficulty comes from the ledger, the
number of steps from past runs that the user lists, and the guarantee from the ledger,
the method and the model's architecture. With ``--checkpoints`` it also says how far a
rewind goes back and what it costs. With ``--log`` it is about the run that ``unlearn
--log`` would make: that forgets all pending requests together.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from opacus_pi._validate import distinct_indices
from opacus_pi.accounting.filtered_rewind import DeletionPolicy
from opacus_pi.cli.errors import BadInput, about
from opacus_pi.cli.inputs import (
    import_model,
    load_ledgers,
    read_indices,
)
from opacus_pi.cli.methods import make_method
from opacus_pi.cli.output import answer
from opacus_pi.cli.owners import read_request, shared_text
from opacus_pi.cli.rewinds import rewind_options
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger
from opacus_pi.recording.checkpoints import Checkpoints
from opacus_pi.unlearning.claims import EngineFacts, claim
from opacus_pi.unlearning.next_run import NextRun, next_run
from opacus_pi.unlearning.plan import PastRun, Plan, make_plan, require_rest
from opacus_pi.unlearning.rewind import RecordedTraining
from opacus_pi.unlearning.rewind_plan import RewindPlan


def run(options: argparse.Namespace) -> int:
    """Make the plan and print it.

    Args:
        options: The parsed arguments of ``plan``.

    Returns:
        The exit code.

    Raises:
        BadInput: If a file cannot be used.
        ValueError: If the library refuses a value; the program names the flag.
    """
    going_back = rewind_options(options)
    runs = load_ledgers(options.ledger, options.noise_std)
    named, _ = read_request(options, lambda: runs[0].data_set)
    log = _next_run(options.log, runs[0])
    plan = make_plan(
        runs,
        _with_pending(named, log),
        order=options.order,
        past_runs=_past_runs(options.past),
        batch_size=options.batch_size,
        forgotten_before=log.forgotten,
    ).after(log.history, log.forgotten_exactly)
    # With a rewind, what fine-tuning could claim is only wanted if it was named.
    if options.model is not None and (options.method or not going_back):
        guarantee = claim(
            make_method(options.method, options.settings),
            import_model(options),
            runs,
            plan.forget,
            log.history,
            forgotten_before=log.forgotten,
            has_weights=False,
        )
        plan = plan.claiming(guarantee)
    if going_back:
        rewind = _rewind(options, runs, plan, log, **going_back)
        plan = replace(plan, rewind=rewind)
    facts = {**_facts(plan, options.delta), "pending": _pending(log)}
    facts["also_of"] = options.also_of
    shared = shared_text(options.also_of)
    start = f"{shared}\n" * bool(shared) + _of_log(options.log, named, log)
    text = f"{start}{plan.text(options.delta)}"
    answer(options, facts, text)
    return 0


def _with_pending(named: NDArray[np.int64], log: NextRun) -> NDArray[np.int64]:
    """Return the examples that one run forgets, unchanged if no request is pending.

    Args:
        named: The examples that the command names; the plan checks them.
        log: Has the pending requests.
    """
    return np.union1d(named, log.examples) if log.pending else named


def _pending(log: NextRun) -> list[str]:
    """Return the names of the pending requests, which the plan includes."""
    return [request.request_id for request in log.pending]


def _of_log(path: str | None, named: NDArray[np.int64], log: NextRun) -> str:
    """Return the lines about the pending requests of a log; empty without a log.

    Args:
        path: The deletion log; None: no log was named.
        named: The examples that the command names.
        log: Has the pending requests.
    """
    if path is None:
        return ""
    if not log.pending:
        return f"Pending in {path}: no request.\n"
    more = len(np.setdiff1d(log.examples, named))
    return (
        f"Pending in {path}: {', '.join(_pending(log))}. 'opacus-pi unlearn --log' "
        "carries out all pending requests in one run, so this plan includes them. "
        + (
            f"They add {more} example{'s' * (more != 1)} to those of the command.\n"
            if more
            else "The command names all of their examples.\n"
        )
    )


def _rewind(
    options: argparse.Namespace,
    runs: Sequence[GradNormLedger],
    plan: Plan,
    log: NextRun,
    *,
    checkpoints: Checkpoints,
    deletion_policy: DeletionPolicy | None,
) -> RewindPlan:
    """Return how far back a rewind goes, what it costs, and what it proves.

    Args:
        options: The parsed arguments, with a model.
        runs: The ledger of the training, and no other.
        plan: Has the examples to forget, and those that were forgotten before.
        log: Knows which of them an exact rewind has forgotten, and the weights from
            which the run starts.
        checkpoints: The saved states of the training.
        deletion_policy: Its policy; None: an exact rewind.

    Raises:
        BadInput: If the trained model would be kept, but the log has other weights.
        ValueError: If the states are those of another run, or none is from before the
            first use of the examples.
    """
    training = RecordedTraining.of(
        import_model(options),
        tuple(runs),
        checkpoints,
        EngineFacts(),
        has_weights=False,
    )
    size = training.record.num_examples
    distinct_indices("forget_indices", plan.forget, size)
    require_rest(size - len(np.union1d(plan.forget, plan.forgotten_before)), size)
    found = training.plan(
        plan.forget, plan.forgotten_before, deletion_policy, log.forgotten_exactly
    )
    training.require_architecture(found)
    if found.is_free and log.history.left not in ("", checkpoints.record.weights):
        raise BadInput(
            f"--log: for this request nothing would have to be trained again, but the "
            f"weights beside {options.log} are not those that the training left, and "
            "'opacus-pi unlearn' refuses to keep them. Leave out --policy: an exact "
            "rewind starts from a saved state, whatever the weights are."
        )
    return found


def _next_run(log: str | None, ledger: GradNormLedger) -> NextRun:
    """Return from where the next run for a deletion log starts, and what it forgets.

    Args:
        log: Path of the deletion log; None: there were no requests. It is only read.
        ledger: A ledger of the training, for the training set's length and fingerprint.
    """
    if log is None:
        return NextRun()
    ids = ledger.example_ids
    size = ledger.num_examples if ids is None else int(np.max(ids)) + 1
    with about("--log", "Name what 'opacus-pi unlearn --log' wrote."):
        return next_run(log, size, ledger.data_set)


def _past_runs(texts: Sequence[str]) -> list[PastRun]:
    """Return sets that were unlearned before, and how many epochs that took.

    ``25+`` means that the set was not forgotten after 25 epochs: the time is infinite.

    Args:
        texts: ``IDS=EPOCHS`` each, as given with ``--past``.

    Returns:
        Of each: the ids, the epochs until the set was forgotten, the epochs run.

    Raises:
        BadInput: If a text has another form.
    """
    past: list[PastRun] = []
    for text in texts:
        forget, equals, epochs = text.rpartition("=")
        try:
            length = float(epochs.removesuffix("+")) if equals else math.nan
        except ValueError:
            length = math.nan
        if not 0 <= length < math.inf:
            raise BadInput(
                f"--past: {text} is not IDS=EPOCHS. Write for example 3,17=2.5, or "
                "3,17=25+ if the set was not forgotten after 25 epochs."
            )
        time = math.inf if epochs.endswith("+") else length
        past.append((read_indices(forget, "--past"), time, length))
    return past


def _facts(plan: Plan, delta: float) -> dict[str, object]:
    """Return the answer as JSON facts for a program.

    They do not list the examples to forget, which the caller named. Numbers that are
    not known are null.
    """
    return {
        "format": "opacus_pi.cli.plan.v1",
        "num_forget": len(plan.forget),
        "num_retain": plan.num_retain,
        "num_forgotten_before": len(plan.forgotten_before),
        "earlier_runs": plan.earlier_runs,
        "num_forgotten_exactly": plan.num_forgotten_exactly,
        "order": plan.order,
        "mean_loss": plan.mean_loss,
        "percentile": plan.percentile,
        "ranking_only": plan.ranking_only,
        "steps_per_epoch": plan.steps_per_epoch,
        "predicted_epochs": plan.predicted_epochs,
        "predicted_steps": plan.predicted_steps,
        "prediction": plan.prediction,
        "num_unfinished": plan.num_unfinished,
        "num_tied": plan.num_tied,
        "delta": delta,
        "epsilon": plan.guarantee.epsilon(delta),
        "guarantee": json.loads(plan.guarantee.to_json()),
        "rewind": None if plan.rewind is None else _rewind_facts(plan.rewind, delta),
    }


def _rewind_facts(rewind: RewindPlan, delta: float) -> dict[str, object]:
    """Return the plan of a rewind as JSON facts, without the examples."""
    facts = rewind.facts()
    return {
        "method": facts["method"],
        "policy": facts["policy"],
        "start": rewind.start,
        "num_updates": rewind.num_updates,
        "num_samples": rewind.num_samples,
        "num_bytes": rewind.num_bytes,
        "cost": rewind.cost,
        "epsilon": rewind.guarantee.epsilon(delta),
        "guarantee": json.loads(rewind.guarantee.to_json()),
    }
