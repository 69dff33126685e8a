"""Plans: the expected difficulty, cost and guarantee of an unlearning run.

A plan says how difficult the forget set is (its mean privacy loss, and where that
stands among all examples), how many steps past runs predict, and what may be claimed
afterwards. It reads ledgers only; nothing is trained.

>>> predict_time(4.0, past_losses=[1.0, 2.0], past_times=[1.0, 2.0])
3.0
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from opacus_pi._shown import Shown
from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices, expect, numbers, positive, require
from opacus_pi.accounting import GradNormLedger, privacy_losses
from opacus_pi.accounting.assumed_noise import has_assumed_noise
from opacus_pi.accounting.conversion import large_delta
from opacus_pi.accounting.guarantee import Guarantee
from opacus_pi.difficulty.forget_sets import ties
from opacus_pi.ledger.grad_norm_ledger import columns_of
from opacus_pi.unlearning.history import History, Runs, runs_in_words
from opacus_pi.unlearning.rewind_plan import RewindPlan

PastRun = tuple[ArrayLike, float] | tuple[ArrayLike, float, float]

_UNKNOWN = Guarantee("an unlearning method that was not named", ())
LATER = (
    "Unlearning steps train on all examples that stay, so a request that arrives after "
    "this run gets no bound (empirical), unless a rewind carries it out: collect "
    "requests and carry them out together."
)
_INSTEAD = "\nAn exact rewind has ε = 0{how}"
_HOW = ", if the training saved states (Recorder(checkpoints=...))."


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """Difficulty, cost and guarantee of unlearning one forget set.

    Args:
        forget: int64 ``(m,)``, the examples to forget, sorted.
        num_retain: Examples to fine-tune on, without those forgotten before.
        order: Rényi order of the losses.
        mean_loss: Mean privacy loss of the forget set, the paper's difficulty.
        percentile: Percentage of all examples whose loss is below ``mean_loss``; None
            if most examples have the same loss as one in the set.
        ranking_only: Whether the loss uses an assumed noise (training added none): then
            only the order of sets has a meaning, not the size of the loss.
        steps_per_epoch: Updates per pass over the retain set.
        predicted_epochs: Passes until the set is forgotten, or None.
        prediction: How that was predicted, or why it was not.
        num_unfinished: Number of past runs that ended before the set was forgotten.
            They count with the epochs that they ran, so the prediction is at best a
            lower bound.
        num_tied: Number of examples outside the set that have, up to rounding, the loss
            of one in it. A ranking by loss cannot separate them.
        guarantee: What may be claimed afterwards, with its unmet assumptions.
        forgotten_before: int64, sorted: examples that the model has forgotten already.
            The guarantee covers these and ``forget``; the losses are those of
            ``forget`` alone.
        rewind: How far back a rewind goes for the set, and what it costs and proves;
            None if no saved states were named.
        delta: δ of the guarantee's ε in the printed plan.
        earlier_runs: The runs of the weights from which the run starts, as in
            ``record["earlier_runs"]``; None: not known.
        num_forgotten_exactly: How many of ``forgotten_before`` a rewind forgot exactly
            and no run has used since.
    """

    _note: ClassVar[str] = "print it to read the difficulty, which is sensitive"

    forget: NDArray[np.int64]
    num_retain: int
    order: float
    mean_loss: float
    percentile: float | None
    ranking_only: bool
    steps_per_epoch: int
    predicted_epochs: float | None
    prediction: str
    num_unfinished: int = 0
    num_tied: int = 0
    guarantee: Guarantee = _UNKNOWN
    forgotten_before: NDArray[np.int64] = field(
        default_factory=lambda: np.empty(0, np.int64)
    )
    rewind: RewindPlan | None = None
    delta: float = 1e-5
    earlier_runs: Runs | None = ()
    num_forgotten_exactly: int = 0

    def _shown(self) -> dict[str, Any]:
        return {
            "num_forget": len(self.forget),
            "num_retain": self.num_retain,
            "order": self.order,
            "steps_per_epoch": self.steps_per_epoch,
            "guarantee": self.guarantee.kind if self.guarantee != _UNKNOWN else None,
        }

    @property
    def forgotten_again(self) -> NDArray[np.int64]:
        """Those of ``forget`` that were forgotten before, sorted."""
        return np.intersect1d(self.forget, self.forgotten_before)

    @property
    def predicted_steps(self) -> int | None:
        """Updates until the set is forgotten, or None."""
        if self.predicted_epochs is None:
            return None
        return math.ceil(self.predicted_epochs * self.steps_per_epoch)

    @property
    def predicted_examples(self) -> int | None:
        """Examples to process until the set is forgotten, or None."""
        if self.predicted_epochs is None:
            return None
        return math.ceil(self.predicted_epochs * self.num_retain)

    def budget(self, *, factor: float = 2.0, default: int = 25) -> int:
        """Return the number of epochs to allow an unlearning run.

        Where there is a prediction it depends on the set's own loss. A guarantee needs
        a number that was fixed without looking at the set: then use the default.

        Args:
            factor: Multiple of the predicted epochs, above 0.
            default: Epochs to allow if nothing was predicted.

        Returns:
            A whole number, at least 1.
        """
        return budget_of(self.predicted_epochs, factor, default)

    def claiming(self, guarantee: Guarantee) -> "Plan":
        """Return a copy of the plan with another guarantee.

        Args:
            guarantee: What may be claimed after the run that is planned.
        """
        return replace(self, guarantee=guarantee)

    def __str__(self) -> str:
        return self.text()

    def text(self, delta: float | None = None) -> str:
        """Return the plan in words.

        Args:
            delta: δ in (0, 1) of the guarantee's ε, if it has one; None: that of the
                plan.
        """
        delta = self.delta if delta is None else delta
        reason = " (the noise is assumed: a ranking only)"
        ranking = reason if self.ranking_only else ""
        tied = (
            "Examples outside the forget set with the same loss as one inside it: "
            f"{self.num_tied}.\n"
            if self.num_tied
            else ""
        )
        return (
            f"Examples to forget: {len(self.forget)}, to keep: {self.num_retain}.\n"
            f"{self._before()}{self._sequence()}{self._by_rewind(delta)}"
            f"Mean privacy loss {self.mean_loss:.4g} at order {self.order:g}, "
            f"{self._place()}{ranking}.\n{tied}{self._steps()}"
            f"{self._claim(delta)}{self._limits(delta)}"
            f"{self._large(delta)}{self._later()}"
        )

    def _large(self, delta: float) -> str:
        """Return the sentence about a δ that is too large; empty if there is no ε."""
        if not math.isfinite(self.guarantee.epsilon(delta)):
            return ""
        gone = len(np.union1d(self.forget, self.forgotten_before))
        sentence = large_delta(delta, self.num_retain + gone)
        return f"\n{sentence}" if sentence else ""

    def _later(self) -> str:
        """Return what the run means for later requests; empty if it has no bound."""
        is_bound = self.guarantee.kind.startswith("certified")
        return f"\n{LATER}" if is_bound and self.guarantee != _UNKNOWN else ""

    def _place(self) -> str:
        """Say where the mean loss lies among all; a large tie has no percentile."""
        if self.percentile is None:
            return "without a percentile, because most examples have the same loss"
        return f"above that of {self.percentile:.1f} % of all examples"

    def _steps(self) -> str:
        """Return the line about the steps until the set is forgotten."""
        epoch = (
            f"An epoch has {self.steps_per_epoch} steps, {self.num_retain} examples.\n"
        )
        if self.predicted_steps is None:
            return f"Steps: not predicted, because {self.prediction}. {epoch}"
        least = "at least " if self.num_unfinished else ""
        return f"Steps: {least}{self.predicted_steps} ({self.prediction}). {epoch}"

    def _limits(self, delta: float) -> str:
        """Return what to do about a bound that excludes almost nothing, or nothing."""
        is_said = self.rewind is not None and self.rewind.policy is None
        if is_said or not self.guarantee.is_too_large(delta):
            return ""
        return _INSTEAD.format(how=_HOW if self.rewind is None else ".")

    def _by_rewind(self, delta: float) -> str:
        """Return the lines about the rewind; empty if no states were named."""
        if self.rewind is None:
            return ""
        return (
            f"By a rewind: {self.rewind.cost_text}\n"
            f"{self.rewind.guarantee.text(delta, in_full=False)}\n\n"
            "By unlearning steps instead of the rewind:\n"
        )

    def _claim(self, delta: float) -> str:
        """Return the guarantee in words, or what it needs to be known."""
        if self.guarantee != _UNKNOWN:
            return self.guarantee.text(delta, in_full=False)
        if self.rewind is not None:  # it needs the model
            return (
                "What may be claimed afterwards depends on the unlearning method. Name "
                "it (--method finetune is what a run without a name uses)."
            )
        return (
            "What may be claimed afterwards depends on the unlearning method and on "
            "the model, which were not named."
        )

    def _sequence(self) -> str:
        """Return the line about earlier runs; empty if there were none."""
        if self.earlier_runs is None:
            return (
                "Which runs led to the weights is not known: an earlier release wrote "
                "them, or they were changed between two runs.\n"
            )
        if not self.earlier_runs:
            return ""
        number = self.num_forgotten_exactly
        exact = (
            f" {number} of the examples forgotten before "
            f"{'is' if number == 1 else 'are'} still forgotten exactly (for these "
            "alone ε = 0), by the rewind."
        )
        return (
            f"Earlier runs of these weights: {runs_in_words(self.earlier_runs)}."
            f"{exact * bool(number)}\n"
        )

    def after(self, history: History, forgotten_exactly: NDArray[np.int64]) -> "Plan":
        """Return a copy of the plan that says which runs came before.

        Args:
            history: The runs of the weights from which the run starts.
            forgotten_exactly: The examples that an exact rewind has forgotten.
        """
        number = len(forgotten_exactly) if history.keeps_exact else 0
        return replace(self, earlier_runs=history.runs, num_forgotten_exactly=number)

    def _before(self) -> str:
        """Return the line about what was forgotten before; empty if nothing was.

        The guarantee covers all examples that the model has then forgotten, so the
        number in it can differ from the size of this forget set. The line says why.
        """
        size, before = len(self.forget), len(self.forgotten_before)
        again = len(self.forgotten_again)
        if not before:
            return ""
        if again == size:
            return "All of them were forgotten before: nothing new to forget.\n"
        verb = "was" if again == 1 else "were"
        known = f"{again} of the {size} {verb} forgotten before. " if again else ""
        total = before + size - again
        return (
            f"{known}The guarantee covers {total} examples: {size - again} new, and "
            f"{before} forgotten before.\n"
        )


def make_plan(
    runs: Sequence[GradNormLedger],
    forget_indices: ArrayLike,
    *,
    order: float,
    assumed_noise_std: float | None = None,
    past_runs: Sequence[PastRun] = (),
    batch_size: int = 64,
    forgotten_before: ArrayLike = (),
) -> Plan:
    """Compute difficulty and cost of a forget set from the ledgers of a training run.

    Args:
        runs: Ledgers of independent runs of one training procedure, at least one.
        forget_indices: Positions in the data set, each once.
        order: Rényi order of the privacy losses.
        assumed_noise_std: Noise on the sum of gradients to assume if there was none.
        past_runs: ``(forget_indices, epochs it took)``. For a run that ended before its
            set was forgotten: ``(forget_indices, inf, epochs it ran)``.
        batch_size: Examples per batch.
        forgotten_before: Examples that the model has forgotten already: they are not
            in the retain set either.

    Raises:
        ValueError: If there is no run, the indices are bad, there was no noise and
            none is assumed, or the length of an unfinished run is missing.
    """
    if not runs:
        raise ValueError(
            "plan() needs a ledger, but none was given. Record the training and pass "
            "Unlearner(..., ledger=engine.ledger)."
        )
    positive(batch_size=batch_size, remedy="Pass the number of examples in a batch.")
    if (np.asarray(runs[0].mechanism.noise_std) == 0).any():
        runs = _with_assumed_noise(runs, assumed_noise_std)
    losses = privacy_losses(list(runs), order)
    forget = _checked_indices(runs[0], forget_indices)
    before = np.unique(np.asarray(forgotten_before, dtype=np.int64))
    num_retain = _num_kept(runs[0], np.union1d(before, forget))
    require_rest(num_retain, len(losses))
    columns = columns_of(runs[0], forget)
    mean = float(losses[columns].mean())
    epochs, prediction = _predicted(mean, losses, runs[0], past_runs)
    return Plan(
        forget=forget,
        num_retain=num_retain,
        order=order,
        mean_loss=mean,
        percentile=percentile_of(losses, columns),
        ranking_only=has_assumed_noise(runs),
        steps_per_epoch=math.ceil(num_retain / batch_size),
        predicted_epochs=epochs,
        prediction=prediction,
        num_unfinished=_num_unfinished(past_runs),
        num_tied=_num_equal(losses, columns),
        forgotten_before=before,
    )


def require_rest(num_retain: int, num_examples: int) -> None:
    """Refuse to forget everything: there would be nothing to train on.

    Args:
        num_retain: Number of examples that remain.
        num_examples: Number of all examples.

    Raises:
        ValueError: If no example remains.
    """
    expect(
        num_retain > 0,
        "forget_indices",
        f"all {num_examples} examples",
        "must leave at least one example to keep",
        "To forget all examples, start from a new model.",
    )


def _num_kept(ledger: GradNormLedger, gone: NDArray[np.int64]) -> int:
    """Return the number of recorded examples that are retained.

    Args:
        ledger: A ledger of the training. It may be one of a subset; then only the
            examples that it contains are counted.
        gone: Sorted positions of all examples that are forgotten after the run.
    """
    ids = ledger.example_ids
    known = np.arange(ledger.num_examples) if ids is None else ids
    return len(np.setdiff1d(known, gone))


def _predicted(
    mean: float,
    losses: NDArray[np.float64],
    ledger: GradNormLedger,
    past_runs: Sequence[PastRun],
) -> tuple[float | None, str]:
    """Predict the epochs for this mean loss from past runs, and say how.

    Args:
        mean: Mean loss of the set in question.
        losses: Losses of all examples, ``(n,)``.
        ledger: The ledger that they come from, for the positions of the past sets.
        past_runs: As in ``make_plan``.

    Returns:
        The epochs and how they were predicted; or None and why there is no prediction.
    """
    past = [
        losses[columns_of(ledger, _checked_indices(ledger, p[0]))].mean()
        for p in past_runs
    ]
    times = [p[1] for p in past_runs]
    lengths = [p[2] if len(p) == 3 else math.nan for p in past_runs]
    epochs = predict_time(mean, past, times, past_lengths=lengths)
    if epochs is None:
        return None, (
            "a prediction needs two past runs of different difficulty (past_runs, or "
            "--past on the command line)"
        )
    fit = f"log-linear fit to {len(past_runs)} past runs"
    num_unfinished = _num_unfinished(past_runs)
    if not num_unfinished:
        return epochs, fit
    return epochs, (
        f"{fit}; {num_unfinished} of them ended before the set was forgotten and count "
        "with the epochs that they ran, so this is at best a lower bound"
    )


def _num_unfinished(past_runs: Sequence[PastRun]) -> int:
    """Return the number of past runs that ended before their set was forgotten."""
    return sum(math.isinf(past[1]) for past in past_runs)


def _num_equal(losses: NDArray[np.float64], forget: NDArray[np.int64]) -> int:
    """Return the number of examples outside a set with the loss of one in it.

    No warning: whether the set was chosen by loss is not known here. ``top_k`` and
    ``difficulty_strata``, which choose by loss, warn that the choice is arbitrary.

    Args:
        losses: Losses of all examples, ``(n,)``.
        forget: Positions of the set in ``losses``.
    """
    own, others = _levels(losses, forget)
    return int(np.isin(others, own).sum())


def _levels(
    losses: NDArray[np.float64], forget: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ranks of the losses, equal for equal ones: in a set, and outside.

    Args:
        losses: Losses of all examples, ``(n,)``.
        forget: Positions of the set in ``losses``.
    """
    levels = ties(losses)
    inside = np.zeros(len(levels), dtype=bool)
    inside[forget] = True
    return levels[inside], levels[~inside]


