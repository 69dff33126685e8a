"""Divergence from training without a whole group, from its Gram matrices.

**Idea.** Removing a group removes its clipped gradients from every batch. If the rest
of the batch is the same in both training runs, only the inner products of the group's
own gradients matter (the Gram matrix). Updates are composed as for single examples
(``composition``); the order is not multiplied by the group's size.

Methods:
* ``"coupled"`` (default): the group's own gradients in the same batch of the rest;
  0 for an empty group, the single example's loss for one example. It is never above the
  next two, which are exact at real orders and replace it where they are lower.
* ``"scalar"``, ``"operator_norm"``: deterministic upper bounds on it, for large groups.
* ``"theorem_b1"``: Theorem B.1 of the paper with its composition as printed. It
  compares with one minibatch of the retain set. Minibatch noise alone therefore gives a
  large value, even for an empty group. For reproduction only.

**Guarantee.** Estimates of a bound: expectations over runs and updates are replaced by
the runs and rows given. At one row, "scalar" and "operator_norm" are bounds, and so is
"coupled" while it enumerates all subsets. For larger groups "coupled" samples subsets,
and then its expectation is too low (a few rare subsets dominate the sum); a warning
says when. A Rényi divergence never falls when the order rises. Sampled divergences of
one update may, and are therefore replaced by the largest one up to their order.

**What breaks it.** Sampling other than Poisson, which is refused: these bounds average
over independent participation.

>>> from opacus_pi.ledger.mechanism import NoisySGD
>>> mechanism = NoisySGD(10, sample_rate=1.0, noise_std=1.0)
>>> ledger = GramLedger(mechanism, steps=[10], grams=[[[0.01, 0.0], [0.0, 0.01]]])
>>> round(group_divergence(ledger, 2.0, hoelder_p=1e9), 6)  # 10·2·‖g_x + g_y‖²/2
0.2

Source: paper, Theorem B.1 and Appendix B.1; docs/theory.md, Section 4.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from opacus_pi._types import ArrayLike
from opacus_pi._validate import expect, numbers, require
from opacus_pi.accounting.composition import (
    corrected_order,
    default_hoelder_p,
    linear_weights,
    log_order_growth,
    mean_over_runs,
    printed_order,
)
from opacus_pi.accounting.conversion import check_above_one
from opacus_pi.accounting.group.gaussian_mixture import (
    mixture_log_moments,
    operator_norm_law,
    scalar_law,
)
from opacus_pi.accounting.group.moments import (
    MomentEstimate,
    coupled_log_moment,
    pair_exponents,
)
from opacus_pi.accounting.group.worst_case import group_worst_case_loss
from opacus_pi.accounting.rules import (
    UpdateInterval,
    check_rule,
    intervals,
    loss_under_rule,
)
from opacus_pi.ledger.gram_ledger import GramLedger, scaled_gram

METHODS = ("coupled", "scalar", "operator_norm", "theorem_b1")
_UNRELIABLE = 0.01  # share of one sampled term above which a sum is not trusted
_CHORD_NODES = 5  # real orders evaluated across one interval

Moments = Callable[[NDArray[np.float64], float, NDArray[np.float64]], ArrayLike]


def group_divergence(
    gram_ledger: GramLedger | Sequence[GramLedger],
    order: float,
    *,
    method: str = "coupled",
    rule: str = "right",
    hoelder_p: float | None = None,
    num_samples: int = 20_000,
    generator: np.random.Generator | None = None,
) -> float:
    """Return the Rényi divergence of training with the group from training without it.

    Updates are composed by Hölder's inequality as in ``privacy_losses``. The value is
    never above ``group_worst_case_loss``. Between the orders that are evaluated, the
    log moment is interpolated linearly. This is never too low, because the log moment
    is convex in the order.

    Args:
        gram_ledger: One run, or independent runs of one training procedure, of kind
            ``"forget"``; for ``"theorem_b1"`` one run of kind ``"minibatch"``.
        order: Rényi order α > 1.
        method: ``"coupled"``, ``"scalar"``, ``"operator_norm"`` or ``"theorem_b1"``,
            explained in the module. ``"coupled"`` is exact for small groups and
            otherwise a Monte Carlo **estimate** that is biased low. It does not fall
            when the order rises: a sampled divergence of one update is at least that
            of each lower integer order (with the default ``generator``, also between
            calls).
        rule: Which row is used for the updates between two rows, as in
            ``privacy_losses``: right, left, trapezoid or max.
        hoelder_p: p > 1, fixed beforehand; default 3T.
        num_samples: Number of tuples that Monte Carlo samples at each row and order.
        generator: Source of randomness for Monte Carlo; default: seed 0.

    Returns:
        D_α(with ‖ without) in nats. Like every value from rows of one run it is an
        estimate of a bound. For ``"theorem_b1"``: the mean of
        ``theorem_b1_estimates``.

    Raises:
        ValueError: If an argument is outside its domain, or the ledger is of the wrong
            kind or sampling.

    Warns:
        UserWarning: If one sampled term makes up more than 1 % of a Monte Carlo sum.

    Source: docs/theory.md, Section 4; for ``"theorem_b1"`` the paper, Theorem B.1.
    """
    check_rule(rule)
    _check(order, method)
    if method == "theorem_b1":
        ledger = _runs(gram_ledger, "minibatch")[0]
        return float(theorem_b1_estimates(ledger, order, hoelder_p=hoelder_p).mean())
    runs = _runs(gram_ledger, "forget")
    p = _hoelder_p(hoelder_p, runs[0].mechanism.num_steps)
    shares: list[float] = []
    moments: dict[str, Moments] = {
        "coupled": _coupled(num_samples, generator, shares),
        "scalar": _scalar,
        "operator_norm": _operator_norm,
    }
    if method != "coupled":
        moments = {method: moments[method]}
    totals = {
        name: _compose(runs, order, p, rule, of_method, whole=name == "coupled")
        for name, of_method in moments.items()
    }
    total = min(*totals.values(), _worst_case(runs[0], order))
    if total == totals.get("coupled") and max(shares, default=0.0) > _UNRELIABLE:
        warnings.warn(
            f"The group's divergence at order {order:g} is unreliable and probably too "
            f"low: one of the {num_samples} terms that were sampled to estimate it "
            f"makes up {max(shares):.0%} of their sum. Use method='scalar' or "
            "'operator_norm' for an upper bound, or increase num_samples.",
            stacklevel=2,
        )
    return total


def theorem_b1_estimates(
    gram_ledger: GramLedger, order: float, *, hoelder_p: float | None = None
) -> NDArray[np.float64]:
    r"""Return Theorem B.1 as the paper prints it, for each minibatch of the retain set.

    :math:`\sum_i C_{s_i}\, p \ln \hat G(s_i)\,(s_i - s_{i-1})`, where Ĝ is the mean of
    exp(−Δ/2σ²) over tuples of ⌈o_p^s(α)⌉ distinct minibatches and
    −Δ/2 = Σ_{i<j}⟨U_i − U', U_j − U'⟩. U_i is the sum of the clipped gradients of
    minibatch i, and U' that of the minibatch of the retain set. At the row at update s,
    C_s is the paper's coefficient and o_p^s(α) its order (``printed_order``).

    Args:
        gram_ledger: Of kind ``"minibatch"``, Gram matrices ``(N, R, J, J)``: N rows, R
            minibatches of the retain set, J minibatches of the whole data set. The
            paper has R = 20 and J equal to the order; a larger J is cut into disjoint
            tuples. σ is the ``noise_std`` of its mechanism.
        order: Rényi order α > 1.
        hoelder_p: p; default 3T, for T updates.

    Returns:
        float64 ``(R,)``. Estimates of the printed formula, not bounds; report their
        mean and spread. An estimate may be negative.

    Raises:
        ValueError: If there are fewer minibatches than the order at the last row.

    Source: paper, Theorem B.1 and Appendix B.1.
    """
    ledger = _runs(gram_ledger, "minibatch")[0]
    _check(order, "theorem_b1")
    p = _hoelder_p(hoelder_p, ledger.mechanism.num_steps)
    orders = np.ceil(printed_order(order, p, ledger.steps)).astype(int)
    available = ledger.grams.shape[-1]
    expect(
        int(orders.max()) <= available,
        "gram_ledger",
        available,
        f"must have at least {orders.max()} minibatches, because the order at the last "
        f"row is {orders.max()}",
        f"Pass num_minibatches={orders.max()} or more to gram_ledger.",
    )
    widths = np.diff(ledger.steps, prepend=0)
    coefficients = (p - 1) * np.exp(-log_order_growth(p) * ledger.steps) / (order - 1)
    total = np.zeros(ledger.grams.shape[1])
    for grams, size, factor in zip(
        ledger.scaled(), orders, coefficients * widths, strict=True
    ):
        tuples = np.arange(available // size * size).reshape(-1, size)
        exponents = np.array([pair_exponents(gram, tuples) for gram in grams])
        total += factor * (logsumexp(exponents, axis=1) - math.log(len(tuples)))
    return total


def _compose(
    runs: tuple[GramLedger, ...],
    order: float,
    p: float,
    rule: str,
    moments: Moments,
    *,
    whole: bool,
) -> float:
    """Compose the group's log moments over all updates by Hölder's inequality.

    ``whole`` says that the moments are defined at integer orders only.
    """
    mechanism = runs[0].mechanism

    def loss(interval: UpdateInterval, row: int) -> NDArray[np.float64]:
        total = mechanism.num_steps
        remaining = (total - interval.last, total - interval.first)
        visited = corrected_order(order, p, np.array(remaining))
        facts = mechanism.at_row(interval.right)
        rate = float(facts.sample_rate)
        nodes = _nodes(visited, whole and rate < 1)
        grams = [scaled_gram(run.grams[row], facts) for run in runs]
        values = np.array([moments(K, rate, nodes) for K in grams]).T
        means = mean_over_runs(values[:, :, None], p)[:, 0]
        return np.asarray(linear_weights(order, p, remaining, nodes) @ means)

    parts = [
        loss_under_rule(loss, interval, rule)
        for interval in intervals(runs[0].steps, mechanism.num_steps)
    ]
    return float(sum(parts))


def _nodes(visited: NDArray[np.float64], whole: bool) -> NDArray[np.float64]:
    """Return the orders to evaluate: integers, or a few real ones across the range."""
    low, high = float(visited.min()), float(visited.max())
    if whole:
        return np.arange(math.floor(low), math.ceil(high) + 1, dtype=np.float64)
    return np.linspace(low, high, _CHORD_NODES) if high > low else np.array([low])


def _coupled(
    num_samples: int, generator: np.random.Generator | None, shares: list[float]
) -> Moments:
    """Return the coupled moments as a function; it appends the sums' largest shares."""

    def at(K: NDArray[np.float64], rate: float, order: float) -> MomentEstimate:
        found = coupled_log_moment(
            K, rate, order, num_samples=num_samples, generator=generator
        )
        shares.append(found.largest_share)
        return found

    def moments(
        K: NDArray[np.float64], rate: float, orders: NDArray[np.float64]
    ) -> ArrayLike:
        *lower, last = orders
        largest = at(K, rate, last)
        if math.isinf(largest.effective_size):  # exact, and so are all lower orders
            return [
                *(at(K, rate, order).log_moment for order in lower),
                largest.log_moment,
            ]
        below = np.arange(2, last)
        values = [at(K, rate, order).log_moment for order in below]
        found = _never_falling([*values, largest.log_moment], [*below, last])
        return np.asarray(np.interp(orders, [1.0, *below, last], [0.0, *found]))

    return moments


