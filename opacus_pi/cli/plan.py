"""``opacus-pi plan``: predict what forgetting a set will take.

Nothing is trained, and no weights are read. The difficulty comes from the ledger, the
number of steps from past runs that the user lists, and the guarantee from the ledger,
the method and the model's architecture.
"""

import argparse
import json
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from opacus_pi.cli.errors import BadInput, about
from opacus_pi.cli.inputs import (
    import_model,
    load_ledgers,
    read_forget_set,
    read_indices,
)
from opacus_pi.cli.methods import make_method
from opacus_pi.cli.output import answer
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger
from opacus_pi.unlearning.claims import History, claim
from opacus_pi.unlearning.plan import PastRun, Plan, make_plan
from opacus_pi.unlearning.requests import requested_indices


def run(options: argparse.Namespace) -> int:
    """Make the plan and print it.

    Args:
        options: The parsed arguments of ``plan``.

    Returns:
        The exit code.

    Raises:
        BadInput: If a file cannot be used, or a method is named without a model.
        ValueError: If the library refuses a value; the program names the flag.
    """
    if options.method is not None and options.model is None:
        raise BadInput(
            "--method: its guarantee depends on the model. Name the architecture too: "
            "--model my_project:build."
        )
    runs = load_ledgers(options.ledger, options.noise_std)
    before = _requested_before(options.log, runs[0])
    plan = make_plan(
        runs,
        read_forget_set(options),
        order=options.order,
        past_runs=_past_runs(options.past),
        batch_size=options.batch_size,
        forgotten_before=before,
    )
    if options.model is not None:
        guarantee = claim(
            make_method(options.method, options.settings),
            import_model(options),
            runs,
            plan.forget,
            # the runs of earlier requests are fine-tuned on what is requested now
            History(updated=len(before) > 0),
            forgotten_before=before,
            has_weights=False,
        )
        plan = plan.claiming(guarantee)
    answer(options, _facts(plan, options.delta), plan.text(options.delta))
    return 0


def _requested_before(log: str | None, ledger: GradNormLedger) -> NDArray[np.int64]:
    """Return the sorted examples that requests of a deletion log name, done or not.

    A pending request counts, too: it will be carried out before this one.

    Args:
        log: Path of the deletion log; None: there were no requests. It is only read.
        ledger: A ledger of the training, for the length of the training set.
    """
    if log is None:
        return np.empty(0, dtype=np.int64)
    ids = ledger.example_ids
    size = ledger.num_examples if ids is None else int(np.max(ids)) + 1
    with about("--log", "Name what 'opacus-pi unlearn --log' wrote."):
        return requested_indices(log, size)


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
    }
