"""Statement for one person about the privacy of their own examples.

A person may learn an estimate of the privacy loss of their own example, and a bound
that holds for any data. The statement lists what both rest on, and with whom each may
be shared.

>>> from opacus_pi.ledger.mechanism import NoisySGD
>>> mechanism = NoisySGD(100, sample_rate=0.1, noise_std=2.0, max_grad_norm=1.0)
>>> ledger = GradNormLedger(mechanism, steps=[100], grad_norms=[[0.1, 5.0]])
>>> statement = privacy_statement(ledger, [0], delta=1e-5)
>>> statement.epsilon < statement.worst_case
True
>>> privacy_statement(ledger, [0, 1], delta=1e-5, subject="Ann").epsilon is None
True
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from opacus_pi._printable import in_one_line
from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices
from opacus_pi.accounting.conversion import check_delta, large_delta
from opacus_pi.accounting.epsilon import epsilons
from opacus_pi.accounting.guarantee import Assumption, rounded_up
from opacus_pi.accounting.training_bound import (
    COMPOSITION,
    CONVERTED,
    TrainingBounds,
    noise_added,
    training_assumptions,
    training_bounds,
)
from opacus_pi.accounting.uncertainty import epsilon_limits_of_draws
from opacus_pi.ledger.grad_norm_ledger import (
    GradNormLedger,
    columns_of,
    runs_of,
)

_FORMAT = "opacus_pi.PrivacyStatement.v2"
_OWNER_ONLY = (
    "The estimate depends on the owner's own data: share it with the owner only. "
    "Showing it to the owner costs other people no privacy: besides the owner's data "
    "it uses only the model's updates, and the bounds of the other people cover the "
    "release of these updates (Yu et al. 2023, Theorem 3.2). Averages over people need "
    "noise before release."
)
_ACCOUNTANT = "the engine's accountant (get_epsilon)"
_GET_EPSILON = (
    " get_epsilon of an engine may be one of them, or a little smaller: a PRV "
    "accountant rounds in another way."
)
_PUBLIC = (
    "The bound does not depend on anyone's data and may be shared with anyone. It is "
    "about the model that this training left: a model that is computed from it and "
    "from data, as by unlearning, is a further release."
)


@dataclass(frozen=True)
class PrivacyStatement:
    """One person's privacy in one training run, with the assumptions it rests on.

    The statement is one-sided: with the examples in the training data every event has
    at most e^ε times the probability that it has without them, plus δ.

    Args:
        subject: The person or example it is about.
        num_rows: Number of training examples that belong to the person.
        delta: δ.
        epsilon: An estimate for these examples, at most ``worst_case``. **For their
            owner only.** None if no estimate can be given.
        worst_case: A bound on ε for any person with as many examples, the smallest that
            is known; ``inf`` if no bound can be given.
        assumptions: Assumptions of the worst case, met or not, with who established
            each.
        estimated_from: From what the estimate was computed, in words; empty if there is
            none.
        limit: Upper limit of ε at 95 % confidence, because only the updates that drew
            the example are known (``epsilon_limits``). Never above ``worst_case``, and
            equal to it if the draws give no smaller limit. **For its owner only.** None
            if no estimate is given, or it comes from swept norms or from several runs.
        num_examples: Number of examples in the ledger; 0 if it is not known.
        composed_worst_case: The bound by numerical composition of the updates; ``inf``
            if none can be given, or for several examples.
        converted_worst_case: The bound that is converted from Rényi divergences;
            ``inf`` if none can be given.
        is_accountants: Whether ``worst_case`` is the bound of the engine's accountant,
            which also limits the other values.
    """

    subject: str
    num_rows: int
    delta: float
    epsilon: float | None
    worst_case: float
    assumptions: tuple[Assumption, ...]
    estimated_from: str = ""
    limit: float | None = None
    num_examples: int = 0
    composed_worst_case: float = math.inf
    converted_worst_case: float = math.inf
    is_accountants: bool = False

    def limited(self, bound: float) -> "PrivacyStatement":
        """Return the statement with no number above an accountant's bound.

        Args:
            bound: A bound on ε for any one example; ``inf``: there is none. It says
                nothing about several examples.
        """
        if self.num_rows > 1 or not bound < self.worst_case:
            return self

        def least(value: float | None) -> float | None:
            return None if value is None else min(value, bound)

        return replace(
            self,
            epsilon=least(self.epsilon),
            worst_case=bound,
            limit=least(self.limit),
            is_accountants=True,
        )

    @property
    def kind(self) -> str:
        """Kind of the worst case, computed from the numbers and assumptions.

        Returns:
            ``"certified if"``: a bound that holds if the declarations are true; there
            is always one: that nothing else was released. ``"estimate"``: only an
            estimate is given. ``"empirical"``: no number is given.
        """
        if math.isfinite(self.worst_case) and all(a.met for a in self.assumptions):
            return "certified if"
        return "empirical" if self.epsilon is None else "estimate"

    @property
    def sharing(self) -> str:
        """With whom each number may be shared; empty if there is no number."""
        parts = [] if self.epsilon is None else [_OWNER_ONLY]
        return " ".join(parts + ([_PUBLIC] if math.isfinite(self.worst_case) else []))

    def to_json(self) -> str:
        """Return the statement as JSON text.

        Returns:
            One line of JSON.
        """
        facts = {"format": _FORMAT, "kind": self.kind, **asdict(self)}
        facts["sharing"] = self.sharing
        for name in ("worst_case", "composed_worst_case", "converted_worst_case"):
            if math.isinf(facts[name]):
                facts[name] = "inf"
        return json.dumps(facts, ensure_ascii=False, allow_nan=False)

    def __str__(self) -> str:
        examples = f"{self.num_rows} training example{'s' * (self.num_rows != 1)}"
        lines = [
            f"Privacy statement for {in_one_line(self.subject)} ({examples}).",
            self._own(),
            self._anyone(),
            *filter(None, [large_delta(self.delta, self.num_examples)]),
            *([self.sharing] if self.sharing else []),
            *(f"  {a}" for a in self.assumptions if not a.met),
            *(f"  {a}" for a in self.assumptions if a.is_declared),
            *(f"  {a}" for a in self.assumptions if a.met and not a.is_declared),
        ]
        return "\n".join(lines)

    def _own(self) -> str:
        """Return the line about the person's own examples."""
        if self.epsilon is not None:
            return (
                f"For these data: ε ≈ {self.epsilon:.4g} at δ = {self.delta:g}, an "
                f"estimate, not a bound ({self.estimated_from}).{self._at_most()}"
            )
        if self.num_rows > 1:
            return (
                "For these data: no estimate. The values of single examples do not add "
                "up to a value for a person."
            )
        return "For these data: no estimate can be given."

    def _at_most(self) -> str:
        """Return the sentence about the limit of the estimate; empty if none."""
        if self.limit is None:
            return ""
        if self.limit >= self.worst_case:
            return (
                " In this run ε may be as large as the bound in the next line: the "
                "updates that drew the example give no smaller limit."
            )
        return (
            f" In this run ε is at most {rounded_up(self.limit)} with 95 % "
            "confidence, as measured and not proved. It is not known exactly, because "
            "the norms of the example are known only for the updates that drew it."
        )

    def _anyone(self) -> str:
        """Return the line about the worst case."""
        if math.isinf(self.worst_case):
            return "For any data: no bound can be given."
        return (
            f"For any data: ε ≤ {rounded_up(self.worst_case)} at δ = {self.delta:g}, "
            "certified if the declarations below hold. The probability of any event is "
            "then at most e^ε times that for a model trained without these examples, "
            f"plus δ. {self._methods()}"
        )

    def _methods(self) -> str:
        """Return which method gave the bound, and the larger ones of other methods."""
        ways = [
            (self.composed_worst_case, f"by {COMPOSITION}"),
            (self.converted_worst_case, CONVERTED),
        ]
        if self.is_accountants:
            ways.append((self.worst_case, f"by {_ACCOUNTANT}"))
        found: dict[str, str] = {}
        for bound, way in sorted(way for way in ways if math.isfinite(way[0])):
            found.setdefault(rounded_up(bound), way)
        (_, best), *others = found.items()
        if not others:
            return f"The bound is {best}."
        larger = "; ".join(f"ε ≤ {number}, {way}" for number, way in others)
        return (
            f"The bound is {best}. Other methods lose more: {larger}. All of these "
            "bounds hold, and the smallest counts."
            f"{'' if self.is_accountants else _GET_EPSILON}"
        )


