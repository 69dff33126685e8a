"""What may be claimed after unlearning, from what was recorded and what was run.

The idea: training with noise bounds how far the trained model's distribution is from
that of a model trained without one example. A run of unlearning that never uses the
example applies the same random map to both, so by data processing the two cannot move
further apart. The privacy loss of the example is therefore what may be claimed.

*What it gives:* at most an estimate, because the loss comes from few recorded runs.
*What breaks it:* a method or a stopping rule that uses the forget set, several
examples, batch statistics, or a ledger of other weights. Each is an assumption of the
guarantee, met or not met with its evidence; nothing is taken from the caller.
"""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from opacus_pi._torch_compat import BatchNormBase
from opacus_pi.accounting import GradNormLedger, privacy_losses
from opacus_pi.accounting.epsilon import DEFAULT_ORDERS
from opacus_pi.accounting.guarantee import (
    Assumption,
    Guarantee,
    derived,
    guarantee_of_run,
    observed,
    unchecked_links,
)
from opacus_pi.ledger.checks import CHANGED
from opacus_pi.ledger.custody import LINKS
from opacus_pi.ledger.grad_norm_ledger import columns_of
from opacus_pi.models.weights_name import weights_name
from opacus_pi.unlearning.loop import StopWhen
from opacus_pi.unlearning.methods import Method

Ledgers = GradNormLedger | Sequence[GradNormLedger]

_ORDERS = DEFAULT_ORDERS[::3]


@dataclass(frozen=True)
class History:
    """The runs that a model went through, as far as a guarantee depends on them.

    A run that used the forget set, or that an evaluation could end early, weakens every
    later claim about the model, by whatever method the next run is.

    >>> from opacus_pi.unlearning.methods import FineTune
    >>> History().after(FineTune(), None)
    History(stop=None, looked='')

    Args:
        stop: The rule that could have ended one of them early, or None.
        looked: Why a run may have used the forget set, as evidence for the reader;
            empty if no run did.
    """

    stop: StopWhen | None = None
    looked: str = ""

    def after(self, method: Method, stop: StopWhen | None) -> "History":
        """Return the history with one more run.

        Args:
            method: The method of that run.
            stop: The rule that could end it early, or None.
        """
        looks = f"{type(method).__name__} uses it" if method.needs_forget_set else ""
        return History(stop or self.stop, looks or self.looked)

    def joined(self, other: "History") -> "History":
        """Return the history of a model that went through the runs of both.

        Args:
            other: The other history. Where both name a rule or a reason, the other's is
                kept: one of them is enough to weaken the claim.
        """
        return History(other.stop or self.stop, other.looked or self.looked)

    @property
    def text(self) -> str:
        """Return the history as JSON."""
        return json.dumps(asdict(self))


UNKNOWN = History(looked="an earlier run is not described")


