"""Guarantees of unlearning, derived from what was recorded and what was run.

The idea: training with noise bounds how far the trained model's distribution is from
that of a model trained without the forget set. A run of unlearning that never uses the
set applies the same random map to both, so by data processing the two cannot move
further apart. What training guarantees is therefore what may be claimed.

*What it gives:* after DP-SGD the worst case of the mechanism, a bound for any set, any
network and both directions, and beside it an estimate for a single example. After
training with noise but without clipping it gives only that estimate.

*What breaks it:* a method or a stopping rule that uses the forget set, an earlier run
that was fine-tuned on it, batch statistics, or a ledger of other weights. Each is an
assumption of the guarantee with its evidence. An assumption that cannot be observed,
such as that nothing else was released, must be declared by the user; the guarantee's
kind then says so.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from opacus_pi._shown import stable_repr
from opacus_pi._torch_compat import BatchNormBase
from opacus_pi.accounting import GradNormLedger, privacy_losses
from opacus_pi.accounting.composed_epsilon import composed_worst_case
from opacus_pi.accounting.epsilon import DEFAULT_ORDERS
from opacus_pi.accounting.guarantee import (
    Assumption,
    EpsilonDelta,
    Guarantee,
    derived,
    guarantee_of_run,
    observed,
    unchecked_links,
)
from opacus_pi.accounting.training_bound import (
    COMPOSITION,
    declarations,
    every_gradient_clipped,
    noise_added,
    sampling_known,
    worst_case_curve,
)
from opacus_pi.ledger.checks import CHANGED
from opacus_pi.ledger.custody import CHANGED_DIVISOR, LINKS
from opacus_pi.ledger.grad_norm_ledger import (
    columns_of,
    joint_mechanism,
    require_alike,
)
from opacus_pi.models.weights_name import weights_name
from opacus_pi.unlearning.history import History
from opacus_pi.unlearning.loop import StopRule
from opacus_pi.unlearning.methods import FineTune, L1Sparse, Langevin, Method
from opacus_pi.unlearning.same_training_data import same_data

Ledgers = GradNormLedger | Sequence[GradNormLedger]

_ORDERS = DEFAULT_ORDERS[::3]


class AccountantBound(Protocol):
    """The guarantee of an engine's accountant for any one example."""

    def at(self, delta: float) -> EpsilonDelta | None:
        """Return ε at one δ; None if the accountant gives no bound there."""


@dataclass(frozen=True)
class EngineFacts:
    """The facts that a guarantee needs and that are in no ledger.

    Args:
        accountant_bound: The bound of the engine's accountant; None if there is none.
        data_set: Fingerprint of the data set that a run gets; None in a plan.
    """

    accountant_bound: AccountantBound | None = None
    data_set: str | None = None


_NO_RUNS = History()
_NO_FACTS = EngineFacts()
_NO_EXAMPLES = np.empty(0, dtype=np.int64)
_BLIND = (FineTune, Langevin, L1Sparse)  # their code reads the retain loader only
_REWOUND = (
    "they come from a rewind, or from runs after one, so the training says nothing "
    "about them. Carry out this request by a rewind, too"
)
_OF_THE_SET = "the forget set was not chosen by looking at the trained model"


def runs_in(ledger: Ledgers | None) -> tuple[GradNormLedger, ...]:
    """Return the recorded runs as a tuple, so that callers need not handle each case.

    Args:
        ledger: One run, several runs, or None for an empty tuple.
    """
    if ledger is None:
        return ()
    return (ledger,) if isinstance(ledger, GradNormLedger) else tuple(ledger)


