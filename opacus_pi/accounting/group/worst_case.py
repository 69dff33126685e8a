"""Worst case of several examples of one person: all gradients clipped and parallel.

**Idea.** The sum of the group's clipped gradients is at most C times the number of its
examples in the batch, and parallel gradients are the worst case (``gaussian_mixture``).
One update is then a mixture of the N(k·C/σ, 1), where k ~ Bin(m, q) under Poisson
sampling.

**Guarantee.** A bound for any group of m examples, in both directions: on a line,
removing shifts of one sign gives no larger divergence than adding them. It is more than
m times the worst case of one example.

**What breaks it.** No clipping: the bound is infinite.

Source: docs/theory.md, Section 4.

>>> mechanism = NoisySGD(100, sample_rate=0.01, noise_std=1.0, max_grad_norm=1.0)
>>> one, three = (group_worst_case_loss(mechanism, m, 4.0) for m in (1, 3))
>>> three > 3 * one  # more than the sum
True
"""

import math
from functools import lru_cache

from scipy.special import logsumexp

from opacus_pi._types import ArrayLike
from opacus_pi._validate import in_range
from opacus_pi.accounting.group.gaussian_mixture import binomial_law, mixture_log_moment
from opacus_pi.accounting.rules import (
    intervals,
    require_steps,
    worst_case_of_fixed,
)
from opacus_pi.ledger.mechanism import NoisySGD

_INTEGRATED = 256  # largest group whose mixture is integrated


def group_worst_case_loss(
    mechanism: NoisySGD,
    group_size: int,
    order: float,
    *,
    steps: ArrayLike | None = None,
) -> float:
    """Return the worst case of a group of m examples: a bound on its Rényi divergence.

    Under Poisson sampling the number of the group's examples in a batch is Bin(m, q).
    Under fixed sampling the batches are taken as given: each example is in one update
    of every epoch, and in the worst case the whole group is in the same update, the
    most expensive one.

    Args:
        mechanism: Noise, clip norm and sampling of the run.
        group_size: m, at least 1.
        order: Rényi order, above 1.
        steps: The ledger's steps ``(N,)``; needed if the mechanism has a schedule.

    Returns:
        A bound on the divergence in both directions, in nats; ``inf`` without clipping.

    Raises:
        ValueError: If an argument is outside its domain or ``noise_std`` is 0.

    Source: docs/theory.md, Section 4.
    """
    remedy = "Pass the number of examples in the group."
    in_range(1, math.inf, group_size=group_size, remedy=remedy)
    in_range(1, math.inf, closed=False, order=order, remedy="Try 8.")
    require_steps(mechanism, steps)
    rows = [mechanism.num_steps] if steps is None else steps
    parts = intervals(rows, mechanism.num_steps)
    facts = [mechanism.at_row(part.right) for part in parts]
    divergences = [
        group_step_divergence(float(f.ratios(math.inf)), _rate(f), group_size, order)
        for f in facts
    ]
    if mechanism.sampling != "poisson":
        # With j members in an update its divergence grows as j², so members who are
        # always in the same updates are the worst case.
        return worst_case_of_fixed(parts, facts, divergences)
    return sum(
        (part.num_updates * c for part, c in zip(parts, divergences, strict=True)), 0.0
    )


@lru_cache(maxsize=4096)
def group_step_divergence(
    ratio: float, sample_rate: float, group_size: int, order: float
) -> float:
    """Return one update's divergence: the mixture over k ~ Bin(m, q) of N(k·ratio, 1).

    Args:
        ratio: C / noise_std, the inverse of Opacus's noise multiplier; may be ``inf``.
        sample_rate: q.
        group_size: m.
        order: Rényi order, above 1.

    Returns:
        The divergence, in nats; an upper bound of it for groups of more than 256.
    """
    if sample_rate == 0 or ratio == 0:
        return 0.0
    if math.isinf(ratio):
        return math.inf
    counts, log_weights = binomial_law(group_size, sample_rate)
    if group_size > _INTEGRATED:
        # The integral takes time in proportion to m²; its bound by joint convexity is
        # as good where the number of sampled members varies little.
        moments = order * (order - 1) / 2 * (ratio * counts) ** 2
        return float(logsumexp(moments + log_weights)) / (order - 1)
    return mixture_log_moment(ratio * counts, log_weights, order) / (order - 1)


def _rate(facts: NoisySGD) -> float:
    """Return the probability that an example is sampled, given the schedule."""
    return float(facts.sample_rate) if facts.sampling == "poisson" else 1.0