def percentile_of(
    losses: NDArray[np.float64], forget: NDArray[np.int64]
) -> float | None:
    """Return where the mean loss of a set lies among the losses of all examples.

    Args:
        losses: Losses of all examples, ``(n,)``.
        forget: Positions of the set in ``losses``.

    Returns:
        A number in [0, 100]. None if most examples outside the set have, up to
        rounding, the loss of one in it: they cannot be told apart by loss.
    """
    own, others = _levels(losses, forget)
    if 2 * np.isin(others, own).sum() > len(others):
        return None
    return percentile(float(losses[forget].mean()), losses)


def budget_of(
    predicted_epochs: float | None, factor: float = 2.0, default: int = 25
) -> int:
    """Return the epochs to allow a run, from those predicted; see ``Plan.budget``.

    It is a function of its own for callers that have a prediction but no plan.

    Args:
        predicted_epochs: The prediction, or None if there is none.
        factor: Multiple of the prediction, above 0.
        default: Epochs to allow if nothing was predicted.

    Raises:
        ValueError: If the factor is not above 0.
    """
    positive(factor=factor, remedy="Pass 2 to allow twice the prediction.")
    if predicted_epochs is None:
        return default
    return max(1, math.ceil(factor * predicted_epochs))


def percentile(value: float, losses: ArrayLike) -> float:
    """Return the percentage of losses below a value; equal ones count half.

    Args:
        value: The set's mean loss.
        losses: Every example's loss, shape ``(n,)``.

    Returns:
        A number in [0, 100].
    """
    losses = numbers("losses", losses)
    tied = np.isclose(losses, value, rtol=1e-12, atol=0)
    below = np.count_nonzero((losses < value) & ~tied) + np.count_nonzero(tied) / 2
    return float(100 * below / losses.size)