def claim(  # noqa: PLR0913
    method: Method,
    model: nn.Module,
    ledger: Ledgers | None,
    forget_indices: NDArray[np.int64],
    history: History = _NO_RUNS,
    *,
    stop: StopRule | None = None,
    forgotten_before: NDArray[np.int64] = _NO_EXAMPLES,
    has_weights: bool = True,
    engine_facts: EngineFacts = _NO_FACTS,
    delta: float = 1e-5,
    with_estimate: bool = True,
) -> Guarantee:
    """Return what may be claimed about unlearning a set from a model by a method.

    Training bounds D_α(trained with ‖ trained without) and its reverse: the worst case
    of the mechanism, for sets the group bound. Unlearning that never looks at the set
    is the same random map on both sides, so by data processing neither divergence
    grows. No contraction is claimed, as a deep network has none that is known. For one
    example, Theorem 4.3 estimates the first of them from its own privacy loss; the
    estimate stands beside the bound, or alone if training did not clip.

    Args:
        method: The unlearning method.
        model: The model to unlearn from.
        ledger: The ledger of its training (or those of several runs), or None.
        forget_indices: int64 ``(m,)``, positions in the data set.
        history: The runs that the model went through before.
        stop: The rule that may end the run in question early, or None.
        forgotten_before: int64, examples that the model has forgotten already. The
            claim covers these and ``forget_indices`` together.
        has_weights: Whether the model holds the trained weights, or is only an
            architecture.
        engine_facts: What the engine of the training knows, if there is one.
        delta: δ in (0, 1) at which the guarantee states ε.
        with_estimate: Whether to compute the estimate beside a bound, which takes much
            longer than the bound.

    Returns:
        The guarantee.

    Raises:
        ValueError: If several ledgers are not of one training procedure.

    Source: paper Theorem 4.3 and section 4; Mironov 2017 (arXiv:1702.07476), Prop. 9;
    docs/theory.md, Section 10.
    """
    runs = runs_in(ledger)
    require_alike(runs)
    gone = np.union1d(forgotten_before, forget_indices)
    fresh = np.setdiff1d(forget_indices, forgotten_before)
    matching = _matching(runs, model if has_weights else None, history)
    # If one of these is not met, training says nothing about the distance to
    # retraining, and the guarantee contains no number at all.
    needed = [
        noise_added(runs),
        _never_used_before(history, len(fresh)),
        *_does_not_look(method, history),
        _fixed_length(stop or history.stop),
        _separable(model),
        *([matching] if runs else []),
        same_data([run.data_set for run in runs], engine_facts.data_set),
        *_broken_links(runs),
    ]
    described = (
        f"{stable_repr(method)} (compared with a model that was trained without the "
        "set in the same way: as many updates, each other example drawn with the same "
        "probability, sums of gradients divided by the same number; and then "
        "fine-tuned in the same way). It is about the forgotten examples only: "
        "unlearning trains on those that are kept, and the ε that training gave the "
        "kept ones does not cover that"
    )
    clipped = bool(runs) and every_gradient_clipped(runs).met
    if runs and not clipped:
        needed.append(_one_example(len(gone), len(forgotten_before)))
    if not all(assumption.met for assumption in needed):
        return guarantee_of_run(described, needed)
    if not clipped:
        return _estimated_claim(described, needed, runs, gone)
    return _bounded_claim(
        described, needed, runs, gone, engine_facts, delta, with_estimate
    )


def _bounded_claim(
    described: str,
    needed: Sequence[Assumption],
    runs: Sequence[GradNormLedger],
    gone: NDArray[np.int64],
    engine_facts: EngineFacts,
    delta: float,
    with_estimate: bool,
) -> Guarantee:
    """Return the worst case of DP-SGD as a bound, on request with an estimate."""
    curve = worst_case_curve(joint_mechanism(runs), len(gone), steps=runs[0].steps)
    pairs = _pairs_of_one(runs, engine_facts, delta) if len(gone) == 1 else ()
    assumptions = (
        *needed,
        every_gradient_clipped(runs),
        sampling_known(runs),
        _same_divisor(runs),
        derived(
            "unlearning does not increase the divergence",
            "post-processing: it is the same random procedure with and without the "
            "set. So the bound also covers whoever has seen the trained model",
        ),
        derived(
            "the bound covers this set and all examples that were forgotten before",
            f"it is the worst case of any {len(gone)} examples together, so it holds "
            "for each person among them. For the examples of one person alone, a "
            "smaller one holds: that of so many examples (privacy_statement), compared "
            "with a model that was trained without these alone"
            if len(gone) > 1
            else "it is the worst case of any single example",
        ),
        *declarations(runs),
        Assumption(
            _OF_THE_SET, True, "the bound is for sets that are fixed before training"
        ),
    )
    has_estimate = with_estimate and len(gone) == 1
    estimates = _losses(runs, gone, curve.orders) if has_estimate else ()
    return guarantee_of_run(
        described,
        assumptions,
        curve.orders,
        curve.divergences,
        reverse_divergences=curve.divergences,
        estimates=estimates,
        statements=pairs,
    )


def _pairs_of_one(
    runs: Sequence[GradNormLedger], engine_facts: EngineFacts, delta: float
) -> tuple[EpsilonDelta, ...]:
    """Return the bounds for any one example that are not converted from divergences."""
    accountant = engine_facts.accountant_bound
    counted = None if accountant is None else accountant.at(delta)
    composed = composed_worst_case(joint_mechanism(runs), delta, steps=runs[0].steps)
    pairs = () if counted is None else (counted,)
    if math.isinf(composed):
        return pairs
    return (*pairs, EpsilonDelta(composed, delta, COMPOSITION, both_directions=True))


