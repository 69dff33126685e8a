"""Refuse other ledgers than those of the weights before a request is entered.

A ledger proves something only about the weights that its training left. If they are
others, no number can be claimed after the run, and the entry in the log cannot be taken
back. So the weights are compared first.

*Guarantee.* A run whose ledgers all name the weights that they left starts from such
weights, or nothing is entered and nothing is trained.
*What breaks it.* Nothing is compared if a ledger names no weights or says that they
were changed after its training, or if the weights beside the log do not say from which
weights its runs started (after rewinds and in files of earlier releases). The guarantee
then lists what is known.
"""

import argparse
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi.cli.errors import BadInput, with_flags
from opacus_pi.cli.owners import IF_ERASED
from opacus_pi.ledger.checks import CHANGED
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger, require_alike
from opacus_pi.models.weights_name import weights_name
from opacus_pi.unlearning import Unlearner
from opacus_pi.unlearning.claims import left_other_weights, runs_in
from opacus_pi.unlearning.honouring_weights import weights_path_of
from opacus_pi.unlearning.rewind import OtherWeights


def require_ledgers_of(
    options: argparse.Namespace, runs: list[GradNormLedger], data_set: str
) -> None:
    """Refuse ledgers of another data set, and ledgers of different trainings.

    Args:
        options: The parsed arguments of ``unlearn``, with the files of the ledgers.
        runs: The ledgers.
        data_set: Fingerprint of the training set.

    Raises:
        BadInput: If a ledger is of another data set.
        ValueError: If the ledgers are not of one training procedure.
    """
    for path, run in zip(options.ledger, runs, strict=True):
        try:
            run.require_data_set(data_set)
        except ValueError as error:
            message = with_flags(error, options)
            remedy = "" if options.log else f" {IF_ERASED}"
            raise BadInput(f"--ledger {path}: {message}{remedy}") from error
    require_alike(runs)


def require_recorded_weights(
    options: argparse.Namespace,
    unlearner: Unlearner,
    forget: NDArray[np.int64],
    going_back: dict[str, Any],
) -> None:
    """Refuse weights that the recorded training did not leave, where that is known.

    Args:
        options: The parsed arguments of ``unlearn``.
        unlearner: Has the ledgers, and continues from the weights beside the log if
            there are any.
        forget: The examples that the next run is to forget.
        going_back: The arguments of a rewind; empty: no rewind.

    Raises:
        BadInput: If the weights are others.
        ValueError: As ``Unlearner.plan_rewind``.
    """
    if going_back:
        _require_weights_to_keep(options, unlearner, forget, going_back)
        return
    runs = runs_in(unlearner.ledger)
    if not left_other_weights(runs, unlearner.model, unlearner.history):
        return
    held = f"--model with --weights {options.weights}"
    if unlearner.history.trained:
        held = f"the weights from which the requests in {options.log} started"
    several = len(runs) > 1
    raise BadInput(
        f"--ledger: {', '.join(options.ledger)} "
        f"{'name' if several else 'names'} by SHA-256 the weights that "
        f"{'their trainings' if several else 'its training'} left, and those of {held} "
        "are others: they are of another training, or were changed after it. Nothing "
        "was entered. Name the ledger of the training that left these weights, or "
        f"{'write --without-ledger in place of' if options.log else 'leave out'} "
        "--ledger; the guarantee is then empirical."
    )


def require_weights_of_log(
    options: argparse.Namespace, given: str, unlearner: Unlearner
) -> None:
    """Refuse weights that neither the training left nor the latest run for the log.

    The run starts from the weights beside the log. To name others with ``--weights`` is
    a mistake, which would have no effect. ``DeletionRequests.resume`` refuses them if
    the log says where its runs started; after rewinds only the ledgers say it.

    Args:
        options: The parsed arguments of ``unlearn``, with ``--log``.
        given: Name of the weights of ``--weights``.
        unlearner: Has the ledgers, and the weights beside the log.

    Raises:
        BadInput: If the weights are others, and each ledger names its weights.
    """
    names = {run.weights for run in runs_in(unlearner.ledger)}
    if not names or names & {None, CHANGED}:
        return
    if given in names | {unlearner.history.trained, weights_name(unlearner.model)}:
        return
    beside = weights_path_of(os.path.realpath(options.log))
    raise BadInput(
        f"--weights: {options.weights} holds neither the weights that the training "
        f"left nor those in {beside}, from which this run would start. Nothing was "
        "entered. Name the weights of the training, or the log of this model."
    )


def _require_weights_to_keep(
    options: argparse.Namespace,
    unlearner: Unlearner,
    forget: NDArray[np.int64],
    going_back: dict[str, Any],
) -> None:
    """Refuse a rewind that would keep a model which is not the trained one.

    A rewind that trains something again starts from a saved state, whatever the weights
    of the model are.
    """
    try:
        unlearner.plan_rewind(forget, **going_back)
    except OtherWeights as error:
        raise _not_kept(options) from error


def _not_kept(options: argparse.Namespace) -> BadInput:
    """Return the error that names the argument with the weights that are not kept."""
    held = f"--weights: {options.weights} does"
    remedy = "Name the weights of the trained model"
    if options.log and weights_path_of(os.path.realpath(options.log)).exists():
        held = f"--log: the weights beside {options.log} do"
        remedy = (
            "Leave out --policy: an exact rewind starts from a saved state, whatever "
            "the weights are, and forgets the examples of all requests. Without "
            "--checkpoints, the weights are fine-tuned further"
        )
    return BadInput(
        f"{held} not hold what the training of --checkpoints {options.checkpoints} "
        "left (their SHA-256 differs). For this request nothing has to be trained "
        f"again, so the trained model would be kept. Nothing was entered. {remedy}."
    )