def privacy_statement(
    ledger: GradNormLedger | Sequence[GradNormLedger],
    rows: ArrayLike,
    delta: float,
    *,
    subject: str | None = None,
) -> PrivacyStatement:
    """Return the privacy of one person's examples, as far as the ledger determines it.

    For one example: its own ε, estimated from its gradient norms, and beside it the
    worst case. For several examples: only the worst case of that many, because the sum
    of the examples' own losses is not a bound. No number is given without noise or with
    assumed noise, and no worst case without clipping.

    Args:
        ledger: The ledger of one run, or of several independent runs of one training
            procedure.
        rows: The person's positions in the training set, each once. Always a list: for
            one example ``[157]``.
        delta: δ in (0, 1).
        subject: Name of the person or example; by default the position.

    Returns:
        The statement; its ``sharing`` says how sensitive it is.

    Raises:
        ValueError: If positions are repeated, out of range or not in the ledger, or
            ``delta`` is not in (0, 1).
        AccountingError: If a link of the chain of custody is broken.

    Source: Yu et al. 2023 (arXiv:2206.02617), Section 3; paper, Definition 4.2.
    """
    check_delta(delta)
    runs = runs_of(ledger)
    mine = distinct_indices("rows", rows, np.iinfo(np.int64).max)
    columns = columns_of(runs[0], mine, "rows")
    single, noisy = len(mine) == 1, noise_added(runs)
    epsilon, limit = None, None
    if noisy.met and single:
        own = [run.subset(columns) for run in runs]
        value = float(epsilons(own, delta)[0])
        epsilon = value if math.isfinite(value) else None
        if epsilon is not None and len(own) == 1 and own[0].source == "observed":
            at_most = float(epsilon_limits_of_draws(own[0], delta)[0])
            limit = max(at_most, epsilon) if math.isfinite(at_most) else None
    bounds = TrainingBounds(math.inf, math.inf)
    if noisy.met:
        bounds = training_bounds(runs, len(mine), delta)
    worst = bounds.least
    if epsilon is not None:  # it is converted, which gives a little more
        epsilon = min(epsilon, worst)
    if limit is not None:
        limit = min(limit, worst)
    return PrivacyStatement(
        f"example {mine[0]}" if subject is None and single else subject or "one person",
        len(mine),
        float(delta),
        epsilon,
        worst,
        training_assumptions(runs),
        "" if epsilon is None else _estimated_from(runs, columns),
        limit,
        runs[0].num_examples,
        bounds.composed,
        bounds.converted,
    )


def _estimated_from(runs: Sequence[GradNormLedger], columns: NDArray[np.int64]) -> str:
    """Say what stands for all runs and updates in the estimate.

    Args:
        runs: The ledgers.
        columns: The column of the example.
    """
    number, rows = len(runs), runs[0].num_rows
    known = any(np.isfinite(run.grad_norms[:, columns]).any() for run in runs)
    return (
        f"from {number} run{'s' * (number > 1)}, with norms recorded at {rows} "
        f"update{'s' * (rows > 1)}"
    ) + ("" if known else "; no update drew this example, so norms of others stand in")
