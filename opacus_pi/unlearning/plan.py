"""What to expect of an unlearning run before it is run.

>>> predict_time(4.0, past_losses=[1.0, 2.0], past_times=[1.0, 2.0])
3.0
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opacus_pi._validate import distinct_indices, expect, positive
from opacus_pi.accounting import GradNormLedger, privacy_losses
from opacus_pi.accounting.guarantee import Guarantee
from opacus_pi.accounting.ledger import columns_of

_UNKNOWN = Guarantee("no method chosen", ())


@dataclass(frozen=True)
class Plan:
    """Difficulty, cost and worth of unlearning one forget set.

    Args:
        forget: int64 ``(m,)``, the examples to forget, sorted.
        num_retain: Examples to fine-tune on.
        order: Rényi order of the losses.
        mean_loss: Mean privacy loss of the forget set, the paper's difficulty.
        percentile: Percentage of all examples whose loss is below ``mean_loss``.
        ranking_only: Whether the loss uses an assumed noise (training added none):
            then it orders sets, and its size means nothing.
        steps_per_epoch: Updates per pass over the retain set.
        predicted_epochs: Passes until the set is forgotten, or None.
        prediction: How that was predicted, or why it was not.
        guarantee: What may be claimed afterwards, with its unmet assumptions.
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
    guarantee: Guarantee = _UNKNOWN

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
        ranking = " (assumed noise: a ranking only)" if self.ranking_only else ""
        steps = "unknown" if self.predicted_steps is None else self.predicted_steps
        return (
            f"Examples to forget: {len(self.forget)}, to keep: {self.num_retain}.\n"
            f"Mean privacy loss {self.mean_loss:.4g} at order {self.order:g}, "
            f"percentile {self.percentile:.1f}{ranking}.\n"
            f"Steps: {steps} ({self.prediction}); an epoch is "
            f"{self.steps_per_epoch} steps, {self.num_retain} examples.\n"
            f"{self.guarantee}"
        )


def make_plan(
    runs: Sequence[GradNormLedger],
    forget_indices: ArrayLike,
    *,
    order: float,
    assumed_noise_std: float | None = None,
    past_runs: Sequence[tuple[ArrayLike, float]] = (),
    batch_size: int = 64,
) -> Plan:
    """Difficulty and cost of a forget set, from the record of training.

    Args:
        runs: Ledgers of independent runs of one training, at least one.
        forget_indices: Positions in the data set, each once.
        order: Rényi order of the privacy losses.
        assumed_noise_std: Noise on the sum of gradients to assume if there was none.
        past_runs: ``(forget_indices, epochs it took)``.
        batch_size: Examples per batch.

    Raises:
        ValueError: If there is no run, the indices are bad, or there was no noise and
            none is assumed.
    """
    expect(
        len(runs) > 0,
        "ledger",
        None,
        "to be given for a plan",
        "Record the training: Unlearner(..., ledger=engine.ledger).",
    )
    positive(batch_size=batch_size, remedy="Pass examples per batch.")
    if (np.asarray(runs[0].mechanism.noise_std) == 0).any():
        runs = _noisy(runs, assumed_noise_std)
    losses = privacy_losses(list(runs), order)
    forget = _chosen(runs[0], forget_indices)
    num_retain = len(losses) - len(forget)
    expect(
        num_retain > 0,
        "forget_indices",
        f"all {len(losses)} examples",
        "to leave something to keep",
        "To forget everything, start from a fresh model.",
    )
    mean = float(losses[columns_of(runs[0], forget)].mean())
    past = [
        losses[columns_of(runs[0], _chosen(runs[0], i))].mean() for i, _ in past_runs
    ]
    epochs = predict_time(mean, past, [t for _, t in past_runs])
    return Plan(
        forget=forget,
        num_retain=num_retain,
        order=order,
        mean_loss=mean,
        percentile=percentile(mean, losses),
        ranking_only=runs[0].mechanism.assumed_noise,
        steps_per_epoch=math.ceil(num_retain / batch_size),
        predicted_epochs=epochs,
        prediction="no two finished past runs of different difficulty to fit"
        if epochs is None
        else f"log-linear fit to {len(past_runs)} past runs",
    )


def budget_of(
    predicted_epochs: float | None, factor: float = 2.0, default: int = 25
) -> int:
    """Epochs to allow a run of so many predicted epochs; see ``Plan.budget``."""
    positive(factor=factor, remedy="2 allows twice the prediction.")
    if predicted_epochs is None:
        return default
    return max(1, math.ceil(factor * predicted_epochs))


def percentile(value: float, losses: ArrayLike) -> float:
    """Percentage of ``losses`` below ``value``, ties counted half.

    Args:
        value: The set's mean loss.
        losses: Every example's loss, shape ``(n,)``.

    Returns:
        A number in [0, 100].
    """
    losses = np.asarray(losses, dtype=np.float64)
    below = np.count_nonzero(losses < value) + np.count_nonzero(losses == value) / 2
    return float(100 * below / losses.size)


def predict_time(
    loss: float, past_losses: ArrayLike, past_times: ArrayLike
) -> float | None:
    """Time to unlearn from past runs: time = a + b ln(loss), b ≥ 0, least squares.

    Corollary 4.4 lets the steps grow with the logarithm of the privacy loss. The
    answer is at least 0; times that are not finite (never reached) are left out.

    Args:
        loss: Mean privacy loss of the set in question, above 0.
        past_losses: Mean losses of sets unlearned before, shape ``(k,)``.
        past_times: How long each took, shape ``(k,)``, in any unit.

    Returns:
        The time in the unit of ``past_times``; None with fewer than two usable runs of
        different loss.

    Source: paper Corollary 4.4.
    """
    losses = np.asarray(past_losses, dtype=np.float64)
    times = np.asarray(past_times, dtype=np.float64)
    usable = (losses > 0) & np.isfinite(losses) & np.isfinite(times)
    logs, times = np.log(losses[usable]), times[usable]
    if len(np.unique(logs)) < 2 or not loss > 0:
        return None
    centred = logs - logs.mean()
    slope = max(0.0, float(centred @ times / (centred @ centred)))
    return max(0.0, float(times.mean() + slope * (math.log(loss) - logs.mean())))


def _noisy(
    runs: Sequence[GradNormLedger], assumed_noise_std: float | None
) -> list[GradNormLedger]:
    """Noiseless runs as if they had had the assumed noise."""
    expect(
        assumed_noise_std is not None,
        "assumed_noise_std",
        None,
        "to be given, as training added no noise",
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
