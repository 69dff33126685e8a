"""Bounds for noisy fine-tuning on the retain set, each with its assumptions.

**Idea.** Unlearning runs w ← Π(w − η∇f(w) + N(0, s·I)) on the retain set, starting from
the model trained on all data. Imagine the same steps applied to the retrained model:
they contract the divergence between the two distributions (``contraction``). Every
statement here is about one direction,

    D_α(unlearned ‖ retrained);

``symmetric_bound`` joins it with the other one. What "retrained" means is part of the
statement:

* ``steps_to_unlearn``: retraining for T + k steps, as many as the unlearned model has
  had in total (the same kernel moves both distributions, so no further term remains);
* ``steps_to_rewind``: retraining for exactly T steps, because unlearning starts from
  the checkpoint after T − k of them.

**Guarantee.** A bound if the listed assumptions hold and the divergence that is passed
in is a bound. A divergence estimated from one run gives an estimate.

**What breaks it.** A log-Sobolev constant of the wrong distribution (it must be that of
the retrained model), constants that do not hold on the whole domain, or random batches
(allowed only in the ``"dobrushin"`` form).

Source: the paper, Corollaries 4.1 and 4.4, with the contraction of docs/theory.md,
Sections 6 to 8, in place of theirs.

>>> constants = LangevinConstants(
...     learning_rate=0.5, noise_variance=9e-4, smoothness=0.26, strong_convexity=0.01
... )
>>> bound = steps_to_unlearn(2.5, 4.0, 0.01, constants, initial_lsi=0.05)
>>> bound.num_steps, bound.form
(630, 'hypercontractive')
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, in_range, numbers, positive
from opacus_pi.accounting.langevin.constants import LangevinConstants
from opacus_pi.accounting.langevin.contraction import (
    Divergence,
    dobrushin_bound,
    first_step,
    hypercontractive_bound,
    source_bound,
)
from opacus_pi.accounting.langevin.lsi import log_growth

FORMS = ("hypercontractive", "source", "dobrushin")
_SAME_STEPS = "retraining for as many steps as the unlearned model had in total"
_TARGET = "Noise brings a divergence close to 0, never to 0: choose a small target."
_REWOUND = "retraining for the steps of the original training"


@dataclass(frozen=True)
class UnlearningBound:
    """A bound on D_α(unlearned ‖ retrained), with its assumptions.

    Attributes:
        divergence: The bound after ``num_steps``, in nats.
        order: Rényi order α.
        num_steps: k; ``inf`` when no number of steps within the limit was enough.
        form: The argument that proves it: "hypercontractive", "source", "dobrushin" or
            "symmetric".
        against: What "retrained" means.
        assumptions: Conditions, one sentence each. The number is a bound if they hold
            and the divergence that was passed in is one.
    """

    divergence: float
    order: float
    num_steps: float
    form: str
    against: str
    assumptions: tuple[str, ...]


def unlearning_divergence(
    divergence: Divergence,
    order: float,
    num_steps: int,
    constants: LangevinConstants,
    *,
    initial_lsi: float = math.inf,
    form: str = "best",
) -> UnlearningBound:
    """Return a bound on D_α(unlearned ‖ retrained) after k noisy steps.

    Args:
        divergence: Bound on D(trained ‖ trained without the forget set) where
            unlearning starts: at ``order``, or a function of the order, accepting
            orders down to 1. A function gives much smaller bounds.
        order: Rényi order α > 1.
        num_steps: k.
        constants: The process on the retain set.
        initial_lsi: Log-Sobolev constant (LSI) of the distribution of the **retrained**
            model where unlearning starts: the last entry of ``lsi_track`` over its
            training; ``inf`` if unknown.
        form: ``"hypercontractive"``, ``"source"`` (D·G^(−1/α)), ``"dobrushin"``, or
            ``"best"``, the smallest.

    Returns:
        The bound against retraining for T + k steps, with its assumptions.

    Raises:
        ValueError: If an argument is outside its domain.

    Source: docs/theory.md, Sections 6 to 8; the paper, Corollary 4.1.
    """
    evaluate = _evaluator(divergence, order, constants, initial_lsi)
    return _best(evaluate, order, num_steps, constants, _forms(form), _SAME_STEPS)


def steps_to_unlearn(
    divergence: Divergence,
    order: float,
    target: float,
    constants: LangevinConstants,
    *,
    initial_lsi: float = math.inf,
    form: str = "best",
    max_num_steps: int = 1_000_000,
) -> UnlearningBound:
    """Compute the fewest noisy steps k until D_α(unlearned ‖ retrained) ≤ target.

    Args:
        divergence: As in ``unlearning_divergence``.
        order: Rényi order α > 1.
        target: The divergence to reach, above 0, in nats.
        constants: The process on the retain set.
        initial_lsi: As in ``unlearning_divergence``.
        form: As in ``unlearning_divergence``.
        max_num_steps: Largest k tried.

    Returns:
        A bound whose ``num_steps`` is the smallest k; ``inf`` if no k up to
        ``max_num_steps`` is enough.

    Raises:
        ValueError: If an argument is outside its domain.

    Source: docs/theory.md, Sections 6 to 8; the paper, Corollary 4.4.
    """
    positive(target=target, remedy=_TARGET)
    evaluate = _evaluator(divergence, order, constants, initial_lsi)

    def enough(name: str, k: int) -> bool:
        return evaluate(name, k) <= target

    found = {
        name: first_step(partial(enough, name), max_num_steps) for name in _forms(form)
    }
    num_steps = min(found.values())
    reached = num_steps < math.inf
    names = (
        tuple(f for f in found if found[f] == num_steps) if reached else tuple(found)
    )
    last = int(num_steps) if reached else max_num_steps
    bound = _best(evaluate, order, last, constants, names, _SAME_STEPS)
    return bound if reached else replace(bound, num_steps=math.inf)


def steps_to_rewind(
    divergence_after: Callable[[int, float], float],
    order: float,
    target: float,
    constants: LangevinConstants,
    lsi: ArrayLike | None = None,
    *,
    num_steps: int | None = None,
) -> UnlearningBound:
    """Compute the fewest of the T training steps to repeat without the forget set.

    Unlearning starts from the checkpoint after T − k steps and makes k steps on the
    retain set. The unlearned model has then had T steps, and is compared with
    retraining for exactly T steps: no stationarity is assumed. Without ``lsi`` nothing
    contracts and the bound is the divergence at the checkpoint itself. That holds for
    **any** optimiser and loss, since the remaining steps are the same post-processing
    of both distributions.

    Args:
        divergence_after: Function ``(t, order)`` → bound on D(trained ‖ trained without
            the forget set) after t steps; must not decrease in t.
        order: Rényi order α > 1.
        target: The divergence to reach, above 0, in nats.
        constants: The process on the retain set.
        lsi: ``(T + 1,)``, LSI constants of the **retrained** distribution from
            ``lsi_track``.
        num_steps: T; needed only without ``lsi``.

    Returns:
        A bound whose ``num_steps`` is the smallest k. T means training again from the
        start; ``inf`` means that even D at t = 0 exceeds the target.

    Raises:
        ValueError: If an argument is outside its domain, or T is not given.

    Source: docs/theory.md, Section 7.
    """
    positive(target=target, remedy=_TARGET)
    lsi = None if lsi is None else numbers("lsi", lsi)
    total = (num_steps or 0) if lsi is None else lsi.size - 1
    expect(
        total >= 1,
        "num_steps" if lsi is None else "lsi",
        num_steps if lsi is None else f"an array of shape {lsi.shape}",
        "must be at least 1" if lsi is None else "must have at least 2 entries",
        "Pass num_steps, the number of updates of training, or lsi with one more entry "
        "than updates.",
    )
    shared = {
        "lipschitz": constants.lipschitz,
        "noise_variance": constants.noise_variance,
    }

    def evaluate(_: str, k: int) -> float:
        start = total - k
        growth = 0.0 if lsi is None else log_growth(lsi[start:], **shared)[-1]
        return hypercontractive_bound(
            lambda a: divergence_after(start, a), order, float(growth)
        )

    num = first_step(lambda k: evaluate("", k) <= target, total)
    last = int(min(num, total))
    bound = _best(evaluate, order, last, constants, ("hypercontractive",), _REWOUND)
    return replace(bound, num_steps=num)


def symmetric_bound(
    forward: UnlearningBound, backward: UnlearningBound
) -> UnlearningBound:
    """Return a bound on both D_α(unlearned ‖ retrained) and D_α(retrained ‖ unlearned).

    Args:
        forward: The bound that the functions of this module return.
        backward: The same bound with the roles of the two models exchanged: the
            divergence of the other direction and the LSI constant of the **unlearned**
            distribution.

    Returns:
        The larger of the two, with the assumptions of both.

    Raises:
        ValueError: If their orders or numbers of steps differ.

    Source: docs/theory.md, Section 6.
    """
    expect(
        (forward.order, forward.num_steps) == (backward.order, backward.num_steps),
        "backward",
        f"order {backward.order}, {backward.num_steps} steps",
        f"must be at order {forward.order}, {forward.num_steps} steps",
        "Bound both directions at the same order and number of steps.",
    )
    larger = max(forward, backward, key=lambda bound: bound.divergence)
    joined = dict.fromkeys((*forward.assumptions, *backward.assumptions))
    return replace(larger, form="symmetric", assumptions=tuple(joined))


_Evaluate = Callable[[str, int], float]


def _evaluator(
    divergence: Divergence,
    order: float,
    constants: LangevinConstants,
    initial_lsi: float,
) -> _Evaluate:
    """Return the bound as a function of form and number of steps.

    The growth is tracked once and extended when more steps are asked for.
    """
    positive(
        initial_lsi=initial_lsi,
        remedy=(
            "Pass the log-Sobolev constant of the retrained model's weights where "
            "unlearning starts, for example the last entry of lsi_track. It is 0 only "
            "for fixed weights, whose divergence from every other distribution is "
            "infinite."
        ),
    )
    tracked = np.zeros(1)

    def growth(num_steps: int) -> float:
        nonlocal tracked
        if num_steps >= tracked.size:
            tracked = constants.log_growth(initial_lsi, max(num_steps, 64))
        return float(tracked[num_steps])

    def evaluate(form: str, num_steps: int) -> float:
        if form == "dobrushin":
            shrink = num_steps * constants.log_dobrushin if num_steps else 0.0
            return dobrushin_bound(divergence, order, shrink)
        contract = source_bound if form == "source" else hypercontractive_bound
        return contract(divergence, order, growth(num_steps))

    return evaluate


def _best(
    evaluate: _Evaluate,
    order: float,
    num_steps: int,
    constants: LangevinConstants,
    forms: Sequence[str],
    against: str,
) -> UnlearningBound:
    """Return the smallest of the forms' bounds."""
    in_range(0, math.inf, num_steps=num_steps, remedy="Pass the number of steps.")
    values = {form: evaluate(form, num_steps) for form in forms}
    form = min(values, key=values.__getitem__)
    return UnlearningBound(
        values[form], order, num_steps, form, against, _assumptions(form, constants)
    )


def _assumptions(form: str, constants: LangevinConstants) -> tuple[str, ...]:
    """Return the assumptions of a form, one sentence each."""
    shared = (
        "the divergence before unlearning is an upper bound",
        "unlearning and retraining apply the same steps on the retain set, each adding "
        f"N(0, {constants.noise_variance:g} I) to the weights",
    )
    if form == "dobrushin":
        return (
            *shared,
            f"the mean of every step lies in a ball of radius {constants.map_radius:g}",
        )
    return (
        *shared,
        "each step is one fixed map: full-batch, or batches on a schedule that does "
        "not depend on the data",
        f"the gradient map is {constants.lipschitz:g}-Lipschitz on the whole domain",
        "where unlearning starts, the weights of the retrained model have the "
        "log-Sobolev constant that was passed",
    )


def _forms(form: str) -> tuple[str, ...]:
    """Return the forms to evaluate; "source" never beats "hypercontractive"."""
    expect(
        form in (*FORMS, "best"),
        "form",
        repr(form),
        f"must be one of {', '.join((*FORMS, 'best'))}",
        'Try "best", the smallest of the bounds.',
    )
    return ("hypercontractive", "dobrushin") if form == "best" else (form,)
