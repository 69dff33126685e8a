"""Audit the run that an engine has prepared, and have its loop compared afterwards.

``audit`` compares what is recorded for a batch with its examples alone, but it cannot
see how the training loop calls model and criterion. So an audit of a run has two parts:
batches of the run's own data set are audited now, and the first updates of the loop,
and a few later ones, are compared with the criterion that was audited (``loop_loss``).
What both find enters the chain of custody of the run.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from opacus_pi._errors import AccountingError
from opacus_pi.custody import Chain
from opacus_pi.integration.audit import Audit, finding_of, joined
from opacus_pi.integration.collate_audit import audit_items, tell_of_collate
from opacus_pi.integration.loop_loss import LoopLoss, not_compared
from opacus_pi.integration.probes import called_module
from opacus_pi.integration.runs import CurrentRun
from opacus_pi.recording import Recorder

__all__ = ["audit_run"]


def audit_run(
    run: CurrentRun | None,
    module: nn.Module,
    criterion: Any,
    num_batches: int,
    *,
    recorder: Recorder,
    new_engine: Callable[[Recorder], Any],
) -> Audit:
    """Compare the norms that a run records with gradients of single examples.

    Args:
        run: The run that was prepared last.
        module: The user's module.
        criterion: What the training loop calls as ``criterion(model(x), y)``.
        num_batches: How many batches to look at.
        recorder: The engine's recorder; its chain of custody gets the findings.
        new_engine: Returns an engine that reports to a recorder.

    Returns:
        The comparisons.

    Raises:
        AccountingError: If no run is prepared.
    """
    audited = None if run is None else run.audited
    if run is None or audited is None or audited.examples is None:
        raise AccountingError(
            "There is nothing to audit. Call make_private or make_monitored first."
        )
    found = [
        audit_items(module, criterion, places, run=audited, new_engine=new_engine)
        for places in audited.examples.places(num_batches)
    ]
    audit = joined(found)
    chain = recorder.chain
    if chain is not None:
        awaits_loop = audit["loss"].passed and _compare_loop(
            run, module, criterion, chain, recorder.num_steps, new_engine
        )
        if not awaits_loop:
            finding_of(audit["loss"]).tell(chain, "loss")
        for name, link in (("model", "model"), ("norms", "norm")):
            finding_of(audit[name]).tell(chain, link)
        tell_of_collate(audit, chain)
        if audit["norms"].passed and not audited.is_swept:
            chain.settle("norm", audited.registered)
    return audit


def _compare_loop(
    run: CurrentRun,
    module: nn.Module,
    criterion: Any,
    chain: Chain,
    num_steps: int,
    new_engine: Callable[[Recorder], Any],
) -> bool:
    """Have a few updates compared with a criterion that was audited.

    Args:
        run: The run.
        module: The user's module.
        criterion: The criterion.
        chain: The chain of custody of the run.
        num_steps: How many updates were made before.
        new_engine: Returns an engine that reports to a recorder.

    Returns:
        Whether the link "loss" waits for the loop; False after ``make_monitored``,
        which compares gradients of the loop by itself if there is noise, and otherwise
        leaves the link unchecked.
    """
    update, audited = run.present_update(), run.audited
    if update is None or audited is None:
        return False
    if audited.is_swept:
        not_compared(chain)
        return True
    num_before = 0 if chain.is_checked("loss") else num_steps
    if update.loop_loss is not None:
        update.loop_loss.end()
        if update.loop_loss.num_compared:
            num_before = update.loop_loss.num_before
    if update.has_begun:
        num_before = num_steps + 1
    update.loop_loss = LoopLoss(
        criterion,
        audited,
        update.tracker,
        chain,
        new_engine,
        num_steps=num_steps,
        num_before=num_before,
    )
    update.loop_loss.optimizer = update.optimizer
    update.loop_loss.begin(called_module(update.hooks), module)
    return True
