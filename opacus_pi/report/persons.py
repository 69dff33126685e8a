"""Persons with several examples, ranked by the most expensive of their examples.

**Idea.** Recorded norms give a loss for each example, but not for a person: how the
gradients of a person's examples add up is not recorded, so their losses must not be
added. Persons are ranked by the largest of them, that of their most unusual example. It
is the person's own loss if there is one example only. What may be promised to a person
is the worst case of any set of as many examples. It depends on their number only, so it
stands beside the rank and does not decide it.

**What breaks it.** The rank does not rise with the number of examples. Of two persons
with the same largest loss, the one with more examples is expected to be harder to
forget, and is ranked higher only because of the tie. A person's own number needs saved
weights: ``recording.gram_ledger`` and ``accounting.group_divergence``.

>>> from opacus_pi.accounting import GradNormLedger, NoisySGD
>>> mechanism = NoisySGD(100, sample_rate=0.1, noise_std=2.0, max_grad_norm=1.0)
>>> ledger = GradNormLedger(mechanism, steps=[100], grad_norms=[[0.1, 5.0, 0.4]])
>>> for row in rank_persons(ledger, {"ada": [0, 2], "ben": [1]}):
...     print(row.person, row.num_examples, row.group_epsilon > row.epsilon)
ben 1 False
ada 2 True
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect
from opacus_pi.accounting import GradNormLedger
from opacus_pi.accounting.training_bound import training_epsilon
from opacus_pi.difficulty.forget_sets import ranking, ties
from opacus_pi.ledger.grad_norm_ledger import runs_of
from opacus_pi.report.scores import Scores, score

__all__ = ["PersonScore", "rank_persons"]


@dataclass(frozen=True)
class PersonScore:
    """The numbers of one person, as sensitive as the ledger.

    Args:
        person: The person, as named by the caller.
        num_examples: How many examples the person has.
        loss: The largest privacy loss of these examples, in nats: an estimate.
        epsilon: The largest ε of these examples, an estimate, at most
            ``group_epsilon``; None if the losses are only a ranking.
        group_epsilon: Bound on ε for any ``num_examples`` examples, whatever they are,
            the smallest that is known; None if there is no bound.
    """

    person: str
    num_examples: int
    loss: float
    epsilon: float | None
    group_epsilon: float | None


def rank_persons(
    ledger: GradNormLedger | Sequence[GradNormLedger],
    owners: Mapping[Any, ArrayLike],
    *,
    scores: Scores | None = None,
    **options: Any,
) -> list[PersonScore]:
    """Rank persons by how hard they are expected to be to forget, hardest first.

    A person's loss and ε are the largest of the person's examples. Equal losses are
    ordered by ε, then by the number of examples; what is still equal is in random
    order. Persons without examples are left out.

    Args:
        ledger: As in ``score``.
        owners: From each person to the positions of the person's examples.
        scores: What ``score`` returned for this ledger; None: it is called here.
        **options: ``order``, ``delta`` and ``tolerance`` of ``score``.

    Returns:
        One entry for each person.

    Raises:
        ValueError: If a position is not in the ledger or is listed twice for a person,
            or as ``score``.
    """
    scores = score(ledger, **options) if scores is None else scores
    runs = list(runs_of(ledger))
    places = {person: _places(person, at, scores) for person, at in owners.items()}
    places = {person: at for person, at in places.items() if len(at)}
    has_bound = math.isfinite(scores.least_worst_case)

    @cache
    def bound(num_examples: int) -> float | None:
        if not has_bound:
            return None
        if num_examples == 1:
            return scores.least_worst_case
        return training_epsilon(runs, num_examples, scores.delta)

    found = [
        PersonScore(
            str(person),
            len(at),
            float(scores.losses[at].max()),
            None if scores.epsilons is None else float(scores.epsilons[at].max()),
            bound(len(at)),
        )
        for person, at in places.items()
    ]
    return [_limited(row) for row in _ranked(found)]


def _limited(row: PersonScore) -> PersonScore:
    """Return a row whose estimate is not above its bound, by another method."""
    if row.epsilon is None or row.group_epsilon is None:
        return row
    return replace(row, epsilon=min(row.epsilon, row.group_epsilon))


def _ranked(rows: Sequence[PersonScore]) -> list[PersonScore]:
    """Return the persons in the order of ``rank_persons``."""
    if not rows:
        return []
    losses = [row.loss for row in rows]
    order = ranking(losses)[::-1]
    keys = (
        [row.num_examples for row in rows],
        ties([0.0 if row.epsilon is None else row.epsilon for row in rows]),
        ties(losses),
    )
    order = order[np.lexsort([-np.asarray(key)[order] for key in keys])]
    return [rows[i] for i in order]


def _places(person: Any, examples: ArrayLike, scores: Scores) -> NDArray[np.int64]:
    """Return the places of a person's examples among the scored ones.

    Args:
        person: The person, for the message.
        examples: Positions in the data set.
        scores: The numbers of all examples, by position.

    Raises:
        ValueError: If a position has no score or is listed twice.
    """
    at = np.asarray(examples)
    is_listed = at.ndim == 1 and (at.size == 0 or at.dtype.kind in "iu")
    expect(
        is_listed and len(np.unique(at)) == len(at),
        "owners",
        f"{examples!r} for {person}",
        "must map each person to a list of different positions",
        "Write each person's positions once, as whole numbers.",
    )
    unknown = np.setdiff1d(at, scores.ids)
    first, last = int(scores.ids.min()), int(scores.ids.max())
    expect(
        len(unknown) == 0,
        "owners",
        f"position {unknown[0]} for {person}" if len(unknown) else "",
        f"must list examples of the ledger, which has {len(scores.ids)} between "
        f"{first} and {last}",
        "Positions count the training set's examples from 0.",
    )
    sorter = np.argsort(scores.ids)
    found: NDArray[np.int64] = sorter[np.searchsorted(scores.ids[sorter], at)]
    return found
