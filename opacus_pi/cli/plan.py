"""``opacus-pi plan``: how hard a set will be to forget, before anything is run."""

import argparse
import json
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from opacus_pi.accounting import GradNormLedger
from opacus_pi.cli.arguments import (
    add_accounting,
    add_batch_size,
    add_delta,
    add_forget,
    add_ledgers,
    add_model,
    add_output,
    indices,
    ledgers,
    model,
)
from opacus_pi.cli.errors import BadInput, about
from opacus_pi.cli.methods import add_method, make_method
from opacus_pi.cli.output import answer
from opacus_pi.unlearning.claims import claim
from opacus_pi.unlearning.deletion_record import read_entries
from opacus_pi.unlearning.plan import PastRun, Plan, make_plan
from opacus_pi.unlearning.request_entries import requests_of

HELP = "difficulty, steps and kind of guarantee of a forget set"
DESCRIPTION = """\
What to expect of forgetting a set: where its mean privacy loss stands among all
examples (percentile), how many steps past runs predict, and, if the model's
architecture is named, what may be claimed afterwards. Nothing is trained. Where there
were requests before, name their record (--record): what they asked for is not kept
either, and what may be claimed is about all of it together."""
EXAMPLES = """\
examples:
  opacus-pi plan ledger.safetensors --forget 17
  opacus-pi plan ledger.safetensors --forget ids.txt --model my_project:build \\
      --method langevin --set noise_std=0.02
  opacus-pi plan ledger.safetensors --forget new.txt \\
      --past easy.txt=0.5 --past hard.txt=12
  opacus-pi plan ledger.safetensors --forget 5 --record deletions.jsonl"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_ledgers(parser, "ledger")
    add_forget(parser)
    add_accounting(parser)
    add_delta(parser)
    add_model(parser, weights=False)
    add_method(parser)
    parser.add_argument(
        "--past",
        metavar="IDS|FILE=EPOCHS",
        action="append",
        default=[],
        help="a set unlearned before from this training and the epochs it took, 25+ if "
        "it was not there after 25; two of different difficulty give a prediction",
    )
    parser.add_argument(
        "--record",
        metavar="FILE.jsonl",
        help="the deletion record of the requests before this one; it is only read",
    )
    add_batch_size(parser)
    add_output(parser)


def run(options: argparse.Namespace) -> int:
    """Plan and print."""
    if options.method is not None and options.model is None:
        raise BadInput(
            "--method: what it may claim depends on the model. Name its architecture "
            "too: --model my_project:build."
        )
    runs = ledgers(options.ledger, options.noise_std)
    before = _asked_before(options.record, runs[0])
    found = make_plan(
        runs,
        indices(options.forget_indices),
        order=options.order,
        past_runs=_past(options.past),
        batch_size=options.batch_size,
        forgotten_before=before,
    )
    if options.model is not None:
        method = make_method(options.method, options.settings)
        network = model(options, None)
        found = found.claiming(
            claim(
                method,
                network,
                runs,
                found.forget,
                forgotten_before=before,
                has_weights=False,
            )
        )
    answer(options, _facts(found, options.delta), found.text(options.delta))
    return 0


def _asked_before(record: str | None, ledger: GradNormLedger) -> NDArray[np.int64]:
    """Whom the requests of a record ask to forget, done or pending; sorted."""
    if record is None:
        return np.empty(0, dtype=np.int64)
    ids = ledger.example_ids
    size = ledger.num_examples if ids is None else int(np.max(ids)) + 1
    with about("--record", "Name what 'opacus-pi unlearn --record' wrote."):
        asked = requests_of(read_entries(record), size).submitted.values()
    rows = {row for request in asked for row in request.indices}
    return np.array(sorted(rows), dtype=np.int64)


def _past(texts: Sequence[str]) -> list[PastRun]:
    """Sets unlearned before, each with the epochs it took and ran."""
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
                "3,17=25+ if it was not there after 25."
            )
        took = math.inf if epochs.endswith("+") else length
        past.append((indices(forget, "--past"), took, length))
    return past


def _facts(plan: Plan, delta: float) -> dict[str, object]:
    """The answer for programs."""
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