def predict_time(
    loss: float,
    past_losses: ArrayLike,
    past_times: ArrayLike,
    *,
    past_lengths: ArrayLike | None = None,
) -> float | None:
    """Predict the time to unlearn: time = a + b ln(loss), b ≥ 0, by least squares.

    In Corollary 4.4 the number of steps grows with the logarithm of the privacy loss.
    The prediction is at least 0. A run that ended before its set was forgotten (an
    infinite time) counts with the time that it ran, which is less than it would have
    needed. The prediction is then at best a lower bound, but closer than without that
    run.

    Args:
        loss: Mean privacy loss of the set in question, above 0.
        past_losses: Mean losses of sets unlearned before, shape ``(k,)``.
        past_times: How long each took, shape ``(k,)``, in any unit; ``inf`` for a run
            that ended before its set was forgotten.
        past_lengths: How long each was run, a number or ``(k,)``, in the same unit;
            only those of infinite times are used. Default: all runs were finished.

    Returns:
        The time in the unit of ``past_times``; None with fewer than two usable runs of
        different loss.

    Raises:
        ValueError: If a time is NaN or negative, or the length of an unfinished run is
            missing.

    Source: paper Corollary 4.4.
    """
    losses = numbers("past_losses", past_losses)
    times = _counted(past_times, past_lengths)
    usable = (losses > 0) & np.isfinite(losses)
    logs, times = np.log(losses[usable]), times[usable]
    if len(np.unique(logs)) < 2 or not loss > 0:
        return None
    centred = logs - logs.mean()
    slope = max(0.0, float(centred @ times / (centred @ centred)))
    return max(0.0, float(times.mean() + slope * (math.log(loss) - logs.mean())))


