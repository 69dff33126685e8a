"""Loops of every kind: a recorded norm is right, or refused, or the cause is said.

Each loop trains for a few updates with the engine. The oracle says what every update
really used of every example, and the record must agree with it in every entry; or
refuse; or name the cause.
"""

import re
import warnings

import pytest

from opacus_pi import AccountingError
from tests.custody import loop_list, oracle
from tests.custody.loops import Run

_OF_OTHERS = re.compile("Secure RNG|backward hook is firing|detected new dataset")
_GENERIC = re.compile("could not (be )?check|was not looked at", re.IGNORECASE)
RIGHT, REFUSED, SAID, SILENT = "right", "refused", "said", "SILENT"


def trained(loop):
    """Run a loop; return it with the warnings that the engine gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = Run(loop)
        loop.updates(run)
        try:
            run.ledger, run.refusal = run.engine.ledger, ""
        except AccountingError as error:
            run.ledger, run.refusal = None, str(error)
    texts = [str(warning.message) for warning in caught]
    run.said = [text for text in texts if not _OF_OTHERS.search(text)]
    return run


def unchecked(run):
    """Return what the ledger says of the link that the loop breaks, if it is unchecked.

    A doubt that names no cause does not count where the link could be looked at: the
    model, and the criterion of ghost clipping and of a sweep, are probed.
    """
    custody, link = getattr(run.ledger, "custody", None), run.loop.breaks
    is_probed = link == "model" or run.loop.mode in ("ghost", "swept")
    if custody is None or (link == "loss" and is_probed):
        return []
    return [
        known.sentence
        for known in custody.links
        if known.name == link and known.state == "unchecked"
    ]


def verdict(run, truth):
    """Return how the record of a run compares with the truth, and a reason."""
    if run.refusal:
        return REFUSED, run.refusal
    if not isinstance(truth, str) and oracle.equal_norms(run.ledger.grad_norms, truth):
        return RIGHT, ""
    said = [*run.said, *unchecked(run)]
    said = [text for text in said if not _GENERIC.search(text)]
    return (SAID, " | ".join(said)) if said else (SILENT, "")


@pytest.mark.parametrize("loop", loop_list.with_modes(loop_list.CONTROLS), ids=str)
def test_an_ordinary_loop_is_recorded_without_a_word(loop):
    run = trained(loop)
    assert verdict(run, oracle.true_norms(run)) == (RIGHT, "")
    assert run.said == []
    assert run.engine.attribution["unattributed"] == 0
    assert len(run.updates) >= 3


@pytest.mark.parametrize("loop", loop_list.with_modes(loop_list.UNCERTAIN), ids=str)
def test_an_unusual_loop_is_right_or_refused_or_said(loop):
    run = trained(loop)
    truth = oracle.true_norms(run)
    assert not isinstance(truth, str)
    assert verdict(run, truth)[0] != SILENT


@pytest.mark.parametrize("loop", loop_list.with_modes(loop_list.BROKEN), ids=str)
def test_a_loop_without_right_norms_is_refused_or_said(loop):
    run = trained(loop)
    truth = oracle.true_norms(run)
    assert isinstance(truth, str)
    assert verdict(run, truth)[0] in (REFUSED, SAID)
