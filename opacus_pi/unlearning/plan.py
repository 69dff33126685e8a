"""What to expect of an unlearning run before it is run.

>>> predict_time(4.0, past_losses=[1.0, 2.0], past_times=[1.0, 2.0])
3.0
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices, expect, positive
from opacus_pi.accounting import GradNormLedger, privacy_losses
from opacus_pi.accounting.assumed_noise import has_assumed_noise
from opacus_pi.accounting.guarantee import Guarantee
from opacus_pi.difficulty.forget_sets import ties
from opacus_pi.ledger.grad_norm_ledger import columns_of

PastRun = tuple[ArrayLike, float] | tuple[ArrayLike, float, float]

_UNKNOWN = Guarantee("no method chosen", ())
_TIED = (
    "{outside} examples outside the forget set have the privacy loss of one in it, to "
    "rounding. If the set was chosen by loss, which of those that tie is a draw, and "
    "says nothing of their difficulty. Losses tie at the largest, that of an example "
    "clipped in every update, to which larger estimates are cut: a lower order, or "
    "training with a larger max_grad_norm, may tell them apart."
)


@dataclass(frozen=True)
class Plan:
    """Difficulty, cost and worth of unlearning one forget set.

    Args:
        forget: int64 ``(m,)``, the examples to forget, sorted.
        num_retain: Examples to fine-tune on, without those forgotten before.
        order: Rényi order of the losses.
        mean_loss: Mean privacy loss of the forget set, the paper's difficulty.
        percentile: Percentage of all examples whose loss is below ``mean_loss``.
        ranking_only: Whether the loss uses an assumed noise (training added none):
            then it orders sets, and its size means nothing.
        steps_per_epoch: Updates per pass over the retain set.
        predicted_epochs: Passes until the set is forgotten, or None.
        prediction: How that was predicted, or why it was not.
        num_unfinished: Of the past runs, how many never got there: they count as their
            length, so that the prediction is at best a lower bound.
        num_tied: How many examples outside the set have, to rounding, the loss of one
            in it: a ranking by loss does not tell them from it.
        guarantee: What may be claimed afterwards, with its unmet assumptions.
        forgotten_before: int64, sorted: what the model has forgotten already. The
            guarantee speaks of these and ``forget`` together, the losses of ``forget``.
    """

    forget: NDArray[np.int64]
    num_retain: int
    order: float
    mean_loss: float
    percentile: float
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
        """Epochs to allow an unlearning run.

        They follow from the set's own loss where there is a prediction. A guarantee
        speaks of a number fixed without it: then take the default.

        Args:
            factor: How many times the predicted epochs, above 0.
            default: What to allow where nothing was predicted.

        Returns:
            A whole number, at least 1.
        """
        return budget_of(self.predicted_epochs, factor, default)

    def claiming(self, guarantee: Guarantee) -> "Plan":
        """The same plan with what may be claimed afterwards."""
        return replace(self, guarantee=guarantee)

    def __str__(self) -> str:
        return self.text()

    def text(self, delta: float = 1e-5) -> str:
        """The plan in words.

        Args:
            delta: δ in (0, 1) of the guarantee's ε, where there is one.
        """
        reason = " (assumed noise or norms in bfloat16: a ranking only)"
        ranking = reason if self.ranking_only else ""
        steps = "unknown" if self.predicted_steps is None else f"{self.predicted_steps}"
        least = "at least " if self.num_unfinished and steps != "unknown" else ""
        tied = (
            f"Examples outside the set that tie with one in it: {self.num_tied}.\n"
            if self.num_tied
            else ""
        )
        return (
            f"Examples to forget: {len(self.forget)}, to keep: {self.num_retain}.\n"
            f"{self._before()}"
            f"Mean privacy loss {self.mean_loss:.4g} at order {self.order:g}, "
            f"percentile {self.percentile:.1f}{ranking}.\n{tied}"
            f"Steps: {least}{steps} ({self.prediction}); an epoch is "
            f"{self.steps_per_epoch} steps, {self.num_retain} examples.\n"
            f"{self.guarantee.text(delta)}"
        )

    def _before(self) -> str:
        """The line about what was forgotten before, if anything was."""
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
            f"{known}The guarantee speaks of all {total} forgotten until then, "
            f"{before} of them before.\n"
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
    """Difficulty and cost of a forget set, from the record of training.

    Args:
        runs: Ledgers of independent runs of one training, at least one.
        forget_indices: Positions in the data set, each once.
        order: Rényi order of the privacy losses.
        assumed_noise_std: Noise on the sum of gradients to assume if there was none.
        past_runs: ``(forget_indices, epochs it took)``, or with the epochs it ran as a
            third, which is needed where it never got there (``inf`` epochs).
        batch_size: Examples per batch.
        forgotten_before: What the model has forgotten already: it is not kept either.

    Raises:
        ValueError: If there is no run, the indices are bad, there was no noise and
            none is assumed, or the length of a run that never got there is missing.

    Warns if examples tie across the edge of a set that looks chosen by loss.
    """
    expect(
        len(runs) > 0,
        "ledger",
        None,
        "must be given for a plan",
        "Record the training: Unlearner(..., ledger=engine.ledger).",
    )
    positive(batch_size=batch_size, remedy="Pass examples per batch.")
    if (np.asarray(runs[0].mechanism.noise_std) == 0).any():
        runs = _noisy(runs, assumed_noise_std)
    losses = privacy_losses(list(runs), order)
    forget = _chosen(runs[0], forget_indices)
    before = np.unique(np.asarray(forgotten_before, dtype=np.int64))
    num_retain = _num_kept(runs[0], np.union1d(before, forget))
    expect(
        num_retain > 0,
        "forget_indices",
        f"all {len(losses)} examples",
        "must leave something to keep",
        "To forget everything, start from a fresh model.",
    )
    columns = columns_of(runs[0], forget)
    mean = float(losses[columns].mean())
    epochs = _predicted(mean, losses, runs[0], past_runs)
    num_unfinished = sum(math.isinf(past[1]) for past in past_runs)
    return Plan(
        forget=forget,
        num_retain=num_retain,
        order=order,
        mean_loss=mean,
        percentile=percentile(mean, losses),
        ranking_only=has_assumed_noise(runs),
        steps_per_epoch=math.ceil(num_retain / batch_size),
        predicted_epochs=epochs,
        prediction=_how_predicted(epochs, len(past_runs), num_unfinished),
        num_unfinished=num_unfinished,
        num_tied=_num_tied(losses, columns),
        forgotten_before=before,
    )


def _num_kept(ledger: GradNormLedger, gone: NDArray[np.int64]) -> int:
    """How many of the recorded examples are not gone."""
    ids = ledger.example_ids
    known = np.arange(ledger.num_examples) if ids is None else ids
    return len(np.setdiff1d(known, gone))


def _predicted(
    mean: float,
    losses: NDArray[np.float64],
    ledger: GradNormLedger,
    past_runs: Sequence[PastRun],
) -> float | None:
    """Epochs for a set of this mean loss, from past runs."""
    past = [losses[columns_of(ledger, _chosen(ledger, p[0]))].mean() for p in past_runs]
    times = [p[1] for p in past_runs]
    lengths = [p[2] if len(p) == 3 else math.nan for p in past_runs]
    return predict_time(mean, past, times, past_lengths=lengths)


def _how_predicted(
    epochs: float | None, num_past_runs: int, num_unfinished: int
) -> str:
    """How the epochs were predicted, or why they were not."""
    if epochs is None:
        return (
            "no two past runs of different difficulty to fit: name them by "
            "plan(..., past_runs=[(ids, epochs), ...]), --past on the command line"
        )
    fit = f"log-linear fit to {num_past_runs} past runs"
    if not num_unfinished:
        return fit
    return (
        f"{fit}, of which {num_unfinished} never got there and count as their length: "
        "at best a lower bound"
    )


def _num_tied(losses: NDArray[np.float64], chosen: NDArray[np.int64]) -> int:
    """How many that were not chosen tie with one that was; warns if it was by loss."""
    levels = ties(losses)
    inside = np.zeros(len(levels), dtype=bool)
    inside[chosen] = True
    own, others = levels[inside], levels[~inside]
    outside = int(np.isin(others, own).sum())
    by_loss = not ((own.min() < others) & (others < own.max())).any()
    if outside and by_loss and len(own) > 1:
        warnings.warn(_TIED.format(outside=outside), stacklevel=4)
    return outside


def budget_of(
    predicted_epochs: float | None, factor: float = 2.0, default: int = 25
) -> int:
    """Epochs to allow a run of so many predicted epochs; see ``Plan.budget``."""
    positive(factor=factor, remedy="2 allows twice the prediction.")
    if predicted_epochs is None:
        return default
    return max(1, math.ceil(factor * predicted_epochs))


def percentile(value: float, losses: ArrayLike) -> float:
    """Percentage of ``losses`` below ``value``, ties (to rounding) counted half.

    Args:
        value: The set's mean loss.
        losses: Every example's loss, shape ``(n,)``.

    Returns:
        A number in [0, 100].
    """
    losses = np.asarray(losses, dtype=np.float64)
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
    """Time to unlearn from past runs: time = a + b ln(loss), b ≥ 0, least squares.

    Corollary 4.4 lets the steps grow with the logarithm of the privacy loss. The
    answer is at least 0. A run that never got there (an infinite time) counts as its
    length, which is less than its time would have been: the answer then is at best a
    lower bound, but nearer than without that run.

    Args:
        loss: Mean privacy loss of the set in question, above 0.
        past_losses: Mean losses of sets unlearned before, shape ``(k,)``.
        past_times: How long each took, shape ``(k,)``, in any unit; ``inf``: it never
            got there.
        past_lengths: How long each was run, a number or ``(k,)``, in the same unit;
            only those of infinite times are used. Default: all got there.

    Returns:
        The time in the unit of ``past_times``; None with fewer than two usable runs of
        different loss.

    Raises:
        ValueError: If a time is NaN or negative, or the length is missing of a run that
            never got there.

    Source: paper Corollary 4.4.
    """
    losses = np.asarray(past_losses, dtype=np.float64)
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
    """Times, in the place of infinite ones the lengths of the runs."""
    times = np.asarray(past_times, dtype=np.float64)
    expect(
        bool((times >= 0).all()),
        "past_times",
        times,
        "must be at least 0",
        "Pass how long each run took, inf if it never got there.",
    )
    unfinished = np.isinf(times)
    if not unfinished.any():
        return times
    lengths = np.broadcast_to(
        np.asarray(math.nan if past_lengths is None else past_lengths), times.shape
    )
    expect(
        bool((np.isfinite(lengths) & (lengths >= 0))[unfinished].all()),
        "past_times",
        math.inf,
        "must come with how long the run was",
        "It counts as its length: plan(..., past_runs=[(forget_indices, inf, "
        "epochs_run)]), or predict_time(..., past_lengths=...).",
    )
    return np.where(unfinished, lengths, times)


def _noisy(
    runs: Sequence[GradNormLedger], assumed_noise_std: float | None
) -> list[GradNormLedger]:
    """Noiseless runs as if they had had the assumed noise."""
    expect(
        assumed_noise_std is not None,
        "assumed_noise_std",
        None,
        "must be given, as training added no noise",
        "Any noise gives a ranking (no guarantee): plan(..., assumed_noise_std=1.0).",
    )
    noise_std = cast(float, assumed_noise_std)
    positive(assumed_noise_std=noise_std, remedy="It is the std on the sum.")
    return [run.with_noise_std(noise_std) for run in runs]


def _chosen(ledger: GradNormLedger, indices: ArrayLike) -> NDArray[np.int64]:
    """A checked choice of the examples that a ledger speaks of."""
    ids = ledger.example_ids
    size = ledger.num_examples if ids is None else int(ids.max()) + 1
    return distinct_indices("forget_indices", indices, size)
