"""What may be claimed about a model that went back to a saved state, and on what.

``rewind`` says why it holds. Here the assumptions are listed with their evidence: the
links of custody that a rewind depends on, and what whoever asks for it declares.
"""

import math
from collections.abc import Iterator

import numpy as np

from opacus_pi.accounting import GradNormLedger
from opacus_pi.accounting.epsilon import DEFAULT_ORDERS
from opacus_pi.accounting.filtered_rewind import DeletionPolicy
from opacus_pi.accounting.guarantee import (
    Assumption,
    EpsilonDelta,
    Guarantee,
    derived,
    guarantee_of_run,
    observed,
)
from opacus_pi.accounting.training_bound import item_is_the_unit, unpredictable_noise
from opacus_pi.ledger.custody import CHECKED, LINKS, Custody
from opacus_pi.ledger.participation_record import ParticipationRecord
from opacus_pi.recording.checkpoints import policy_in
from opacus_pi.unlearning.same_training_data import same_data, same_preparation

_ORDERS = DEFAULT_ORDERS[::3]
_OF_DRAWS = ("draw", "schedule", "identity", "rows", "weights")
_OF_CHARGES = ("model", "norm", "noise")
_UNSEEN_LOOP = "the engine does not see the training loop"
_CHECKED_LOSS = (
    "the loss of the training was checked, but the ledger does not name the criterion, "
    "so it is not known whether this is the same one"
)
_DECLARED = (
    (
        "the code inside the modules of the model is that of the training",
        "names, types and settings of the modules were compared, if the saved states "
        "list them; what their methods compute was not",
    ),
    (
        "each update of the training used the gradient of this criterion on its batch, "
        "and nothing else",
        "{loss}; learning rates are those recorded",
    ),
    (
        "the number of updates and the hyper-parameters were not chosen from the data",
        "they are used again as they are",
    ),
    (
        "the forget set was not chosen by looking at the trained model",
        "requests are made by people, not by results",
    ),
    (
        "random numbers are independent of each other and of the data",
        "the rest is trained with a new seed",
    ),
)
ALIKE = "(compared with a model trained without the set, by the same schedule)"
_MONITORED = (
    "each update used the batch that the loader had delivered before it",
    True,
    "monitored training follows batches, not single samples",
)


def rewind_claim(
    ledger: GradNormLedger,
    record: ParticipationRecord,
    data_set: str | None,
    start: int,
    policy: DeletionPolicy | None,
    num_exact: int,
) -> Guarantee:
    """Return what may be claimed for a model that goes back to an update.

    Args:
        ledger: The ledger of the training.
        record: Its participations.
        data_set: Fingerprint of the data set that the rewind gets; None in a plan.
        start: The update to go back to.
        policy: The deletion policy; None: an exact rewind.
        num_exact: How many examples an exact rewind forgot before, of those that
            the training had used.
    """
    facts = [
        observed(
            "every use of the examples is in the record of participations",
            f"{len(record.indices)} participations in {record.num_steps} updates",
        ),
        *_links(ledger.custody, charges=policy is not None),
        *_declared(ledger.custody),
        item_is_the_unit(),
        same_data([ledger.data_set], data_set),
    ]
    if start < record.num_steps:
        facts.append(same_preparation(ledger.data_set or "", data_set))
    if not np.isfinite(record.max_grad_norm).all():
        facts.append(Assumption(*_MONITORED))
    if policy is None:
        proof = derived(
            "until its first use an example cannot act on the training",
            f"the state after update {start} was saved before the first use",
        )
        pair = EpsilonDelta(0.0, 0.0, "exact rewind", both_directions=True)
        zeros = [0.0] * len(_ORDERS)
        return guarantee_of_run(
            f"exact rewind {ALIKE}",
            [proof, *facts],
            _ORDERS,
            zeros,
            reverse_divergences=zeros,
            statements=[pair],
        )
    if num_exact:
        stay = derived(
            "examples that an exact rewind forgot before stay exactly forgotten "
            f"({num_exact}; for them alone ε = 0)",
            f"the state after update {start} was saved before their first use",
        )
        facts.insert(0, stay)
    return _filtered_claim(ledger, record, start, policy, facts)


def _filtered_claim(
    ledger: GradNormLedger,
    record: ParticipationRecord,
    start: int,
    policy: DeletionPolicy,
    facts: list[Assumption],
) -> Guarantee:
    """Return what may be claimed after a filtered rewind.

    Args:
        ledger: The ledger of the training.
        record: Its participations.
        start: The update to go back to.
        policy: The deletion policy of the run.
        facts: What every rewind assumes.
    """
    proof = derived(
        "the sum of the charges cannot exceed the policy on any path",
        "the sum is checked at every saved state; the first update after a state "
        "is charged by its own norms, the others before the next state at the clip "
        "norm",
    )
    made = observed(
        "the policy was fixed before training",
        f"made {policy_in(record.policy).made}, "  # type: ignore[union-attr]
        f"recording began {record.began}",
    )
    noise = unpredictable_noise([ledger], has_more_noise=start < record.num_steps)
    pair = EpsilonDelta(
        policy.epsilon, policy.delta, "the deletion policy", both_directions=True
    )
    mu = policy.mu  # solved for each time that it is asked
    curve = [math.nextafter(a * mu**2 / 2, math.inf) for a in _ORDERS]
    return guarantee_of_run(
        f"filtered rewind {ALIKE}",
        [proof, made, noise, *facts],
        _ORDERS,
        curve,
        reverse_divergences=curve,
        statements=[pair],
    )


def _declared(custody: Custody | None) -> Iterator[Assumption]:
    """Yield what whoever asks for a rewind declares.

    Args:
        custody: The chain of the run, which knows whether its loss was checked.
    """
    links = () if custody is None else custody.links
    is_checked = any(k.name == "loss" and k.state == CHECKED for k in links)
    for text, evidence in _DECLARED:
        loss = _CHECKED_LOSS if is_checked else _UNSEEN_LOOP
        yield Assumption(text, True, evidence.format(loss=loss))


def _links(custody: Custody | None, *, charges: bool) -> Iterator[Assumption]:
    """Yield an assumption for each link of custody that a rewind depends on.

    Args:
        custody: The chain of the run; None: its maker declares everything.
        charges: Whether norms and noise matter too.
    """
    if custody is None:
        yield Assumption(
            "the ledger describes the training as it was run",
            True,
            "the ledger was made by hand",
        )
        return
    unchecked = {link.name: link.sentence for link in custody.unchecked}
    evidence = {k.name: k.sentence for k in custody.links if k.state == CHECKED}
    for name in (*_OF_DRAWS, *(_OF_CHARGES if charges else ())):
        if name in unchecked:
            yield Assumption(LINKS[name], True, unchecked[name])
        else:
            yield observed(LINKS[name], evidence.get(name, "no violation was seen"))
