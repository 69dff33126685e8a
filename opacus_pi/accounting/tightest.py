"""The smallest of several bounds, and Hölder's p chosen on runs set aside for it.

**Idea.** The smallest of several bounds is a bound, if the parameters of each were
chosen before looking at the data. A parameter may also be chosen on separate runs.

**Guarantee.** None beyond that of ``privacy_losses``: values are estimates, because
expectations are means over a few runs. Choosing as described here adds no further bias.

**What breaks it.** A parameter chosen on the very runs that are then averaged makes the
average too small. With one run the best p would be infinite, which gives the plain sum
of its losses, and that can be below the divergence. Single runs are therefore refused.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from opacus_pi._validate import expect
from opacus_pi.accounting.losses import Ledgers, privacy_losses
from opacus_pi.accounting.trajectory import trajectory_losses
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger, runs_of

Array = NDArray[np.float64]

KAPPAS = (1.25, 1.5, 2.0, 4.0, 8.0)
_P_PER_STEP = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)


def tightest_losses(
    ledgers: Ledgers,
    order: float,
    *,
    kappas: Sequence[float] = KAPPAS,
    rule: str = "right",
    mode: str = "exact",
) -> Array:
    """Return the smallest of three losses: Hölder's form, trajectory form, worst case.

    Hölder's form is ``privacy_losses`` with p = 3·num_steps; the trajectory form is
    ``trajectory_losses`` with each κ of the list. With exact expectations each of them
    is a bound, because its parameter is fixed before the data are seen, so the smallest
    is a bound too.

    Args:
        ledgers: Two or more independent runs of the same training procedure.
        order: Rényi order, above 1.
        kappas: κ values of the trajectory form, each above 1, finite and fixed
            beforehand.
        rule: As in ``privacy_losses``.
        mode: As in ``log_moment``.

    Returns:
        float64 ``(n,)``, in nats: an estimate like ``privacy_losses``, never above it.

    Raises:
        ValueError: As for ``privacy_losses``; or if there is a single run, for which
            the smallest value would be the plain sum of its losses.

    Source: docs/theory.md, Sections 2 and 3.
    """
    runs = _at_least_two_runs("ledgers", ledgers)
    for kappa in kappas:
        _check_finite_parameter("kappas", kappa)
    forms = [privacy_losses(runs, order, rule=rule, mode=mode)]
    forms += [
        trajectory_losses(runs, order, kappa, rule=rule, mode=mode) for kappa in kappas
    ]
    least: NDArray[np.float64] = np.minimum.reduce(forms)
    return least


def choose_hoelder_p(
    pilots: Ledgers,
    ledgers: Ledgers,
    order: float,
    *,
    candidates: Sequence[float] | None = None,
    rule: str = "right",
    mode: str = "exact",
) -> float:
    """Return Hölder's p with the smallest mean loss on some runs, for use on others.

    ``privacy_losses(ledgers, order, hoelder_p=choose_hoelder_p(pilots, ledgers,
    order))`` is as good an estimate of a bound as with a p fixed beforehand, because
    the choice does not use the runs that are averaged.

    Args:
        pilots: Two or more independent runs, on which p is chosen.
        ledgers: The runs whose losses will be averaged with that p. They are only
            checked to be other runs of the same training procedure.
        order: Rényi order, above 1.
        candidates: The p to choose from, above 1 and finite. Default: num_steps times
            numbers from 1/4 to 100.
        rule: As in ``privacy_losses``.
        mode: As in ``log_moment``.

    Returns:
        One p for all examples.

    Raises:
        ValueError: As for ``privacy_losses``; or if there is a single pilot, or a pilot
            is also among the ledgers.

    Source: docs/theory.md, Section 2.
    """
    chosen_on = _at_least_two_runs("pilots", pilots)
    averaged = runs_of(ledgers)
    runs_of([*chosen_on, *averaged])
    shared = [
        i for i, a in enumerate(chosen_on) if any(_is_same_run(a, b) for b in averaged)
    ]
    expect(
        not shared,
        "pilots",
        f"runs {shared} that are also averaged",
        "must be runs that are not averaged",
        "Split the runs: choose p on some and average the others.",
    )
    num_steps = chosen_on[0].mechanism.num_steps
    if candidates is None:
        candidates = sorted({max(c * num_steps, 1.25) for c in _P_PER_STEP})
    for p in candidates:
        _check_finite_parameter("candidates", p)
    expect(
        len(candidates) > 0,
        "candidates",
        "[]",
        "must contain at least one p",
        "Pass None for the default list.",
    )
    losses = np.array(
        [
            privacy_losses(chosen_on, order, hoelder_p=p, rule=rule, mode=mode)
            for p in candidates
        ]
    )
    finite = np.isfinite(losses).all(axis=0)
    return float(candidates[int(losses[:, finite].sum(axis=1).argmin())])


def _at_least_two_runs(name: str, ledgers: Ledgers) -> tuple[GradNormLedger, ...]:
    """Return the runs, or raise ``ValueError`` for a single one."""
    runs = runs_of(ledgers)
    expect(
        len(runs) > 1,
        name,
        "one run",
        "must contain at least two runs",
        "Record another run. A single one does not show how losses vary between runs: "
        "its best parameter gives the plain sum of its losses, which does not estimate "
        "a bound.",
    )
    return runs


def _check_finite_parameter(name: str, value: float) -> None:
    """Raise ``ValueError`` for a parameter that is not in (1, ∞)."""
    expect(
        1 < value < math.inf,
        name,
        value,
        "must be in (1, inf)",
        "Pass finite numbers above 1. At infinity the result would be the largest "
        "loss of these runs, and the largest of a few runs may be below that of all "
        "possible runs.",
    )


def _is_same_run(a: GradNormLedger, b: GradNormLedger) -> bool:
    """Return whether two ledgers hold the same run."""
    return a is b or np.array_equal(a.grad_norms, b.grad_norms, equal_nan=True)