def _same_divisor(runs: Sequence[GradNormLedger]) -> Assumption:
    """Return that training with and without the set divides by the same number.

    It is only declared if the loop has changed the number.
    """
    statement = "training divided by a batch size that does not depend on the set"
    chains = [run.custody for run in runs if run.custody is not None]
    sentences = [link.sentence for chain in chains for link in chain.unchecked]
    if any(CHANGED_DIVISOR in sentence for sentence in sentences):
        return Assumption(
            statement, True, "the loop changed optimizer.expected_batch_size"
        )
    return derived(statement, "DP-SGD divides by the expected batch size")


def _estimated_claim(
    described: str,
    needed: Sequence[Assumption],
    runs: Sequence[GradNormLedger],
    gone: NDArray[np.int64],
) -> Guarantee:
    """Return the estimate for one example of a training run without clipping."""
    assumptions = (
        *needed,
        *unchecked_links(runs),
        derived(
            "training divided by a batch size that does not depend on the example",
            "not recorded",
            met=False,
        ),
        derived("the privacy loss is an upper bound", _estimated(len(runs)), met=False),
    )
    return guarantee_of_run(described, assumptions, _ORDERS, _losses(runs, gone))


def _losses(
    runs: Sequence[GradNormLedger],
    gone: NDArray[np.int64],
    orders: Sequence[float] = _ORDERS,
) -> tuple[float, ...]:
    """Return the estimated privacy loss of one example at some of the orders.

    Only orders in ``_ORDERS`` are computed: the losses of long runs take time.

    Args:
        runs: The recorded runs.
        gone: The example, ``(1,)``.
        orders: The orders of the result.

    Returns:
        One loss for each order; ``inf`` where none was computed or none is finite.
    """
    chosen = [run.subset(columns_of(run, gone)) for run in runs]
    found = (
        float(privacy_losses(chosen, order)[0]) if order in _ORDERS else math.inf
        for order in orders
    )
    return tuple(loss if math.isfinite(loss) else math.inf for loss in found)


def _broken_links(runs: Sequence[GradNormLedger]) -> tuple[Assumption, ...]:
    """Return an assumption for each link of custody that is broken in a run."""
    return tuple(
        observed(LINKS[link.name], link.sentence, met=False)
        for run in runs
        if run.custody is not None
        for link in run.custody.broken
    )


def _estimated(num_runs: int) -> str:
    """Say from how many runs the losses are estimated.

    The theorem takes the expectation over all training runs. Even many recorded runs
    only estimate it, so the assumption that this evidence belongs to is never met.
    """
    if num_runs == 0:
        return "no ledger"
    return f"an estimate from {num_runs} recorded run{'s' * (num_runs > 1)}"


def _one_example(size: int, num_before: int) -> Assumption:
    """Assume a single example: without clipping there is no bound for a set.

    Summed losses of single examples do not bound it.

    Args:
        size: Number of all examples that the model has forgotten after the run.
        num_before: How many of them earlier runs have forgotten.
    """
    before = f", including {num_before} forgotten before" if num_before else ""
    remedy = "" if size == 1 else "; recording.gram_ledger measures groups"
    return observed(
        "the estimate needs a single example",
        f"this set has {size}{before}{remedy}",
        met=size == 1,
    )


def _never_used_before(history: History, num_fresh: int) -> Assumption:
    """Assume that no earlier run was fine-tuned on an example to be forgotten now.

    A run fine-tunes on all examples that are retained then. If one of them is to be
    forgotten later, what that run learnt from it is not covered by the noise of
    training.

    Args:
        history: The earlier runs.
        num_fresh: How many examples were not forgotten before.
    """
    used = history.used(num_fresh)
    return observed(
        "no earlier run was fine-tuned on the forget set",
        f"{used} of the forgotten examples {'was' if used == 1 else 'were'} in the "
        "retain set of an earlier run. "
        "For a bound, make an exact rewind, or forget all requested sets in one run "
        "that starts from the trained model (with a deletion log: a new log)"
        if used
        else "the last run was a rewind, which starts from a saved state"
        if history.rewound
        else "no earlier run changed the weights"
        if not history.updated
        else "earlier runs left the set out",
        met=not used,
    )