def _never_falling(log_moments: ArrayLike, orders: ArrayLike) -> NDArray[np.float64]:
    """Raise estimates whose divergence is below that of a lower order.

    Args:
        log_moments: Estimates in nats, ``(K,)``.
        orders: Their orders, above 1, ascending, ``(K,)``.

    Returns:
        The log moments of the running maximum of the divergences, ``(K,)``; none is
        below its estimate.
    """
    values, above_one = numbers("log_moments", log_moments), numbers("orders", orders)
    above_one = above_one - 1
    highest = np.maximum.accumulate(values / above_one)
    return np.maximum(values, highest * above_one)


def _worst_case(run: GramLedger, order: float) -> float:
    """Return the bound for any group of this size; infinite without clipping."""
    size = run.grams.shape[-1]
    if size == 0:
        return 0.0
    return group_worst_case_loss(run.mechanism, size, order, steps=run.steps)


def _scalar(
    K: NDArray[np.float64], rate: float, orders: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the log moments with all gradients taken as parallel."""
    return mixture_log_moments(*scalar_law(np.sqrt(np.diag(K)), rate), orders)


def _operator_norm(
    K: NDArray[np.float64], rate: float, orders: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the log moments with every sum of k gradients of length √(λ_max·k)."""
    if len(K) == 0:
        return np.zeros(len(orders))
    # The factor covers the rounding error of the eigenvalue.
    largest = max(0.0, float(np.linalg.eigvalsh(K)[-1])) * (1 + 1e-12)
    return mixture_log_moments(*operator_norm_law(largest, len(K), rate), orders)


def _hoelder_p(value: float | None, num_steps: int) -> float:
    """Return the p given, or 3T."""
    p = default_hoelder_p(num_steps) if value is None else float(value)
    check_above_one(hoelder_p=p, remedy="Try 3 times the number of updates.")
    return p


def _as_tuple(gram_ledger: GramLedger | Sequence[GramLedger]) -> tuple[GramLedger, ...]:
    """Return one or several ledgers as a tuple; refuse objects of other types."""
    runs = tuple(gram_ledger) if isinstance(gram_ledger, Sequence) else (gram_ledger,)
    for run in runs:
        expect(
            isinstance(run, GramLedger),
            "gram_ledger",
            type(run).__name__,
            "must be a GramLedger, or a list of them",
            "Make one with opacus_pi.recording.gram_ledger.",
        )
    return runs


def _runs(
    gram_ledger: GramLedger | Sequence[GramLedger], kind: str
) -> tuple[GramLedger, ...]:
    """Return one or several checked ledgers of the kind that a method needs."""
    runs = _as_tuple(gram_ledger)
    expect(
        len(runs) > 0,
        "gram_ledger",
        "[]",
        "must contain at least one run",
        "Pass a Gram ledger, or a list of them.",
    )
    for number, run in enumerate(runs):
        expect(
            len(run.steps) > 0,
            "gram_ledger",
            "0 rows",
            "must have at least one row",
            "Record at least one row.",
        )
        expect(
            run.kind == kind,
            "gram_ledger",
            f"kind {run.kind!r}",
            f"must be of kind {kind!r}",
            f"Make it with gram_ledger(..., kind={kind!r}), or pass this one to "
            f"group_divergence(..., method={_method_of(run.kind)!r}).",
        )
        expect(
            kind == "minibatch" or run.mechanism.sampling == "poisson",
            "sampling",
            repr(run.mechanism.sampling),
            'must be "poisson"',
            "These bounds average over independent participation, and the ledger does "
            "not say which examples shared a batch. Train with poisson_sampling=True, "
            "or use method='theorem_b1'.",
        )
        same = run.mechanism == runs[0].mechanism
        require(
            same and np.array_equal(run.steps, runs[0].steps),
            "The runs of gram_ledger must have the same mechanism and steps, but run "
            f"{number} differs from run 0.",
            "Average only independent runs of the same training.",
        )
    return runs


def _method_of(kind: str) -> str:
    """Return a method that accepts ledgers of a kind."""
    return "theorem_b1" if kind == "minibatch" else "coupled"


def _check(order: float, method: str) -> None:
    """Check the domain of order and method."""
    expect(1 < order < math.inf, "order", order, "must be in (1, inf)", "Try 8.")
    expect(
        method in METHODS,
        "method",
        repr(method),
        f"must be in {METHODS}",
        'Try "coupled", the default.',
    )
