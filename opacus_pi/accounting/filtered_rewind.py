r"""The part of a private training run that must be run again to forget an example.

``DeletionPolicy`` fixes, before training, what every later deletion must guarantee.
``restart_update`` then says, for a set of examples and one recorded run, from which
saved state the training has to be repeated without the set; often from none at all.

**Idea.** An example that was in update t moved the noised sum by at most
:math:`r_t = \min(\|g\|, C)/\sigma` standard deviations of the noise. A Rényi filter
that had been used in training would have dropped the example for good where the sum of
:math:`r_t^2` was about to exceed :math:`\mu^2`. Up to that moment such a training run
and the one that was recorded are the same. So take the state of that moment and run the
rest without the example: the result has the distribution of a model that was trained
under the filter.

**Guarantee.** For the distribution U of the result and the distribution Q of a training
run without the set, :math:`D_a(U\|Q) \le a\mu^2/2` and :math:`D_a(Q\|U) \le a\mu^2/2`
at every order a, and :math:`\delta(\varepsilon)` is at most that of one Gaussian shift
of μ standard deviations, for any network and loss, from one run.

**What breaks it.** A policy chosen after the run; a decision that looks ahead. With a
state only every few updates, the decision is made *at* a state. It charges the next
update by its own norm, which the state determines, and those after it, up to the next
state, at the clip norm. "The last state before the sum went over" looks
ahead, and is not covered. Sampling amplifies nothing here: the charge of an update is
that of an example known to be in it.

>>> DeletionPolicy(epsilon=1.0, delta=1e-5).mu < 0.2681
True

Source: Feldman and Zrnic 2021 (arXiv:2008.11193) for the filter; the derivation is on
the theory page.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, positive, require
from opacus_pi.accounting.conversion import check_delta, gaussian_mu
from opacus_pi.ledger.participation_record import ParticipationRecord

__all__ = ["DeletionPolicy", "restart_update", "restart_updates"]

Array = NDArray[np.float64]
# Norms are computed in float32; a sum of many squares loses a few parts in a million.
_ROUNDING = 1 + 1e-5


def _now() -> str:
    """Return the present time as an ISO 8601 text."""
    return datetime.now(timezone.utc).isoformat()


@dataclass(frozen=True)
class DeletionPolicy:
    """The guarantee of every deletion from a model, fixed before the model is trained.

    Args:
        epsilon: ε, above 0 and finite.
        delta: δ in (0, 1); far below one over the number of examples.
        made: Time at which the policy was made, as ISO 8601 text; default: now.

    Raises:
        ValueError: If an argument is outside its domain.
    """

    epsilon: float
    delta: float
    made: str = field(default_factory=_now, compare=False)

    def __post_init__(self) -> None:
        remedy = "Choose the epsilon that a deletion must reach, for example 2."
        positive(epsilon=self.epsilon, remedy=remedy)
        in_range(0, np.finfo(np.float64).max, epsilon=self.epsilon, remedy=remedy)
        check_delta(self.delta)
        try:
            datetime.fromisoformat(self.made)
        except (TypeError, ValueError):
            expect(
                False,
                "made",
                repr(self.made),
                "must be an ISO 8601 time",
                "Omit it: the present time is then used.",
            )

    @property
    def mu(self) -> float:
        """The longest Gaussian shift that is (ε, δ)-private, rounded down."""
        return float(gaussian_mu(self.epsilon, self.delta))

    def to_json(self) -> str:
        """Return the policy as JSON text, with the time when it was made."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "DeletionPolicy":
        """Return the policy that ``to_json`` wrote.

        Args:
            text: The JSON text.

        Raises:
            ValueError: If it is not such a text.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"The saved deletion policy cannot be read ({error}). Restore the "
                "file from a copy."
            ) from error


def restart_update(
    record: ParticipationRecord,
    forget: ArrayLike,
    mu: float,
    states: Sequence[int],
) -> int:
    """Return the update from which training is repeated to forget a set of examples.

    The answer is the first saved state at which the sum of the set's charges would
    exceed ``mu²`` before the next state. At a state, two things are known: the charges
    so far, and the charge of the next update, which follows from the weights of the
    state. Later updates before the next state are charged at the clip norm. The charge
    of a set in one update is the square of the sum of its members' ratios r_t.

    Args:
        record: Every participation of the run.
        forget: int ``(m,)``, all examples to forget, with those of earlier requests.
        mu: The budget, ``DeletionPolicy.mu``, in standard deviations of the noise.
        states: Updates after which a state was saved; 0 is always considered.

    Returns:
        The update of the state to restart from; T (``record.num_steps``) if the trained
        model may be kept.

    Raises:
        ValueError: If an update had no noise, or did not clip.
    """
    actual, worst = _sums_of_ratios(record, np.asarray(forget, dtype=np.int64))
    charges, at_most = np.square(actual), np.square(worst)
    if not len(charges):
        return 0
    spent = np.concatenate([[0.0], np.cumsum(charges)])
    starts = _starts(states, record.num_steps)
    at_most[starts] = charges[starts]  # known at the state
    exceeds = _exceeds(spent[starts] + np.add.reduceat(at_most, starts), mu)
    return int(starts[np.argmax(exceeds)]) if exceeds.any() else record.num_steps


def restart_updates(
    record: ParticipationRecord, mu: float, states: Sequence[int]
) -> NDArray[np.int64]:
    """Return for each example where to restart training to forget it alone.

    The result equals ``restart_update`` with one example at a time, and is computed for
    all of them at once.

    Args:
        record: Every participation of the run.
        mu: The budget, ``DeletionPolicy.mu``, in standard deviations of the noise.
        states: Updates after which a state was saved; 0 is always considered.

    Returns:
        int64 ``(n,)``: the update of the state to restart from. Where the trained model
        may be kept, it is T, the number of updates of the run.

    Raises:
        ValueError: If an update had no noise, did not clip, or had unattributed
            samples.
    """
    require(
        not record.num_unattributed.any(),
        f"{int(record.num_unattributed.sum())} samples of the record could not be "
        "matched to examples, so the charges of single examples are not known.",
        "Call restart_update with each forget set instead.",
    )
    starts = _starts(states, record.num_steps)
    clip = _clip_ratios(record)
    charges = np.square(_ratios(record, clip, slice(None)))
    at_most = np.square(clip[record.steps - 1])
    block = np.searchsorted(starts, record.steps - 1, side="right") - 1
    is_next = record.steps - 1 == starts[block]
    num_blocks = len(starts)
    cell = record.indices.astype(np.int64) * num_blocks + block
    cells, position = np.unique(cell, return_inverse=True)
    actual = np.bincount(position, charges, len(cells))
    planned = np.bincount(position, np.where(is_next, charges, at_most), len(cells))
    example = cells // num_blocks
    running = np.cumsum(actual)
    first = np.searchsorted(example, example)  # position of the example's first cell
    before = running - actual - (running[first] - actual[first])
    exceeds = _exceeds(before + planned, mu)
    result = np.full(record.num_examples, record.num_steps, dtype=np.int64)
    np.minimum.at(result, example[exceeds], starts[cells[exceeds] % num_blocks])
    return result


def _exceeds(total: Array, mu: float) -> NDArray[np.bool_]:
    """Return whether sums of charges exceed the budget, rounding included."""
    return np.asarray(total * (1 + 1e-9) + 1e-300 > mu**2) & (total > 0)


def _starts(states: Sequence[int], num_steps: int) -> NDArray[np.int64]:
    """Return the update counts at which a decision is made, increasing from 0.

    Args:
        states: Updates after which a state was saved.
        num_steps: Updates of the run.
    """
    inside = {int(step) for step in states if 0 <= step < num_steps}
    return np.array(sorted({0} | inside), dtype=np.int64)


def _clip_ratios(record: ParticipationRecord) -> Array:
    """Return what a clipped example is charged in each update, C / σ, ``(T,)``."""
    positive(
        noise_std=record.noise_std,
        remedy="An update without noise has no finite privacy loss. Use an exact "
        "rewind (without a deletion policy).",
    )
    expect(
        bool(np.isfinite(record.max_grad_norm).all()),
        "max_grad_norm",
        math.inf,
        "must be finite",
        "Only training that clips (make_private) limits what an example adds. Use an "
        "exact rewind (without a deletion policy).",
    )
    return record.max_grad_norm / record.noise_std


def _ratios(
    record: ParticipationRecord, clip: Array, positions: NDArray[np.int64] | slice
) -> Array:
    """Return the ratio of some samples, rounded up; C / σ where none was measured."""
    update = record.steps[positions] - 1
    norms = record.norms[positions].astype(np.float64) * _ROUNDING
    known = np.where(np.isnan(norms), math.inf, norms) / record.noise_std[update]
    return np.minimum(known, clip[update])


def _sums_of_ratios(
    record: ParticipationRecord, forget: NDArray[np.int64]
) -> tuple[Array, Array]:
    """Return by how much a set moved each update at most, and could have moved it.

    A member that was not seen in an update may be one of its unattributed samples.

    Args:
        record: Every participation.
        forget: The set.

    Returns:
        float64 ``(T,)`` twice: from the recorded norms, and at the clip norm.
    """
    clip = _clip_ratios(record)
    positions = record.selected(forget)
    update, size = record.steps[positions] - 1, record.num_steps
    known = np.bincount(update, _ratios(record, clip, positions), size)
    count = np.bincount(update, minlength=size)
    unseen = np.minimum(record.num_unattributed, np.maximum(len(forget) - count, 0))
    return known + unseen * clip, (count + unseen) * clip
