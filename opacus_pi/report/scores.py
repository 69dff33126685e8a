"""The per-example numbers of a training run, and the statistics that describe them.

The single losses and epsilons are estimates, and only the worst case is a bound. If the
noise was assumed, the losses rank the examples and no ε is computed at all, so that it
cannot be quoted by mistake.

>>> from opacus_pi.accounting import NoisySGD
>>> mechanism = NoisySGD(100, sample_rate=0.1, noise_std=2.0, max_grad_norm=1.0)
>>> ledger = GradNormLedger(mechanism, steps=[100], grad_norms=[[0.1, 5.0, 0.4]])
>>> scores = score(ledger, order=8, delta=1e-5)
>>> [row["id"] for row in scores.hardest(2)]
[1, 2]
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from opacus_pi._frames import frame
from opacus_pi._quiet import quiet
from opacus_pi._shown import Shown
from opacus_pi._validate import positive
from opacus_pi.accounting import (
    GradNormLedger,
    privacy_losses,
    worst_case_loss,
)
from opacus_pi.accounting.assumed_noise import has_assumed_noise
from opacus_pi.accounting.conversion import check_delta, large_delta
from opacus_pi.accounting.epsilon import default_tolerance, losses_and_epsilons
from opacus_pi.accounting.guarantee import Assumption, rounded_up
from opacus_pi.accounting.tied_losses import TiedLosses, tied_losses
from opacus_pi.accounting.training_bound import (
    TrainingBounds,
    training_assumptions,
    training_bounds,
)
from opacus_pi.accounting.uncertainty import epsilon_limits_of_draws
from opacus_pi.difficulty.forget_sets import (
    difficulty_strata,
    num_at_top,
    ranking,
    ties,
)
from opacus_pi.ledger.custody import Link, unchecked_in
from opacus_pi.ledger.grad_norm_ledger import runs_of

if TYPE_CHECKING:
    import pandas as pd

SENSITIVE = (
    "Sensitive: these numbers reveal which examples are unusual. Protect them like the "
    "data itself, and show a value only to the person whose example it is."
)
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_ROUNDING = 1 - 1e-12  # losses that differ by less are equal
_STRATUM_DIVISOR = 50  # a stratum is 1/50 of the examples: the paper's 1,000 of 50,000


@dataclass(frozen=True, repr=False)
class Scores(Shown):
    """Privacy loss and ε of every example of a recorded training run.

    Args:
        order: Rényi order of the losses.
        delta: δ of the epsilons.
        ids: int64 ``(n,)``, positions in the data set.
        losses: float64 ``(n,)``, in nats.
        epsilons: float64 ``(n,)``; None if the losses only rank the examples, because
            the noise was assumed.
        worst_case_loss: Bound on the loss of any example, in nats; ``inf`` if there is
            none.
        worst_case_epsilon: Bound on the ε of any example, converted from Rényi
            divergences as the epsilons are; ``inf`` if there is none. The bound to be
            stated is ``least_worst_case``.
        assumptions: The assumptions of ε, met or not.
        unchecked_links: The links of the chain of custody that were not checked,
            although the numbers depend on them.
        tolerance: By how much losses and epsilons may be rounded up, relative.
        observed: The run whose draws limit the epsilons, an observed one; None: there
            is no such limit.
        composed_worst_case: The same by numerical composition, which loses less;
            ``inf`` if there is none.
        tied: Why losses equal the worst case, and at which order fewer do.
    """

    _note: ClassVar[str] = "sensitive: it shows which examples are unusual"

    order: float
    delta: float
    ids: NDArray[np.int64]
    losses: NDArray[np.float64]
    epsilons: NDArray[np.float64] | None
    worst_case_loss: float
    worst_case_epsilon: float
    assumptions: tuple[Assumption, ...]
    unchecked_links: tuple[Link, ...] = ()
    tolerance: float = 0.0
    observed: GradNormLedger | None = field(default=None, repr=False, compare=False)
    composed_worst_case: float = math.inf
    tied: TiedLosses = TiedLosses(0, 0)

    def _shown(self) -> dict[str, Any]:
        return {
            "num_examples": len(self.ids),
            "order": self.order,
            "delta": self.delta,
            "worst_case_loss": self.worst_case_loss,
            "worst_case_epsilon": self.worst_case_epsilon,
            "ranking_only": self.ranking_only,
        }

    def columns(self, *, with_limits: bool = False) -> dict[str, NDArray[Any]]:
        """Return the numbers of all examples by the name of their column.

        Args:
            with_limits: Whether to compute the limits of the epsilons, too. This takes
                a few times as long as the epsilons.

        Returns:
            ``example``, ``loss``, ``epsilon`` and ``limit``, ``(n,)`` each. ``epsilon``
            is missing if the losses are only a ranking, and ``limit`` if no example has
            one (``limits``); it is NaN for an example without one.
        """
        columns = {"example": self.ids, "loss": self.losses, "epsilon": self.epsilons}
        if with_limits:
            found = self.limits(np.arange(len(self.ids)))
            limits = np.array([np.nan if x is None else x for x in found])
            columns["limit"] = None if np.isnan(limits).all() else limits
        return {name: array for name, array in columns.items() if array is not None}

    def to_frame(self) -> "pd.DataFrame":
        """Return the numbers of all examples as a data frame of pandas.

        Returns:
            One line for each example, by its position in the data set, with ``loss``
            and, unless the losses are only a ranking, ``epsilon``. It is sensitive.

        Raises:
            ImportError: If pandas is not installed.
        """
        return frame(self.columns(), index="example")

    @property
    def least_worst_case(self) -> float:
        """The smallest bound that is known on the ε of any example; ``inf``: none."""
        return min(self.worst_case_epsilon, self.composed_worst_case)

    @property
    def ranking_only(self) -> bool:
        """Return whether the losses only rank examples and guarantee nothing."""
        return self.epsilons is None

    @property
    def large_delta(self) -> str:
        """Why δ is too large for the data set; empty if it is not, or there is no ε."""
        return "" if self.ranking_only else large_delta(self.delta, len(self.ids))

    @property
    def num_at_bound(self) -> int:
        """Return how many losses equal the worst case, up to rounding.

        These examples were clipped in every update, or their larger estimate was cut to
        the worst case. The loss cannot distinguish them. ``tied`` says how many have
        which cause, and what separates them.
        """
        return int(np.count_nonzero(self.losses >= self.worst_case_loss * _ROUNDING))

    @property
    def num_at_top(self) -> int:
        """Return the number of examples that share the largest loss, up to rounding."""
        return num_at_top(self.losses)

    def hardest(self, top: int) -> list[dict[str, Any]]:
        """Return id, loss and ε of the examples with the largest losses, hardest first.

        Equal losses are ordered by ε, and examples that are equal in both are in the
        random order of ``difficulty.ranking``, so that the list does not reproduce the
        order of the data set.

        Args:
            top: Number of examples, at least 0.
        """
        places = ranking(self.losses)[::-1]
        if self.epsilons is not None:
            levels = ties(self.epsilons)[places], ties(self.losses)[places]
            places = places[np.lexsort([-level for level in levels])]
        return [
            {
                "id": int(self.ids[i]),
                "loss": float(self.losses[i]),
                "epsilon": None if self.epsilons is None else float(self.epsilons[i]),
                "limit": limit,
            }
            for i, limit in zip(places[:top], self.limits(places[:top]), strict=True)
        ]

    def limits(self, places: NDArray[np.int64]) -> list[float | None]:
        """Return upper limits of the epsilons of some examples, at 95 % confidence.

        Only the updates that drew an example are known, and other draws of the same
        training would have given another ε (``accounting.epsilon_limits``). A limit is
        never above the worst case.

        Args:
            places: Positions in ``losses``, possibly repeated.

        Returns:
            One limit for each place; None if there is none, or no need of one because
            the norms of all examples were swept.
        """
        if self.epsilons is None or self.observed is None or not len(places):
            return [None] * len(places)
        columns, where = np.unique(places, return_inverse=True)
        drawn = epsilon_limits_of_draws(self.observed.subset(columns), self.delta)
        highest = self.worst_case_epsilon
        found = np.minimum(np.maximum(drawn, self.epsilons[columns]), highest)[where]
        return [float(limit) if math.isfinite(limit) else None for limit in found]

    def strata(self) -> list[dict[str, Any]]:
        """Five sets of rising loss, each a fiftieth of the examples.

        They are the forget sets that the paper would form from these losses. A ledger
        of a single example has no strata.

        Returns:
            For each stratum its name and size, its smallest, mean and largest loss, and
            its mean ε, which is None if the losses are only a ranking.
        """
        if len(self.losses) < 2:
            return []
        size = max(1, len(self.losses) // _STRATUM_DIVISOR)
        with quiet():  # about ties, which change no number of the table
            sets = difficulty_strata(self.losses, size)
        return [self._stratum(name, places) for name, places in sets.items()]

    def quantiles(self) -> dict[str, Any]:
        """Return quantiles of loss and ε over the examples.

        Each is the value of an example, not interpolated between two: between two
        infinite losses an interpolation gives NaN.

        Returns:
            ``probability``, ``loss``, ``epsilon`` and ``limit``, one entry for each
            quantile. ``limit`` is that of the example with this ε, in ``limits``.
            ``epsilon`` and ``limit`` are None if the losses are only a ranking.
        """
        limits = None
        if self.epsilons is not None:
            ranks = np.arange(len(self.epsilons))
            at = np.quantile(ranks, _QUANTILES, method="lower")
            limits = self.limits(np.argsort(self.epsilons, kind="stable")[at])
        return {
            "probability": _QUANTILES,
            "loss": np.quantile(self.losses, _QUANTILES, method="lower"),
            "epsilon": None
            if self.epsilons is None
            else np.quantile(self.epsilons, _QUANTILES, method="lower"),
            "limit": limits,
        }

    def facts(self, top: int) -> dict[str, Any]:
        """Return everything except the list of all examples, to be written as JSON.

        Args:
            top: Number of hardest examples to list.
        """
        return {
            "sensitive": SENSITIVE,
            "num_examples": len(self.losses),
            "order": self.order,
            "delta": self.delta,
            "ranking_only": self.ranking_only,
            "tolerance": self.tolerance,
            "large_delta": self.large_delta,
            "worst_case_loss": self.worst_case_loss,
            "worst_case_epsilon": self.worst_case_epsilon,
            "composed_worst_case": self.composed_worst_case,
            "num_at_bound": self.num_at_bound,
            "num_at_top": self.num_at_top,
            "tied": asdict(self.tied),
            "quantiles": self.quantiles(),
            "hardest": self.hardest(top),
            "strata": self.strata(),
            "assumptions": self.assumptions,
        }

    def _stratum(self, name: str, places: NDArray[np.int64]) -> dict[str, Any]:
        """Return one row of the table of strata.

        Args:
            name: Name of the stratum.
            places: Positions of its examples in ``losses``.
        """
        own = self.epsilons
        return {
            "name": name,
            "size": len(places),
            "smallest_loss": self.losses[places].min(),
            "mean_loss": self.losses[places].mean(),
            "largest_loss": self.losses[places].max(),
            "mean_epsilon": None if own is None else own[places].mean(),
        }


def score(
    ledger: GradNormLedger | Sequence[GradNormLedger],
    *,
    order: float = 8.0,
    delta: float = 1e-5,
    tolerance: float | None = None,
) -> Scores:
    """Compute losses, epsilons and worst case of a recorded training run.

    Args:
        ledger: One run, or several independent runs of one training procedure.
        order: Rényi order of the losses, above 1.
        delta: δ of the epsilons, in (0, 1).
        tolerance: Largest relative error of a loss or ε, always upwards; 0 computes
            without rounding. Default: that of ``epsilons``, which is 1e-3 for a single
            run with more than 16,384 norms (rows times examples), else 0.

    Returns:
        The numbers, which are as sensitive as the ledger.

    Raises:
        ValueError: If an argument is outside its domain, if the ledger has no
            examples, or if it has no noise, not even an assumed one.
    """
    check_delta(delta)
    runs = list(runs_of(ledger))
    positive(
        num_examples=runs[0].num_examples, remedy="Pass a ledger that has examples."
    )
    ids = runs[0].example_ids
    ids = np.arange(runs[0].num_examples) if ids is None else ids
    if tolerance is None:
        tolerance = default_tolerance(runs)
    own: NDArray[np.float64] | None = None
    if has_assumed_noise(runs):
        losses = privacy_losses(runs, order, tolerance=tolerance)
    else:
        losses, own = losses_and_epsilons(runs, order, delta, tolerance=tolerance)
    assumptions = training_assumptions(runs)
    mechanism = runs[0].mechanism
    bounds = TrainingBounds(math.inf, math.inf)
    if assumptions[0].met:
        bounds = training_bounds(runs, 1, delta)
    return Scores(
        order=float(order),
        delta=float(delta),
        ids=ids,
        losses=losses,
        epsilons=own,
        worst_case_loss=math.inf
        if mechanism.assumed_noise
        else worst_case_loss(mechanism, order, steps=runs[0].steps),
        worst_case_epsilon=bounds.converted,
        composed_worst_case=bounds.composed,
        tied=tied_losses(runs, losses, order, tolerance=tolerance),
        assumptions=assumptions,
        tolerance=tolerance,
        unchecked_links=unchecked_in([run.custody for run in runs]),
        observed=runs[0] if len(runs) == 1 and runs[0].source == "observed" else None,
    )


def has_limits(facts: Mapping[str, Any]) -> bool:
    """Return whether the draws give the example at any quantile of ε a limit.

    Args:
        facts: What ``Scores.facts`` returned.
    """
    limits = facts["quantiles"]["limit"] or ()
    return any(limit is not None for limit in limits)


def limit_in_words(limit: float | None) -> str:
    """Return a limit with four digits, rounded up; a dash if there is none."""
    return "–" if limit is None else rounded_up(limit)


def tie_sentence(facts: Mapping[str, Any]) -> str:
    """Say how many examples share the largest loss; empty if it is a single one.

    Args:
        facts: What ``Scores.facts`` returned.
    """
    tied = facts["num_at_top"]
    if tied < 2:
        return ""
    bound = ", which equals the worst case" if facts["num_at_bound"] else ""
    order = (
        "their order here is random"
        if facts["ranking_only"]
        else "here they are ordered by ε; ids of equal ε are in one line, in random "
        "order"
    )
    return (
        f"{tied} examples share the largest loss{bound}: the loss cannot distinguish "
        f"them, and {order}.{_causes(facts['tied'])}"
    )


def _causes(tied: Mapping[str, Any]) -> str:
    """Return why losses equal the worst case, and the remedies; empty if none does.

    Args:
        tied: The facts of a ``TiedLosses``.
    """
    num_clipped, num_cut = tied["num_clipped"], tied["num_cut"]
    parts = []
    if num_clipped:
        parts.append(
            f"{num_clipped} of them had gradients at or above the clip norm at every "
            "update for which their norm is known; training with a larger clip norm "
            "may distinguish these."
        )
    if num_cut:
        parts.append(
            f"For {num_cut} of them the estimate was above the worst case and was cut "
            "to it. This depends on the order, and needs no new training: "
            + _other_order(tied)
        )
    return "".join(f" {part}" for part in parts)


def _other_order(tied: Mapping[str, Any]) -> str:
    """Return the end of the sentence about another order.

    Args:
        tied: The facts of a ``TiedLosses`` with cut estimates.
    """
    if tied["other_order"] is None:
        return (
            "none of the other orders that were tried has clearly fewer ties; the "
            "plain sum over the updates (hoelder_p=inf in Python) may have fewer."
        )
    return (
        f"at order {tied['other_order']:g}, {tied['num_at_other']} examples have the "
        "worst case."
    )


def grouped(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of examples, with one row for those of equal loss, ε and limit.

    Numbers are equal if their first twelve digits are.

    Args:
        rows: Rows with ``id``, ``loss``, ``epsilon`` and, if there is one, ``limit``;
            equal ones beside each other.

    >>> rows = [{"id": i, "loss": min(i, 5), "epsilon": None} for i in range(9, 3, -1)]
    >>> [row["id"] for row in grouped(rows)]
    ['9, 8, 7, 6, 5', '4']
    """

    def digits(row: Mapping[str, Any]) -> list[str]:
        shown = (row["loss"], row["epsilon"], row.get("limit"))
        return ["" if number is None else f"{float(number):.12g}" for number in shown]

    groups = [[*group] for _, group in itertools.groupby(rows, key=digits)]
    return [
        {**group[0], "id": ", ".join(str(row["id"]) for row in group)}
        for group in groups
    ]