def _counted(
    past_times: ArrayLike, past_lengths: ArrayLike | None
) -> NDArray[np.float64]:
    """Return the times, with infinite times replaced by the length of the run.

    To leave unfinished runs out would be worse. They are those of the most difficult
    sets, and a fit without them would predict times that are even shorter.

    Raises:
        ValueError: If a time is NaN or negative, or a length is missing.
    """
    times = numbers("past_times", past_times)
    expect(
        bool((times >= 0).all()),
        "past_times",
        times,
        "must be at least 0",
        "Pass the time that each run took; inf if it ended before its set was "
        "forgotten.",
    )
    unfinished = np.isinf(times)
    if not unfinished.any():
        return times
    lengths = np.broadcast_to(
        np.asarray(math.nan if past_lengths is None else past_lengths), times.shape
    )
    require(
        bool((np.isfinite(lengths) & (lengths >= 0))[unfinished].all()),
        "A past run has the time inf (it ended before its set was forgotten), and how "
        "long it ran is not known.",
        "Pass its length: plan(..., past_runs=[(forget_indices, inf, epochs_run)]), or "
        "predict_time(..., past_lengths=...).",
    )
    return np.where(unfinished, lengths, times)


def _with_assumed_noise(
    runs: Sequence[GradNormLedger], assumed_noise_std: float | None
) -> list[GradNormLedger]:
    """Return the runs, with the assumed noise where training added none.

    Raises:
        ValueError: If no noise is given or it is not above 0.
    """
    expect(
        assumed_noise_std is not None,
        "assumed_noise_std",
        None,
        "must be given, because training added no noise",
        "Call plan(..., assumed_noise_std=1): any value gives a ranking, but no value "
        "gives a guarantee.",
    )
    noise_std = cast(float, assumed_noise_std)
    positive(
        assumed_noise_std=noise_std,
        remedy="Pass the standard deviation of the noise on the sum of the gradients.",
    )
    return [run.with_noise_std(noise_std) for run in runs]


def _checked_indices(ledger: GradNormLedger, indices: ArrayLike) -> NDArray[np.int64]:
    """Return the forget indices, sorted, after checking them.

    A ledger of a subset does not know the length of the training set. Its largest id is
    then the limit; ``columns_of`` refuses an index that the subset lacks.

    Raises:
        ValueError: If they are empty, repeated or out of range.
    """
    ids = ledger.example_ids
    size = ledger.num_examples if ids is None else int(ids.max()) + 1
    return distinct_indices("forget_indices", indices, size)
