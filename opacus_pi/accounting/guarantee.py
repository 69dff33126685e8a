"""What may be claimed after unlearning, with what would have to hold for it.

>>> fixed = Assumption("The example was clipped", met=True, evidence="max_grad_norm=1")
>>> single = Assumption("The loss is an upper bound", met=False, evidence="one run")
>>> claim = Guarantee("Langevin", (fixed, single), orders=(2.0,), divergences=(0.5,))
>>> claim.kind
'estimate'
>>> Guarantee("FineTune", (fixed,)).kind
'empirical'
"""

import json
import math
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, Context
from typing import Any, cast

import numpy as np

from opacus_pi._validate import expect, positive
from opacus_pi.accounting.conversion import check_delta, rdp_to_epsilon

__all__ = ["Assumption", "Guarantee", "rounded_up"]

_FORMAT = "opacus_pi.Guarantee.v1"
_UNEDITED = "Pass what Guarantee.to_json wrote, unedited."


@dataclass(frozen=True)
class Assumption:
    """One condition that a claim rests on.

    Args:
        statement: The condition, as a sentence.
        met: Whether it is known to hold; False where it is unknown.
        evidence: How that is known, or why it is not.
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
            "What is not known counts as unmet: False.",
        )


@dataclass(frozen=True)
class Guarantee:
    """How close an unlearned model's law is to that of a retrained one.

    ``divergences[i]`` bounds (or estimates) D_α(unlearned ‖ retrained) at
    α = ``orders[i]``. Every statement is one-sided:
    Pr[unlearned ∈ E] ≤ e^ε Pr[retrained ∈ E] + δ for every event E; the reverse
    inequality would need the divergence in the other direction.

    Args:
        method: What was run, in words.
        assumptions: Everything the number rests on, met or not.
        orders: Rényi orders, each above 1; empty if there is no number.
        divergences: One divergence per order, at least 0; ``inf`` where there is none.

    Raises:
        ValueError: If orders and divergences do not fit or leave their range.
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
            "Give D_α for every α of orders.",
        )
        positive(
            **{"orders - 1": np.asarray(self.orders) - 1},
            remedy="A guarantee needs orders above 1.",
        )
        expect(
            all(d >= 0 for d in self.divergences),
            "divergences",
            self.divergences,
            "must be at least 0",
            "A divergence is never negative or NaN; inf means that there is none.",
        )

    @property
    def kind(self) -> str:
        """What the number is worth; computed, never passed in.

        Returns:
            ``"certified"``: a finite bound, and every assumption is met;
            ``"estimate"``: a finite number that rests on something unmet or unknown;
            ``"empirical"``: no finite number, only comparison with retrained models.
        """
        if not any(math.isfinite(d) for d in self.divergences):
            return "empirical"
        proven = bool(self.assumptions) and all(a.met for a in self.assumptions)
        return "certified" if proven else "estimate"

    @property
    def unmet(self) -> tuple[Assumption, ...]:
        """The assumptions that do not hold or are not known to."""
        return tuple(a for a in self.assumptions if not a.met)

    def epsilon(self, delta: float) -> float:
        """The ε of the one-sided (ε, δ) statement, the smallest over the orders.

        Args:
            delta: δ in (0, 1).

        Returns:
            ε, at least 0; ``inf`` if the kind is empirical. It is worth what ``kind``
            says.
        """
        if self.kind == "empirical":
            return math.inf
        finite = [i for i, d in enumerate(self.divergences) if math.isfinite(d)]
        divergences = np.array([self.divergences[i] for i in finite])
        orders = np.array([self.orders[i] for i in finite])
        return float(rdp_to_epsilon(divergences, orders, delta))

    def to_json(self) -> str:
        """The guarantee as JSON text; ``kind`` is written for readers only."""
        facts = {"format": _FORMAT, "kind": self.kind, **asdict(self)}
        facts["divergences"] = [
            d if math.isfinite(d) else "inf" for d in self.divergences
        ]
        return json.dumps(facts, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Guarantee":
        """Read what ``to_json`` wrote and compute the kind again.

        Raises:
            ValueError: If the text is no guarantee, or says a kind that its own
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
                f"text must be a {_FORMAT} in JSON, got other fields ({error}). "
                f"{_UNEDITED}"
            ) from error
        expect(
            facts["kind"] == found.kind,
            "kind",
            facts["kind"],
            f"must be {found.kind!r}, which the assumptions in the text support",
            "The text was edited: ask for the original.",
        )
        return found

    def _check_texts(self) -> None:
        """Refuse texts that are none."""
        texts = [self.method]
        for assumption in self.assumptions:
            texts += [assumption.statement, assumption.evidence]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a text is none")

    def text(self, delta: float = 1e-5) -> str:
        """What is claimed, in words, with everything that it rests on.

        Args:
            delta: δ in (0, 1) of the ε that is stated; far below one over the number
                of examples.

        Returns:
            Lines; the first says the kind, the second the number, if there is one.

        Raises:
            ValueError: If δ leaves its range.
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
        """The lines of the text that state the number."""
        if self.kind == "empirical":
            return [
                "No finite divergence from retraining is claimed; only the comparison "
                "with retrained models speaks for the result."
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
    """The fields of a guarantee's JSON text."""
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
        f"must be a {_FORMAT} in JSON",
        _UNEDITED,
    )
    return cast(dict[str, Any], facts)


def rounded_up(value: float, num_digits: int = 4) -> str:
    """A bound as text.

    Args:
        value: It; may be ``inf``.
        num_digits: Significant digits, at least 1.
    """
    nearest = f"{value:.{num_digits}g}"
    if float(nearest) >= value:
        return nearest
    up = Context(prec=num_digits, rounding=ROUND_CEILING)
    return f"{float(up.create_decimal_from_float(float(value))):.{num_digits}g}"