def history_from_json(text: str | None) -> History | None:
    """Read a history from the JSON in ``History.text``.

    Weights files of early releases contain no history. Their runs may have used the
    forget set, so ``UNKNOWN`` is returned, with which no number is claimed.

    Args:
        text: The JSON text, or None if the weights file has none.

    Returns:
        The history, or None if the text is not one: the file is damaged.
    """
    if text is None:
        return UNKNOWN
    try:
        found: dict[str, Any] = json.loads(text)
        stop = found["stop"]
        rule = None if stop is None else StopWhen(**stop)
        history = History(rule, found["looked"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return history if isinstance(history.looked, str) else None


_NO_RUNS = History()
_NO_EXAMPLES = np.empty(0, dtype=np.int64)


def runs_in(ledger: Ledgers | None) -> tuple[GradNormLedger, ...]:
    """Return the recorded runs as a tuple, so that callers need not handle each case.

    Args:
        ledger: One run, several runs, or None for an empty tuple.
    """
    if ledger is None:
        return ()
    return (ledger,) if isinstance(ledger, GradNormLedger) else tuple(ledger)


def claim(
    method: Method,
    model: nn.Module,
    ledger: Ledgers | None,
    forget_indices: NDArray[np.int64],
    history: History = _NO_RUNS,
    *,
    forgotten_before: NDArray[np.int64] = _NO_EXAMPLES,
    has_weights: bool = True,
) -> Guarantee:
    """Return what may be claimed about unlearning a set from a model by a method.

    For one example, Theorem 4.3 bounds D_α(trained with ‖ trained without) by the
    expected privacy loss. Unlearning that never looks at the example is the same random
    map on both sides, so by data processing the divergence does not grow: the loss
    stays an estimate of D_α(unlearned ‖ retrained and processed alike). No contraction
    is claimed, as a deep network has none that is known. For several examples the
    sum of their losses bounds nothing, so there is no number.

    Args:
        method: The unlearning method.
        model: The model to unlearn from.
        ledger: The ledger of its training (or those of several runs), or None.
        forget_indices: int64 ``(m,)``, positions in the data set.
        history: The runs that the model went through, including the one in question.
        forgotten_before: int64, examples that the model has forgotten already. The
            claim covers these and ``forget_indices`` together.
        has_weights: Whether the model holds the trained weights, or is only an
            architecture.

    Returns:
        The guarantee, at most an estimate.

    Source: paper Theorem 4.3 and section 4; Mironov 2017 (arXiv:1702.07476), Prop. 9.
    """
    runs = runs_in(ledger)
    gone = np.union1d(forgotten_before, forget_indices)
    # If one of these is not met, the privacy losses say nothing about the distance to
    # retraining, and the guarantee contains no number at all.
    needed = (
        _adds_noise(runs),
        _one_example(len(gone), len(forgotten_before)),
        _does_not_look(method, history),
        _fixed_length(history.stop),
        _separable(model),
        *_broken_links(runs),
    )
    # These are stated for the reader. They are often unknown, and the losses are an
    # estimate either way, because they come from a few recorded runs.
    stated = (
        *unchecked_links(runs),
        _fixed_denominator(runs),
        _matching(runs, model if has_weights else None),
        derived("the privacy loss is an upper bound", _estimated(len(runs)), met=False),
    )
    described = f"{method} (retrained: trained without the set, then updated alike)"
    if not all(assumption.met for assumption in needed):
        return guarantee_of_run(described, needed + stated)
    chosen = [run.subset(columns_of(run, gone)) for run in runs]
    losses = [float(privacy_losses(chosen, order)[0]) for order in _ORDERS]
    losses = [v if math.isfinite(v) else math.inf for v in losses]
    return guarantee_of_run(described, needed + stated, _ORDERS, losses)


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

    The theorem takes the expectation over all trainings. Even many recorded runs only
    estimate it, so the assumption that this evidence belongs to is never met.
    """
    if num_runs == 0:
        return "no ledger"
    return f"an estimate from {num_runs} recorded run{'s' * (num_runs > 1)}"


def _adds_noise(runs: Sequence[GradNormLedger]) -> Assumption:
    """Assume that training added noise: without noise no privacy loss is finite.

    An assumed noise does not count. The losses then rank the examples, but the training
    that was run has no finite divergence.
    """
    statement = "training added noise to every update"
    if not runs:
        return observed(statement, "no ledger", met=False)
    mechanism = runs[0].mechanism
    noise, assumed = float(np.min(mechanism.noise_std)), mechanism.assumed_noise
    evidence = f"{'assumed' if assumed else 'recorded'} noise_std={noise:g} on the sum"
    return observed(statement, evidence, met=noise > 0 and not assumed)


def _one_example(size: int, num_before: int) -> Assumption:
    """Assume a single example: summed per-example losses do not bound a group's.

    Args:
        size: Number of all examples that the model has forgotten after the run.
        num_before: How many of them earlier runs have forgotten.
    """
    before = f", including {num_before} forgotten before" if num_before else ""
    remedy = "" if size == 1 else "; recording.gram_ledger measures groups"
    return observed(
        "the bound needs a single example",
        f"this set has {size}{before}{remedy}",
        met=size == 1,
    )


def _does_not_look(method: Method, history: History) -> Assumption:
    """Assume that no method used the set: unlearning is then post-processing.

    Args:
        method: The method in question. It is checked here as well, because a plan is
            made before the run enters the history.
        history: The earlier runs of this model.
    """
    looked = history.after(method, None).looked
    return observed(
        "unlearning never looks at the forget set",
        looked or f"{type(method).__name__} sees the retain set only",
        met=not looked,
    )


def _fixed_length(stop: StopWhen | None) -> Assumption:
    """Assume a fixed length: a length chosen by evaluations reveals their results.

    Args:
        stop: A rule that could have ended one of the runs, or None. It counts even if
            it ended none of them, because whether it does depends on the forget set.
    """
    return observed(
        "the number of updates does not depend on the forget set",
        "fixed before the run"
        if stop is None
        else f"ended by {stop.metric!r}, an evaluation that may look at it",
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


def _fixed_denominator(runs: Sequence[GradNormLedger]) -> Assumption:
    """Assume a denominator that does not depend on which examples were sampled.

    A mean over the sampled examples changes with the number of them, so that the
    presence of one example scales the gradients of all others.
    """
    clipped = bool(runs) and bool(np.isfinite(runs[0].mechanism.max_grad_norm).all())
    return derived(
        "training divided by a batch size that does not depend on the example",
        "DP-SGD divides by the expected one" if clipped else "not recorded",
        met=clipped,
    )


def _matching(runs: Sequence[GradNormLedger], model: nn.Module | None) -> Assumption:
    """Assume that the model has the weights that the recorded runs left.

    A ledger of another training says nothing about this model. An engine writes the
    SHA-256 of the last weights into its ledger; here it is compared with the model's.
    The evidence names the reason if they do not agree.

    Args:
        runs: The recorded runs; one of them must have left these weights.
        model: The model; None if only its architecture is known.
    """
    names = {run.weights for run in runs}
    hashed = names - {None, CHANGED}
    met = bool(hashed) and model is not None and weights_name(model) in hashed
    return observed(
        "the model holds the last weights of the recorded training",
        "the ledger names them, by their SHA-256" if met else _unmatched(names, model),
        met=met,
    )


def _unmatched(names: Collection[str | None], model: nn.Module | None) -> str:
    """Say why the recorded runs are not known to have left the model's weights.

    Args:
        names: What each run says about the weights that it left: their SHA-256, that
            they were changed afterwards, or nothing (None).
        model: The model; None if only its architecture is known.
    """
    if not names:
        return "no ledger"
    if set(names) <= {None}:
        return "a ledger does not name the weights"
    if set(names) <= {None, CHANGED}:
        return "they were written to after the last recorded update"
    if model is None:
        return "the model's weights are not known here"
    return "the ledger names others: they were changed since, or of another run"
