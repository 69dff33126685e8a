"""Guarantees of unlearning, with the assumptions that they need.

A ``Guarantee`` joins numbers (or none) with the assumptions they rest on. Its kind is
computed from both and cannot be passed in. What decides it is *who established* each
part:

* *observed*: the library saw it while it trained or unlearned;
* *derived*: it follows from what is recorded, or it is proved;
* *declared*: the user says so, or uses the number as if it were so.

A bound with declarations is "certified if" they hold, and its text lists them; only a
bound without any is "certified". Whatever a caller makes by hand is declared:

>>> fixed = Assumption("The example was clipped", met=True, evidence="max_grad_norm=1")
>>> single = Assumption("The loss is an upper bound", met=False, evidence="one run")
>>> claim = Guarantee("Langevin", (fixed, single), orders=(2.0,), divergences=(0.5,))
>>> claim.kind
'estimate'
>>> mine = Guarantee("Langevin", (fixed,), orders=(2.0,), divergences=(0.5,))
>>> mine.kind, [a.statement for a in mine.declarations][-1]
('certified if', 'The example was clipped')

``observed``, ``derived`` and ``guarantee_of_run`` make the other kinds. They are for
the runners of this library, which call them only with what they have seen or computed
themselves; they are not promised to users, and a guarantee made with them by anyone
else is worth nothing.

>>> clipped = observed("The example was clipped", "max_grad_norm=1")
>>> guarantee_of_run("Langevin", (clipped,), orders=(2.0,), divergences=(0.5,)).kind
'certified'

*What breaks it:* an assumption that is missing from the list. The text of a guarantee
has a checksum, which finds accidental changes; it does not stop a forger, so keep the
ledger that the numbers come from.

Bounds are written rounded up, so that the text never claims less than the number:

>>> rounded_up(1.23401), rounded_up(0.1), rounded_up(float("inf"))
('1.235', '0.1', 'inf')
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from decimal import ROUND_CEILING, Context
from typing import Any, ClassVar, TypeVar, cast

import numpy as np

from opacus_pi._shown import Shown
from opacus_pi._validate import expect, in_range
from opacus_pi.accounting.conversion import (
    check_above_one,
    check_delta,
    epsilon_offset,
    rdp_to_epsilon,
)
from opacus_pi.files.plain_json import plain_json
from opacus_pi.ledger.custody import LINKS, unchecked_in
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger

__all__ = [
    "DECLARED",
    "DERIVED",
    "OBSERVED",
    "Assumption",
    "EpsilonDelta",
    "Guarantee",
    "rounded_up",
    "unchecked_links",
]

OBSERVED, DERIVED, DECLARED = "observed", "derived", "declared"
_WHO = (OBSERVED, DERIVED, DECLARED)
_FORMAT = "opacus_pi.Guarantee.v2"
_FORMAT_1 = "opacus_pi.Guarantee.v1"  # before it was recorded who established what
_FIELDS_1 = {"format", "kind", "method", "assumptions", "orders", "divergences"}
_CURVES = ("divergences", "reverse_divergences", "estimates")
_FIELDS = _FIELDS_1 | {*_CURVES, "statements", "established", "checksum"}
_UNEDITED = "Pass the unedited text that Guarantee.to_json returned."
_HEADS = {
    "certified": "Certified guarantee for {}.",
    "certified if": "Certified if the declarations below hold: guarantee for {}.",
    "estimate": "Estimate, not a bound, for {}.",
    "empirical": "Empirical evidence only, no guarantee, for {}.",
}
_WEAK_HEADS = {
    "certified": "Certified, but the bound is too large to be of practical use: "
    "guarantee for {}.",
    "certified if": "Certified if the declarations below hold, but the bound is too "
    "large to be of practical use: guarantee for {}.",
}
_DELTA = 1e-5  # at which ε is stated, if no pair of ε and δ names another
LARGE_EPSILON = 10.0  # ε of a bound of no practical use: e^ε is then above 20,000
_BY_HAND = "the ledger describes the training as it was run"
_EVENT = "Pr[unlearned ∈ E] ≤ e^ε · Pr[retrained ∈ E] + δ"
_ONE_SIDED = f"One-sided, for every event E: {_EVENT}."
_EXACT = "ε = 0 and δ = 0, and a Rényi divergence of 0 at every order α"
_SAME = (
    "In words: the unlearned model has exactly the distribution that it would have had "
    "if it had been trained without the forgotten examples. So nobody can learn "
    "anything about them from this model alone that a retrained one would not show."
)
_EXCLUDES_NOTHING = (
    "In words: this bound excludes almost nothing. Even if it holds, somebody who sees "
    "the unlearned model may be nearly sure that the examples were used in training."
)
_COUNTED = (
    "  observed or derived: {} more, all of them met (print the guarantee, or use "
    "--json on the command line, to read them)"
)
_EXCHANGED = "Pr[retrained ∈ E] ≤ e^ε · Pr[unlearned ∈ E] + δ"
Established = TypeVar("Established", "Assumption", "Guarantee")


@dataclass(frozen=True)
class Assumption:
    """One condition that a claim needs.

    Args:
        statement: The condition, as a sentence.
        met: Whether it is known to hold, or declared; False if it is unknown.
        evidence: Why it is known to hold, why it does not, or why it can only be
            declared.

    Attributes:
        established: Who established it: ``"observed"``, ``"derived"`` or
            ``"declared"``. An assumption that a caller makes is always declared.

    Raises:
        ValueError: If ``met`` is not a bool.
    """

    statement: str
    met: bool
    evidence: str
    established: str = field(default=DECLARED, init=False)

    def __post_init__(self) -> None:
        expect(
            isinstance(self.met, bool),
            "met",
            repr(self.met),
            "must be True or False",
            "Pass False if it is not known.",
        )

    @property
    def is_declared(self) -> bool:
        """Return whether it is taken to hold because it was declared."""
        return self.met and self.established == DECLARED

    @property
    def standing(self) -> str:
        """In words: ``"not met"``, ``"declared"``, ``"observed"`` or ``"derived"``."""
        return self.established if self.met else "not met"

    def __str__(self) -> str:
        return f"{self.standing}: {self.statement} ({self.evidence})"


@dataclass(frozen=True)
class EpsilonDelta:
    """One pair (ε, δ) that was computed directly, not from Rényi divergences.

    Args:
        epsilon: ε, at least 0 and finite.
        delta: δ in [0, 1). The pair holds at every larger δ too.
        source: What computed it, as a noun: ``"the engine's PRV accountant"``.
        both_directions: Whether it also holds with the two distributions exchanged.

    Raises:
        ValueError: If a number is outside its domain.
    """

    epsilon: float
    delta: float
    source: str
    both_directions: bool = False

    def __post_init__(self) -> None:
        largest = np.finfo(np.float64).max
        in_range(
            0, largest, epsilon=self.epsilon, remedy="Leave this pair of ε and δ out."
        )
        remedy = "Choose a number of at least 0, below 1 / (data set size)."
        in_range(0, 1, delta=self.delta, remedy=remedy)


@dataclass(frozen=True, repr=False)
class Guarantee(Shown):
    """Bound or estimate of the distance of an unlearned model from a retrained one.

    The distance is a Rényi divergence between the distributions of the two models.

    ``divergences[i]`` bounds (or estimates) D_α(unlearned ‖ retrained) at
    α = ``orders[i]``. These divergences give one direction:
    Pr[unlearned ∈ E] ≤ e^ε Pr[retrained ∈ E] + δ for every event E. The other
    direction, with the two models exchanged, follows from ``reverse_divergences``.

    Args:
        method: What was run, in words.
        assumptions: Everything the numbers rest on, met or not.
        orders: Rényi orders, each above 1; empty if there are no divergences.
        divergences: One divergence per order, at least 0, in nats; ``inf`` if no
            divergence is known.
        reverse_divergences: D_α(retrained ‖ unlearned), one per order; empty if nothing
            is known about this direction.
        estimates: Estimates of D_α(unlearned ‖ retrained) for this forget set, reported
            in addition to a bound, one per order; empty if there are none. They are
            sensitive, unlike a worst case, and do not change ``kind``.
        statements: Pairs (ε, δ) that were computed directly, if there are any.

    Attributes:
        established: ``"derived"`` if a runner of the library computed the numbers;
            ``"declared"`` if a caller passed them.

    Raises:
        ValueError: If orders and divergences have different lengths or are outside
            their domain.

    Source: Mironov 2017 (arXiv:1702.07476), Definition 4, for the divergence.
    """

    _note: ClassVar[str] = "print it to read every assumption"

    method: str
    assumptions: tuple[Assumption, ...]
    orders: tuple[float, ...] = ()
    divergences: tuple[float, ...] = ()
    reverse_divergences: tuple[float, ...] = field(default=(), kw_only=True)
    estimates: tuple[float, ...] = field(default=(), kw_only=True)
    statements: tuple[EpsilonDelta, ...] = field(default=(), kw_only=True)
    established: str = field(default=DECLARED, init=False)

    def __post_init__(self) -> None:
        for name in ("orders", *_CURVES):
            numbers = tuple(float(v) for v in getattr(self, name))
            object.__setattr__(self, name, numbers)
        for name in ("assumptions", "statements"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_above_one(orders=self.orders, remedy="Pass Rényi orders above 1.")
        for name in _CURVES:
            values, optional = getattr(self, name), name != "divergences"
            expect(
                len(self.orders) == len(values) or (optional and not values),
                name,
                len(values),
                f"must have one value for each of the {len(self.orders)} orders",
                "Give one divergence for every order.",
            )
            expect(
                all(d >= 0 for d in values),
                name,
                values,
                "must be at least 0",
                "Pass inf if no divergence is known.",
            )

    @property
    def kind(self) -> str:
        """Kind of the claim, computed from the numbers and assumptions.

        Returns:
            ``"certified"``: a finite bound, every assumption is met, and nothing is
            declared; ``"certified if"``: a finite bound, given ``declarations``;
            ``"estimate"``: a finite number with an assumption that is not met or
            unknown; ``"empirical"``: no finite number, only comparison with retrained
            models. It says nothing of the size of a bound: see ``is_too_large``.
        """
        if not self._has_number:
            return "empirical"
        if not self.assumptions or self.unmet:
            return "estimate"
        return "certified if" if self.declarations else "certified"

    @property
    def _has_number(self) -> bool:
        """Return whether a finite divergence or a pair (ε, δ) is known."""
        return bool(self.statements) or any(map(math.isfinite, self.divergences))

    @property
    def unmet(self) -> tuple[Assumption, ...]:
        """The assumptions that do not hold or are not known to hold."""
        return tuple(a for a in self.assumptions if not a.met)

    @property
    def declarations(self) -> tuple[Assumption, ...]:
        """The assumptions that hold only because the user declares them, as a list.

        It begins with the numbers themselves, if a caller passed them.
        """
        own = Assumption(
            "the numbers of this guarantee are bounds", True, "passed by the caller"
        )
        of_numbers = (own,) if self._has_number and self.established == DECLARED else ()
        return (*of_numbers, *(a for a in self.assumptions if a.is_declared))

    def _shown(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"kind": self.kind, "method": self.method}
        if self.kind.startswith("certified"):  # an estimate would be sensitive
            delta = self.own_delta
            weak = ", too large to be of practical use" * self.is_too_large(delta)
            bound = rounded_up(self.epsilon(delta))
            facts["epsilon"] = f"≤ {bound} at δ = {delta:g}{weak}"
        return {
            **facts,
            "assumptions": len(self.assumptions),
            "declarations": len(self.declarations),
            "unmet": len(self.unmet),
        }

    @property
    def own_delta(self) -> float:
        """The δ at which the run stated ε: the smallest of its pairs, or else 1e-5."""
        return min((s.delta for s in self.statements if s.delta > 0), default=_DELTA)

    def epsilon(self, delta: float) -> float:
        """Return ε of the (ε, δ) statement, the smallest that is known.

        Args:
            delta: δ in (0, 1).

        Returns:
            ε, at least 0; ``inf`` if the kind is empirical. ``kind`` says whether it is
            a bound or an estimate.

        Raises:
            ValueError: If δ is outside (0, 1).
        """
        return self._least(self.divergences, self.statements, delta)

    def reverse_epsilon(self, delta: float) -> float:
        """Return ε of the statement with the two distributions exchanged.

        Args:
            delta: δ in (0, 1).

        Returns:
            ε, at least 0; ``inf`` if nothing is known about this direction.

        Raises:
            ValueError: If δ is outside (0, 1).
        """
        if self.is_exact:
            check_delta(delta)
            return 0.0
        both = [s for s in self.statements if s.both_directions]
        return self._least(self.reverse_divergences, both, delta)

    @property
    def is_exact(self) -> bool:
        """Whether it is a bound of 0: both models have the same distribution.

        It needs a statement with ε = 0 at δ = 0, which holds in both directions. A
        divergence of 0 does not suffice, because a small number may be rounded to it.
        """
        exact = any(s.epsilon == 0 and s.delta == 0 for s in self.statements)
        return self._is_bound and exact

    def is_too_large(self, delta: float) -> bool:
        """Return whether it is a bound that excludes almost nothing: ε above 10.

        Args:
            delta: δ in (0, 1).

        Raises:
            ValueError: If δ is outside (0, 1).
        """
        return self._is_bound and self.epsilon(delta) > LARGE_EPSILON

    @property
    def _is_bound(self) -> bool:
        return self.kind in ("certified", "certified if")

    def least_order(self, delta: float) -> tuple[float, float] | None:
        """Return the Rényi order α whose divergence gives the smallest ε.

        Args:
            delta: δ in (0, 1).

        Returns:
            The order, and its divergence D_α(unlearned ‖ retrained) in nats; None if no
            divergence is finite.

        Raises:
            ValueError: If δ is outside (0, 1).
        """
        check_delta(delta)
        if not any(map(math.isfinite, self.divergences)):
            return None
        offsets = epsilon_offset(np.array(self.orders), delta)
        best = int(np.argmin(np.array(self.divergences) + offsets))
        return self.orders[best], self.divergences[best]

    def estimated_epsilon(self, delta: float) -> float:
        """Return the estimate of ε for this forget set, reported beside the bound.

        It is sensitive: show it only to the owner of the examples.

        Args:
            delta: δ in (0, 1).

        Returns:
            ε, at least 0 and at most the bound; ``inf`` if there is no estimate.

        Raises:
            ValueError: If δ is outside (0, 1).
        """
        if not any(map(math.isfinite, self.estimates)):
            return math.inf
        return min(self._least(self.estimates, (), delta), self.epsilon(delta))

    def _least(
        self,
        divergences: Sequence[float],
        statements: Iterable[EpsilonDelta],
        delta: float,
    ) -> float:
        """Return the smallest ε that a curve and pairs (ε, δ) give at one δ."""
        check_delta(delta)
        known = zip(self.orders, divergences, strict=False)
        finite = [(a, d) for a, d in known if math.isfinite(d)]
        found = [s.epsilon for s in statements if s.delta <= delta]
        if finite:
            orders, values = np.array(finite).T
            found.append(float(rdp_to_epsilon(values, orders, delta)))
        return min(found, default=math.inf)

    def without_estimates(self) -> "Guarantee":
        """Return the guarantee as it may be shown to others, such as a regulator.

        A bound holds for any data and stays. An estimate depends on the data of the
        forget set, so only the owner of these data may see it. Without a bound, no
        number is left.
        """
        keeps = {"orders", "divergences", "reverse_divergences", "statements"}
        if self.kind == "estimate":
            keeps = set()
        kept = {name: getattr(self, name) for name in keeps}
        shown = Guarantee(self.method, self.assumptions, **kept)
        return _established(shown, self.established)

    def to_json(self) -> str:
        """Return the guarantee as JSON text; ``kind`` is written for readers only.

        Returns:
            One line of JSON.
        """
        facts = self._facts()
        facts["checksum"] = _checksum(facts)
        return json.dumps(facts, ensure_ascii=False, allow_nan=False)

    def _facts(self) -> dict[str, Any]:
        """Return everything that the text contains but its checksum."""
        facts = {"format": _FORMAT, "kind": self.kind, **asdict(self)}
        for name in _CURVES:
            values = getattr(self, name)
            facts[name] = [d if math.isfinite(d) else "inf" for d in values]
        return facts

    @classmethod
    def from_json(cls, text: str) -> "Guarantee":
        """Read the text that ``to_json`` wrote and compute the kind again.

        Texts of version 1 do not say who established an assumption: there, everything
        counts as declared.

        Args:
            text: The JSON text.

        Returns:
            The guarantee.

        Raises:
            ValueError: If the text is not a guarantee, states a kind that its own
                numbers and assumptions do not support, or does not have the checksum
                that it was written with.
        """
        facts = _parsed(text)
        try:
            found = _guarantee_in(facts)
            kind = found.kind
            if facts["format"] == _FORMAT_1 and kind == "certified if":
                kind = "certified"  # version 1 had one word for both
        except (TypeError, KeyError, OverflowError) as error:
            raise ValueError(
                f"text must be JSON in the format {_FORMAT}, got other fields "
                f"({error}). {_UNEDITED}"
            ) from error
        expect(
            facts["kind"] == kind,
            "kind",
            facts["kind"],
            f"must be {kind!r}, the kind that follows from the assumptions in the text",
            "The text was edited: use the original.",
        )
        expect(
            facts["format"] == _FORMAT_1
            or facts["checksum"] == _checksum(found._facts()),
            "checksum",
            facts.get("checksum"),
            "must match the text",
            "The text was edited: use the original.",
        )
        return found

    def text(self, delta: float | None = None, *, in_full: bool = True) -> str:
        """Return the claim in words, with every assumption it rests on.

        Args:
            delta: δ in (0, 1) of the ε that is stated; choose it far below one over the
                number of examples. Default: ``own_delta``.
            in_full: False: assumptions that were observed or derived are only counted,
                as in a plan.

        Returns:
            Several lines; the first states the kind, the next ones the numbers, if
            any. A line for each assumption follows: first those that are not met, then
            those that are declared.

        Raises:
            ValueError: If δ is outside (0, 1).
        """
        delta = self.own_delta if delta is None else delta
        check_delta(delta)
        listed = [*self.unmet, *self.declarations]
        others = [a for a in self.assumptions if a not in listed]
        counted = "" if in_full or not others else _COUNTED.format(len(others))
        listed += others if in_full else []
        heads = _WEAK_HEADS if self.is_too_large(delta) else _HEADS
        return "\n".join(
            [
                heads[self.kind].format(self.method),
                *self._number(delta),
                *(f"  {assumption}" for assumption in listed),
                *([counted] if counted else []),
            ]
        )

    def __str__(self) -> str:
        return self.text()

    def _number(self, delta: float) -> list[str]:
        """Return the lines of the text that state the numbers."""
        if self.kind == "empirical":
            return [
                "No finite divergence from retraining is claimed: judge the result "
                "only by comparison with retrained models."
            ]
        is_bound = self._is_bound
        sign, write = ("≤", rounded_up) if is_bound else ("≈", "{:.4g}".format)
        ways = self._ways(delta, sign, write)
        source = f", {ways[0][1]}" if ways else ""
        if self.is_exact:
            return [f"{_EXACT} (a bound{source}).", self.in_words(delta)]
        lines = [
            f"ε {sign} {write(self.epsilon(delta))} at δ = {delta:g} "
            f"({'a bound' if is_bound else 'an estimate, not a bound'}{source})."
        ]
        if len(ways) > 1:
            larger = "; ".join(f"ε {sign} {number}, {way}" for number, way in ways[1:])
            lines.append(
                f"Other methods lose more: {larger}."
                + " All of these bounds hold, and the smallest counts." * is_bound
            )
        lines += self._direction(delta, sign, write)
        if is_bound:
            lines.append(self.in_words(delta))
        if any(map(math.isfinite, self.estimates)):
            lines.append(
                "In addition, there is an estimate for this set: ε ≈ "
                f"{self.estimated_epsilon(delta):.4g} at δ = {delta:g}. It is not a "
                "bound, and it is sensitive: show it to the owner of the data only."
            )
        return lines

    def in_words(self, delta: float) -> str:
        """Return what the bound means, as a line of the text.

        Args:
            delta: δ in (0, 1).

        Returns:
            One or two sentences; empty if the guarantee has no bound.

        Raises:
            ValueError: If δ is outside (0, 1).
        """
        epsilon = self.epsilon(delta)
        if not self._is_bound:
            return ""
        if self.is_exact:
            return _SAME
        if self.is_too_large(delta):
            return _EXCLUDES_NOTHING
        times = float(rounded_up(math.exp(epsilon), 2))
        than = "as probable" if epsilon == 0 else f"{times:,g} times as probable"
        return (
            f"In words: what somebody concludes from the unlearned model is at most "
            f"{than} as from a retrained model, plus δ."
        )

    def _ways(self, delta: float, sign: str, write: Any) -> list[tuple[str, str]]:
        """Return ε at one δ by each method, the smallest first, and the method.

        Args:
            delta: δ in (0, 1).
            sign: Of the divergence.
            write: Makes a text of a number. A number of equal text is left out.
        """
        ways = [
            (s.epsilon, f"by {s.source}") for s in self.statements if s.delta <= delta
        ]
        least = self.least_order(delta)
        if least is not None:
            of = f"D_α(unlearned ‖ retrained) {sign} {write(least[1])}"
            of += f" at α = {least[0]:g}"
            epsilon = self._least(self.divergences, (), delta)
            ways.append((epsilon, f"converted from {of}"))
        found: dict[str, str] = {}
        for epsilon, way in sorted(ways, key=lambda pair: pair[0]):
            found.setdefault(write(epsilon), way)
        return [*found.items()]

    def _direction(self, delta: float, sign: str, write: Any) -> list[str]:
        """Return the lines that say in which directions the statement holds."""
        forward, reverse = self.epsilon(delta), self.reverse_epsilon(delta)
        if math.isinf(reverse):
            return [_ONE_SIDED]
        both = f"Both directions, for every event E: {_EVENT}"
        if reverse <= forward or write(reverse) == write(forward):
            return [f"{both}, and {_EXCHANGED}."]
        larger = f"In the other direction, with ε {sign} {write(reverse)}"
        return [f"{both}. {larger}: {_EXCHANGED}."]


def _established(item: Established, who: str) -> Established:
    """Return an assumption or a guarantee with who established it written in."""
    expect(who in _WHO, "established", repr(who), f"must be one of {_WHO}", _UNEDITED)
    object.__setattr__(item, "established", who)
    return item


def observed(statement: str, evidence: str, *, met: bool = True) -> Assumption:
    """Return an assumption about which a runner of the library saw the facts itself.

    For runners of this library only: call it where the fact is seen, never with what a
    caller says about it.

    Args:
        statement: The condition, as a sentence.
        evidence: What was seen.
        met: Whether the condition holds by what was seen.
    """
    return _established(Assumption(statement, met, evidence), OBSERVED)


def derived(statement: str, evidence: str, *, met: bool = True) -> Assumption:
    """Return an assumption that follows from recorded facts, or is proved.

    For runners of this library only.

    Args:
        statement: The condition, as a sentence.
        evidence: From what it follows, or where it is proved.
        met: Whether the condition holds by that.
    """
    return _established(Assumption(statement, met, evidence), DERIVED)


def guarantee_of_run(
    method: str,
    assumptions: Iterable[Assumption],
    orders: Iterable[float] = (),
    divergences: Iterable[float] = (),
    *,
    reverse_divergences: Iterable[float] = (),
    estimates: Iterable[float] = (),
    statements: Iterable[EpsilonDelta] = (),
) -> Guarantee:
    """Return a guarantee whose numbers a runner of the library computed.

    For runners of this library only: the numbers must be bounds if every assumption
    holds, or one assumption must say that they are estimates and be not met. An exact
    result has all divergences 0 and ``EpsilonDelta(0.0, 0.0, source, True)``.

    Args:
        method: As in ``Guarantee``, as are the other arguments.
        assumptions: Made by ``observed``, ``derived``, or by ``Assumption`` if the user
            declares them.
        orders: Rényi orders above 1.
        divergences: One per order.
        reverse_divergences: One per order, or none.
        estimates: One per order, or none.
        statements: Pairs (ε, δ).

    Raises:
        ValueError: As ``Guarantee``.
    """
    found = Guarantee(
        method,
        tuple(assumptions),
        tuple(orders),
        tuple(divergences),
        reverse_divergences=tuple(reverse_divergences),
        estimates=tuple(estimates),
        statements=tuple(statements),
    )
    return _established(found, DERIVED)


def _parsed(text: str) -> dict[str, Any]:
    """Return the fields of a guarantee's JSON text."""
    try:
        facts = plain_json(text)
    except (ValueError, TypeError, RecursionError):
        facts = None
    known = {_FORMAT: _FIELDS, _FORMAT_1: _FIELDS_1}
    expect(
        isinstance(facts, dict)
        and isinstance(facts.get("format"), str)
        and set(facts) == known.get(facts["format"]),
        "text",
        text,
        f"must be JSON in the format {_FORMAT}",
        _UNEDITED,
    )
    return cast(dict[str, Any], facts)


