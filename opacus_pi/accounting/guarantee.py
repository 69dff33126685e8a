"""What may be claimed after unlearning, with the assumptions that it needs.

A ``Guarantee`` joins a number (or none) with the assumptions it rests on. Its kind is
computed from them and cannot be passed in: a claim is "certified" only if every
assumption is met, and an unknown assumption counts as not met. What can break a
guarantee is therefore an assumption that is missing from the list.

>>> fixed = Assumption("The example was clipped", met=True, evidence="max_grad_norm=1")
>>> single = Assumption("The loss is an upper bound", met=False, evidence="one run")
>>> claim = Guarantee("Langevin", (fixed, single), orders=(2.0,), divergences=(0.5,))
>>> claim.kind
'estimate'
>>> Guarantee("FineTune", (fixed,)).kind
'empirical'

Bounds are written rounded up, so that the text never claims less than the number:

>>> rounded_up(1.23401), rounded_up(0.1), rounded_up(float("inf"))
('1.235', '0.1', 'inf')
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, Context
from typing import Any, cast

import numpy as np

from opacus_pi._validate import expect
from opacus_pi.accounting.conversion import (
    check_above_one,
    check_delta,
    rdp_to_epsilon,
)
from opacus_pi.ledger.custody import LINKS
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger

__all__ = ["Assumption", "Guarantee", "rounded_up", "unchecked_links"]

_FORMAT = "opacus_pi.Guarantee.v1"
_UNEDITED = "Pass the unedited text that Guarantee.to_json returned."


@dataclass(frozen=True)
class Assumption:
    """One condition that a claim needs.

    Args:
        statement: The condition, as a sentence.
        met: Whether it is known to hold; False if it is unknown.
        evidence: Why it is known to hold, or why not.

    Raises:
        ValueError: If ``met`` is not a bool.
    """

    statement: str
    met: bool
    evidence: str

    def __post_init__(self) -> None:
        expect(
            isinstance(self.met, bool),
            "met",
            repr(self.met),
            "must be True or False",
            "Pass False if it is not known.",
        )


@dataclass(frozen=True)
class Guarantee:
    """Bound or estimate of how far an unlearned model's law is from a retrained one's.

    ``divergences[i]`` bounds (or estimates) D_α(unlearned ‖ retrained) at
    α = ``orders[i]``. Every statement is one-sided:
    Pr[unlearned ∈ E] ≤ e^ε Pr[retrained ∈ E] + δ for every event E; the reverse
    inequality would need the divergence in the other direction.

    Args:
        method: What was run, in words.
        assumptions: Everything the number rests on, met or not.
        orders: Rényi orders, each above 1; empty if there is no number.
        divergences: One divergence per order, at least 0, in nats; ``inf`` if no
            divergence is known.

    Raises:
        ValueError: If orders and divergences have different lengths or are outside
            their domain.

    Source: Mironov 2017 (arXiv:1702.07476), Definition 4, for the divergence.
    """

    method: str
    assumptions: tuple[Assumption, ...]
    orders: tuple[float, ...] = ()
    divergences: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("orders", "divergences"):
            numbers = tuple(float(v) for v in getattr(self, name))
            object.__setattr__(self, name, numbers)
        object.__setattr__(self, "assumptions", tuple(self.assumptions))
        expect(
            len(self.orders) == len(self.divergences),
            "divergences",
            f"{len(self.divergences)} numbers",
            f"must be one per order ({len(self.orders)})",
            "Give one divergence for every order.",
        )
        check_above_one(
            orders=self.orders, remedy="A guarantee needs Rényi orders above 1."
        )
        expect(
            all(d >= 0 for d in self.divergences),
            "divergences",
            self.divergences,
            "must be at least 0",
            "Pass inf if no divergence is known.",
        )

    @property
    def kind(self) -> str:
        """Kind of the claim, computed from the numbers and assumptions.

        Returns:
            ``"certified"``: a finite bound, and every assumption is met;
            ``"estimate"``: a finite number with an assumption that is not met or
            unknown; ``"empirical"``: no finite number, only comparison with retrained
            models.
        """
        if not any(math.isfinite(d) for d in self.divergences):
            return "empirical"
        proven = bool(self.assumptions) and all(a.met for a in self.assumptions)
        return "certified" if proven else "estimate"

    @property
    def unmet(self) -> tuple[Assumption, ...]:
        """The assumptions that do not hold or are not known to hold."""
        return tuple(a for a in self.assumptions if not a.met)

    def epsilon(self, delta: float) -> float:
        """Return ε of the one-sided (ε, δ) statement, the smallest over the orders.

        Args:
            delta: δ in (0, 1).

        Returns:
            ε, at least 0; ``inf`` if the kind is empirical. ``kind`` says whether it is
            a bound or an estimate.

        Raises:
            ValueError: If δ is outside (0, 1).
        """
        if self.kind == "empirical":
            return math.inf
        finite = [i for i, d in enumerate(self.divergences) if math.isfinite(d)]
        divergences = np.array([self.divergences[i] for i in finite])
        orders = np.array([self.orders[i] for i in finite])
        return float(rdp_to_epsilon(divergences, orders, delta))

    def to_json(self) -> str:
        """Return the guarantee as JSON text; ``kind`` is written for readers only.

        Returns:
            One line of JSON.
        """
        facts = {"format": _FORMAT, "kind": self.kind, **asdict(self)}
        facts["divergences"] = [
            d if math.isfinite(d) else "inf" for d in self.divergences
        ]
        return json.dumps(facts, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Guarantee":
        """Read the text that ``to_json`` wrote and compute the kind again.

        Args:
            text: The JSON text.

        Returns:
            The guarantee.

        Raises:
            ValueError: If the text is not a guarantee, or states a kind that its own
                numbers and assumptions do not support.
        """
        facts = _parsed(text)
        try:
            found = cls(
                facts["method"],
                tuple(Assumption(**a) for a in facts["assumptions"]),
                facts["orders"],
                tuple(float(d) for d in facts["divergences"]),
            )
            found._check_texts()
        except (TypeError, OverflowError) as error:
            raise ValueError(
                f"text must be JSON in the format {_FORMAT}, got other fields "
                f"({error}). {_UNEDITED}"
            ) from error
        expect(
            facts["kind"] == found.kind,
            "kind",
            facts["kind"],
            f"must be {found.kind!r}, which the assumptions in the text support",
            "The text was edited: use the original.",
        )
        return found

    def _check_texts(self) -> None:
        """Raise ``TypeError`` unless method, statements and evidence are strings."""
        texts = [self.method]
        for assumption in self.assumptions:
            texts += [assumption.statement, assumption.evidence]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("method, statements and evidence must be strings")

    def text(self, delta: float = 1e-5) -> str:
        """Return the claim in words, with every assumption it rests on.

        Args:
            delta: δ in (0, 1) of the ε that is stated; choose it far below one over the
                number of examples.

        Returns:
            Several lines; the first states the kind, the second the number, if any.

        Raises:
            ValueError: If δ is outside (0, 1).
        """
        check_delta(delta)
        lines = [
            f"{self.kind.capitalize()} guarantee for {self.method}.",
            *self._number(delta),
        ]
        lines += [f"  not met: {a.statement} ({a.evidence})" for a in self.unmet]
        lines += [
            f"  met: {a.statement} ({a.evidence})" for a in self.assumptions if a.met
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()

    def _number(self, delta: float) -> list[str]:
        """Return the lines of the text that state the number."""
        if self.kind == "empirical":
            return [
                "No finite divergence from retraining is claimed: judge the result "
                "only by comparison with retrained models."
            ]
        divergence, order = min(zip(self.divergences, self.orders, strict=True))
        if self.kind == "certified":
            sign, worth, write = "≤", "a bound", rounded_up
        else:
            sign, worth, write = "≈", "an estimate, not a bound", "{:.4g}".format
        return [
            f"D_α(unlearned ‖ retrained) {sign} {write(divergence)} at α = {order:g}; "
            f"ε {sign} {write(self.epsilon(delta))} at δ = {delta:g} ({worth}).",
            "One-sided: Pr[unlearned ∈ E] ≤ e^ε · Pr[retrained ∈ E] + δ.",
        ]


def _parsed(text: str) -> dict[str, Any]:
    """Return the fields of a guarantee's JSON text."""
    try:
        facts = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        facts = None
    known = {"format", "kind", "method", "assumptions", "orders", "divergences"}
    expect(
        isinstance(facts, dict)
        and facts.get("format") == _FORMAT
        and set(facts) == known,
        "text",
        text,
        f"must be JSON in the format {_FORMAT}",
        _UNEDITED,
    )
    return cast(dict[str, Any], facts)


def rounded_up(value: float, num_digits: int = 4) -> str:
    """Return a bound as text with a few digits, never below its value.

    Args:
        value: The bound; may be ``inf``.
        num_digits: Significant digits, at least 1.

    Returns:
        The number in decimal notation.
    """
    nearest = f"{value:.{num_digits}g}"
    if float(nearest) >= value:
        return nearest
    up = Context(prec=num_digits, rounding=ROUND_CEILING)
    return f"{float(up.create_decimal_from_float(float(value))):.{num_digits}g}"


def unchecked_links(runs: Sequence[GradNormLedger]) -> tuple[Assumption, ...]:
    """Return an assumption for each link of custody that was not checked in a run.

    A ledger that was made by hand has no chain of custody, and adds none: its maker
    answers for it.

    Args:
        runs: The ledgers that a claim rests on.

    Returns:
        The assumptions, none of them met; each link once.
    """
    links = {
        link.name: link
        for run in runs
        if run.custody is not None
        for link in run.custody.unchecked
    }
    return tuple(Assumption(LINKS[n], False, k.sentence) for n, k in links.items())