def _does_not_look(method: Method, history: History) -> tuple[Assumption, ...]:
    """Assume that no method used the set: unlearning is then post-processing.

    Args:
        method: The method in question.
        history: The earlier runs of this model.
    """
    looked, name = history.after(method, None).looked, type(method).__name__
    statement = "unlearning never looks at the forget set"
    if looked:
        return (observed(statement, looked, met=False),)
    if type(method) in _BLIND:
        return (observed(statement, f"{name} sees the retain set only"),)
    return (
        Assumption(statement, True, f"{name} is your own method, which declares it"),
    )


def _fixed_length(stop: StopRule | None) -> Assumption:
    """Assume a fixed length: a length chosen by evaluations reveals their results.

    Args:
        stop: A rule that could have ended one of the runs, or None. It counts even if
            it ended none of them, because whether it does depends on the forget set.
    """
    return observed(
        "the number of updates does not depend on the forget set",
        "fixed before the run"
        if stop is None
        else f"a rule could end it at an evaluation of {stop.metric!r}, which may look "
        "at the forget set",
        met=stop is None,
    )


def _separable(model: nn.Module) -> Assumption:
    """Assume no batch statistics: with them an example changes other gradients too.

    The privacy loss is computed from the norm of the example's own gradient. It misses
    what the example does to the gradients of the others in its batch.
    """
    mixing = [
        name
        for name, module in model.named_modules()
        if isinstance(module, BatchNormBase)
    ]
    return observed(
        "an example acts on an update through its own gradient only",
        f"batch statistics in {mixing[0]!r}" if mixing else "no BatchNorm in the model",
        met=not mixing,
    )


def _matching(
    runs: Sequence[GradNormLedger], model: nn.Module | None, history: History
) -> Assumption:
    """Assume that the model has the weights that the recorded runs left.

    A ledger of another training run says nothing about this model. An engine writes the
    SHA-256 of the last weights into its ledger; here it is compared with the model's.
    After runs of unlearning, the weights from which the first of them started are
    compared, and the model must have those that the last one left.

    Args:
        runs: The recorded runs; one of them must have left these weights.
        model: The model; None if only its architecture is known.
        history: The earlier runs of this model.

    Returns:
        The assumption: met as observed; declared, if the ledger names no weights or the
        model's are not known; or not met, with the reason.
    """
    statement = "the model holds the last weights of the recorded training"
    names = {run.weights for run in runs}
    hashed = names - {None, CHANGED}
    if model is None and hashed and not history.began_with_rewind:
        why = "only the architecture is known here; unlearning compares the weights"
        return Assumption(statement, True, why)
    name = history.left if model is None else weights_name(model)
    unchanged = not (history.trained or history.left) or name == history.left
    if names == {None} and unchanged and not history.began_with_rewind:
        return Assumption(statement, True, "the ledger has no SHA-256 of the weights")
    if unchanged and (history.trained or name) in hashed:
        return observed(statement, _since(history))
    if unchanged and history.began_with_rewind:
        return observed(statement, _REWOUND, met=False)
    return observed(statement, _unmatched(names, unchanged=unchanged), met=False)


def left_other_weights(
    runs: Sequence[GradNormLedger], model: nn.Module, history: History = _NO_RUNS
) -> bool:
    """Return whether it is known that no recorded run left the weights of a model.

    After runs of unlearning, the weights from which the first of them started count.

    Args:
        runs: The recorded runs.
        model: The model.
        history: The earlier runs of this model.

    Returns:
        False, too, if it is not known: a run names no weights or says that they were
        changed afterwards, or the history does not say where its runs started.
    """
    names = {run.weights for run in runs}
    is_known = history.trained or not (history.updated or history.left)
    if not names or names & {None, CHANGED} or not is_known:
        return False
    return (history.trained or weights_name(model)) not in names


def _since(history: History) -> str:
    """Say how the weights were recognised."""
    named = "their SHA-256 is the one in the ledger"
    if not history.trained:
        return named
    return f"{named}; since then only runs of this unlearner changed them"


def _unmatched(names: Collection[str | None], *, unchanged: bool) -> str:
    """Say why the recorded runs are not known to have left the model's weights.

    Args:
        names: What each run says about the weights that it left: their SHA-256, that
            they were changed afterwards, or nothing (None).
        unchanged: Whether the model has the weights that the last run of unlearning
            left, if there was one.
    """
    if not unchanged:
        return (
            "the last unlearning run did not end, or the weights were changed after it"
        )
    if set(names) <= {None, CHANGED}:
        return "the weights were written to after the last recorded update"
    return (
        "the SHA-256 of the weights is not the one in the ledger: they were changed "
        "since, or belong to another run"
    )