def _guarantee_in(facts: dict[str, Any]) -> Guarantee:
    """Return the guarantee that parsed fields describe, of either version.

    Raises:
        TypeError, KeyError: If a field has another form.
        ValueError: If a value is outside its domain.
    """
    curves = {
        name: tuple(float(d) for d in facts.get(name, ())) for name in _CURVES[1:]
    }
    found = Guarantee(
        facts["method"],
        tuple(_assumption_in(dict(a)) for a in facts["assumptions"]),
        facts["orders"],
        tuple(float(d) for d in facts["divergences"]),
        statements=tuple(EpsilonDelta(**s) for s in facts.get("statements", ())),
        **curves,
    )
    texts = [found.method, *(s.source for s in found.statements)]
    for assumption in found.assumptions:
        texts += [assumption.statement, assumption.evidence]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("method, statements, evidence and sources must be strings")
    return _established(found, facts.get("established", DECLARED))


def _assumption_in(facts: dict[str, Any]) -> Assumption:
    """Return the assumption that parsed fields describe, of either version."""
    who = facts.pop("established", DECLARED)
    return _established(Assumption(**facts), who)


def _checksum(facts: dict[str, Any]) -> str:
    """Return the SHA-256 of a guarantee's fields, independent of their order."""
    text = json.dumps(facts, sort_keys=True, allow_nan=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


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
    """Return a declared assumption for each link of custody that was not checked.

    A ledger that was made by hand has no chain of custody: its maker declares all of it
    in one assumption.

    Args:
        runs: The ledgers that a claim rests on.

    Returns:
        The assumptions, all of them declared; each link once.
    """
    links = unchecked_in([run.custody for run in runs])
    found = [Assumption(LINKS[link.name], True, link.sentence) for link in links]
    if any(run.custody is None for run in runs):
        found.append(Assumption(_BY_HAND, True, "the ledger has no chain of custody"))
    return tuple(found)
