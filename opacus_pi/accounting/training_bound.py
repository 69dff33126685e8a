"""The guarantee of DP-SGD training for any examples, and its assumptions.

The worst case of the mechanism bounds the divergence between training with a set of
examples and training without it, in both directions, for every model and all data. It
needs no recorded norm: only noise, clip norm, sampling and the number of updates.
``privacy_statement`` and ``unlearning.claims`` use the same curve and the same
assumptions, so that they cannot disagree.

*Guarantee.* A bound in both directions, for the training without the set by the same
schedule, sample rate and denominator.

*What breaks it.* No clipping (the bound is infinite), or a declaration that is false:
a number of updates or a learning rate that were chosen by looking at the data, updates
on the data before the recorded ones, or another result that was released as well.

Source: docs/theory.md, Sections 4 and 10.

>>> curve = worst_case_curve(NoisySGD(100, 0.01, 1.0, 1.0), group_size=1)
>>> 0.5 < float(rdp_to_epsilon(curve.divergences, curve.orders, delta=1e-5)) < 1.5
True
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from opacus_pi._types import ArrayLike
from opacus_pi.accounting.composed_epsilon import composed_worst_case
from opacus_pi.accounting.conversion import rdp_to_epsilon
from opacus_pi.accounting.epsilon import DEFAULT_ORDERS
from opacus_pi.accounting.group.worst_case import group_worst_case_loss
from opacus_pi.accounting.guarantee import (
    Assumption,
    derived,
    observed,
    unchecked_links,
)
from opacus_pi.accounting.losses import worst_case_loss
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger, joint_mechanism
from opacus_pi.ledger.mechanism import NoisySGD
from opacus_pi.ledger.noise_generator import NOISE_GENERATORS, SECURE, weakest

__all__ = [
    "COMPOSITION",
    "CONVERTED",
    "Curve",
    "TrainingBounds",
    "declarations",
    "every_gradient_clipped",
    "item_is_the_unit",
    "noise_added",
    "sampling_known",
    "training_assumptions",
    "training_bounds",
    "training_epsilon",
    "unpredictable_noise",
    "worst_case_curve",
]

CONVERTED = "converted from Rényi divergences"
COMPOSITION = "numerical composition of the updates"
# The best order of m examples is about 1 + 8/m; more orders than Opacus's for strong
# and for weak noise.
_NEAR_ONE = (1.001, 1.003, 1.01, 1.02, 1.05)
_LARGE = (80.0, 128.0, 256.0, 512.0, 1024.0)
_SETTINGS = (
    "the weights before the first recorded update, the number of updates and all "
    "settings do not depend on the data"
)
_NOTHING_ELSE = (
    "besides the trained model, nothing else computed from the data was released "
    "(tuning runs, other models, losses of single examples)"
)
_OWN_ITEM = (
    "what is protected is one item of the data set, and no item contains data of "
    "another example"
)
_UNPREDICTABLE = "the noise cannot be predicted"
_CANNOT_SEE = "this cannot be checked from the training"


class Curve(NamedTuple):
    """Divergences over orders.

    Args:
        orders: Rényi orders, above 1.
        divergences: One per order, in nats.
    """

    orders: tuple[float, ...]
    divergences: tuple[float, ...]


class TrainingBounds(NamedTuple):
    """Bounds on the same ε at one δ by two methods: each holds, the smaller counts.

    A conversion from Rényi divergences loses some per cent. Numerical composition loses
    almost nothing, but is known for a single example only.

    Args:
        converted: The one that is converted; ``inf`` if there is none.
        composed: The one by numerical composition; ``inf`` if there is none.
    """

    converted: float
    composed: float

    @property
    def least(self) -> float:
        """The bound to be stated; ``inf`` if there is none."""
        return min(self)


def worst_case_curve(
    mechanism: NoisySGD, group_size: int, *, steps: ArrayLike | None = None
) -> Curve:
    """Return the bound on the divergence of m examples at all orders, both directions.

    Args:
        mechanism: Noise, clip norm and sampling of the training.
        group_size: m, at least 1.
        steps: The ledger's steps ``(N,)``; needed if the mechanism has a schedule.

    Returns:
        The curve; all divergences are ``inf`` without clipping.

    Raises:
        ValueError: If ``noise_std`` is 0.
    """
    if group_size == 1:
        orders = (*_NEAR_ONE, *DEFAULT_ORDERS, *_LARGE)
        losses = [worst_case_loss(mechanism, a, steps=steps) for a in orders]
        return Curve(orders, tuple(losses))
    orders = tuple((1 + np.geomspace(0.05, 1000, 64) / group_size).tolist())
    losses = [
        group_worst_case_loss(mechanism, group_size, a, steps=steps) for a in orders
    ]
    return Curve(orders, tuple(losses))


def training_bounds(
    runs: Sequence[GradNormLedger], group_size: int, delta: float
) -> TrainingBounds:
    """Return the bounds on ε of any m examples of a recorded training run.

    Args:
        runs: Recorded runs of it, as ``runs_of`` returns them.
        group_size: m, at least 1.
        delta: δ in (0, 1).

    Returns:
        The bounds, for both directions; ``inf`` without clipping.
    """
    mechanism, steps = joint_mechanism(runs), runs[0].steps
    curve = worst_case_curve(mechanism, group_size, steps=steps)
    converted = float(rdp_to_epsilon(curve.divergences, curve.orders, delta))
    if group_size > 1:
        return TrainingBounds(converted, math.inf)
    return TrainingBounds(converted, composed_worst_case(mechanism, delta, steps=steps))


def training_epsilon(
    runs: Sequence[GradNormLedger], group_size: int, delta: float
) -> float:
    """Return the smallest of ``training_bounds``, which takes the same arguments."""
    return training_bounds(runs, group_size, delta).least


def training_assumptions(runs: Sequence[GradNormLedger]) -> tuple[Assumption, ...]:
    """Return the assumptions of ``training_epsilon``, met or not.

    Args:
        runs: Recorded runs of one training procedure, at least one.
    """
    return (
        noise_added(runs),
        every_gradient_clipped(runs),
        sampling_known(runs),
        *declarations(runs),
    )


def noise_added(runs: Sequence[GradNormLedger]) -> Assumption:
    """Return the assumption that training added the recorded noise to every update.

    An assumed noise does not count: the losses then rank the examples, but the training
    that was run has no finite divergence.

    Args:
        runs: Recorded runs of one training procedure, maybe none.
    """
    statement = "training added noise to every update"
    if not runs:
        return observed(statement, "no ledger", met=False)
    mechanism = runs[0].mechanism
    noise, assumed = float(np.min(mechanism.noise_std)), mechanism.assumed_noise
    evidence = (
        f"assumed noise_std={noise:g} on the sum: with_noise_std set it, or the clip "
        "norm was adapted to the data"
        if assumed
        else f"recorded noise_std={noise:g} on the sum"
    )
    return observed(statement, evidence, met=noise > 0 and not assumed)


def every_gradient_clipped(runs: Sequence[GradNormLedger]) -> Assumption:
    """Return the assumption that a clip norm bounds every gradient.

    Args:
        runs: Recorded runs of one training procedure, at least one.
    """
    clip = float(np.max(runs[0].mechanism.max_grad_norm))
    return observed(
        "every gradient was clipped", f"max_grad_norm={clip:g}", met=math.isfinite(clip)
    )


def sampling_known(runs: Sequence[GradNormLedger]) -> Assumption:
    """Return the assumption that batches were sampled as the bound takes them.

    Args:
        runs: Recorded runs of one training procedure, at least one.
    """
    mechanism = joint_mechanism(runs)
    statement = "batches were sampled independently of the data"
    if mechanism.sampling == "poisson":
        return derived(statement, "recorded as Poisson sampling")
    most = mechanism.max_participations
    how_often = (
        "every example at most once an epoch"
        if most is None
        else f"no example in more than {most} updates, as counted"
    )
    return derived(
        statement,
        f"recorded as fixed sampling, {how_often}; no amplification is used",
    )


def declarations(
    runs: Sequence[GradNormLedger],
) -> tuple[Assumption, ...]:
    """Return the assumptions of a bound on a training run that must be declared.

    Args:
        runs: Recorded runs of one training procedure, at least one.

    Returns:
        Declared assumptions, one for each link of custody that was not checked among
        them. The randomness is observed if it is known to be secure, and left out if
        no noise was drawn.
    """
    noise = (unpredictable_noise(runs),) if noise_added(runs).met else ()
    return (
        *unchecked_links(runs),
        Assumption(_SETTINGS, True, _CANNOT_SEE),
        Assumption(_NOTHING_ELSE, True, _CANNOT_SEE),
        item_is_the_unit(),
        *noise,
    )


def item_is_the_unit() -> Assumption:
    """Return the assumption that an item of the data set is what is protected.

    Every certificate lists it: a person whose data are in several items is protected
    only if all of these are removed together.
    """
    return Assumption(_OWN_ITEM, True, _CANNOT_SEE)


def unpredictable_noise(
    runs: Sequence[GradNormLedger], *, has_more_noise: bool = False
) -> Assumption:
    """Return the assumption that nobody can compute the noise of a training run.

    It is observed if a secure generator drew all of it. Noise of a pseudo-random
    generator follows from its seed; that the seed stays secret can only be declared.

    Args:
        runs: Recorded runs of one training procedure, at least one.
        has_more_noise: Whether a part of the training was run again, with the noise of
            a pseudo-random generator.
    """
    kind = weakest(*(run.noise_generator for run in runs))
    if kind is None:
        why = "the ledger does not say which random generator drew it"
        return Assumption(_UNPREDICTABLE, True, why)
    if kind == SECURE and not has_more_noise:
        return observed(_UNPREDICTABLE, f"it was drawn from {NOISE_GENERATORS[kind]}")
    drawn = "a pseudo-random generator" if kind == SECURE else NOISE_GENERATORS[kind]
    where = "the noise of the updates that are made again" if kind == SECURE else "it"
    return Assumption(
        _UNPREDICTABLE,
        True,
        f"{where} was drawn from {drawn}: you declare that the seed stays secret",
    )
