"""Whether an unlearning run and a ledger belong to the same training.

A report shows the privacy losses of a training beside a model that was made to forget.
Both come from files, so those of two trainings could be combined by mistake. The record
of a run says from which weights it started and with which ledgers. It must agree with
the ledgers of the report; what it does not say is listed in the report as not checked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from opacus_pi._validate import expect
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger
from opacus_pi.ledger.run_identity import RunIdentity, named_weights
from opacus_pi.ledger.same_data import same_data_set

_REMEDY = (
    "Pass the ledger of the training from which this unlearning run started, or report "
    "the training alone."
)
UNCHECKED = (
    "Whether the unlearning run started from the training of this ledger is not known: "
    "{0}. Compare them yourself."
)


def require_same_training(
    record: Mapping[str, Any], runs: Sequence[GradNormLedger]
) -> tuple[str, ...]:
    """Refuse an unlearning run that started from another training.

    Of several ledgers, one must be of the training that the run started from: the
    others are independent runs of the same procedure.

    Args:
        record: Of the unlearning run.
        runs: The ledgers of the report.

    Returns:
        Sentences about what could not be checked.

    Raises:
        ValueError: If the record names another data set, or other weights or norms.
    """
    data_set = record.get("data_set")
    for run in runs:
        known = isinstance(data_set, str) and run.data_set is not None
        expect(
            not known or same_data_set(str(run.data_set), str(data_set)),
            "ledger",
            run.data_set,
            f"must be of the data set of the unlearning run, {data_set}",
            _REMEDY,
        )
    names = [named_weights(run) for run in runs]
    trained = record.get("trained_weights")
    if trained is not None and trained in names:
        return ()
    used = _identities(record)
    if any(one.is_of(run) for one in used for run in runs):
        return ()
    expect(
        not used and (trained is None or None in names),
        "ledger",
        ", ".join(_short(name) for name in names),
        "must be of the training from which the unlearning run started, which left "
        f"weights with the hash {_short(trained)}",
        _REMEDY,
    )
    why = (
        "the record of the run is of an earlier release"
        if trained is None
        else "the ledger does not name the weights that its training left"
    )
    return (UNCHECKED.format(why),)


def _identities(record: Mapping[str, Any]) -> list[RunIdentity]:
    """Return which ledgers a run was made with; empty if it does not say.

    Raises:
        ValueError: If the entry has another form.
    """
    found = record.get("ledgers", [])
    try:
        return [RunIdentity(str(one["norms"]), one["weights"]) for one in found]
    except (TypeError, KeyError) as error:
        raise ValueError(
            "The record of the unlearning run must list its ledgers by norms and "
            "weights. It was edited: use the original."
        ) from error


def _short(name: Any) -> str:
    """Return the first digits of a hash."""
    return "unknown" if name is None else f"{str(name)[:15]}…"
