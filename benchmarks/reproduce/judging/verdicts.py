"""Verdicts on the paper's claims, with the effects that were measured.

A claim is *borne out* or *not borne out* if a test with a small error probability says
so. It is *undecided* if the test was made and both answers remain possible, and *not
testable yet* if the numbers cannot answer it, for example because nothing was
unlearned, or because one of them is not finite. A claim with several parts is borne out
only if all of them are. It is not borne out if one part is so clearly not borne out
that chance would find no such part among that many in 97.5 % of the cases (Holm).

A claim about numbers that follow from constants, such as a bound, is not judged:
nothing in it is random, so no test applies. It is *computed*, and holds or does not.
A claim of which no test has any power is *described, not judged*.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from benchmarks.reproduce.judging.effects import Effect
from opacus_pi.evaluation.intervals import ConfidenceInterval

BORNE_OUT = "borne out"
NOT_BORNE_OUT = "not borne out"
UNDECIDED = "undecided"
NOT_TESTABLE = "not testable yet"
DESCRIBED = "described, not judged"
LEVEL = 0.025  # of each of the two one-sided tests
HOLDS = "computed: holds"
DOES_NOT_HOLD = "computed: does not hold"
COMPUTED = (HOLDS, DOES_NOT_HOLD)


@dataclass(frozen=True)
class Verdict:
    """Whether the numbers confirm a claim.

    Attributes:
        verdict: ``BORNE_OUT``, ``NOT_BORNE_OUT``, ``UNDECIDED`` or ``NOT_TESTABLE``;
            ``HOLDS`` or ``DOES_NOT_HOLD`` if it was computed; ``DESCRIBED`` if no test
            has any power; empty for a remark, which does not count.
        reason: Why nothing was measured, or what combines the parts; empty if the
            effect says it.
        parts: The verdicts on the parts of the claim, by name.
        p_against: One-sided p-value of the test that the claim is false, if it is not
            borne out.
        effect: What was measured, if it was.
        remarks: Further sentences on the measurement.
    """

    verdict: str
    reason: str = ""
    parts: dict[str, "Verdict"] = field(default_factory=dict)
    p_against: float = field(default=1.0, compare=False)
    effect: Effect | None = None
    remarks: tuple[str, ...] = ()

    @property
    def judged(self) -> list["Verdict"]:
        """The verdicts on the parts that have no parts of their own, or on this."""
        parts = [one for one in self.parts.values() if one.verdict]
        return [leaf for one in parts for leaf in one.judged] if parts else [self]

    @property
    def text(self) -> str:
        """Reason, effect and remarks, without those of the parts, in one line."""
        effect = self.effect.text() if self.effect else ""
        return "; ".join(filter(None, (self.reason, effect, *self.remarks)))

    @property
    def because(self) -> str:
        """The text and those of all parts, in one line."""
        parts = (
            f"{name}: {one.verdict} ({one.because})"
            if one.verdict
            else f"{name}: {one.because}"
            for name, one in self.parts.items()
        )
        return "; ".join(text for text in (self.text, *parts) if text)

    def walk(self, path: tuple[str, ...] = ()) -> Iterator[tuple[str, "Verdict"]]:
        """Yield this verdict and its parts, with their names; its own is empty."""
        yield ", ".join(path), self
        for name, one in self.parts.items():
            yield from one.walk((*path, name))

    def lines(self) -> list[str]:
        """Return the parts as a nested list in Markdown, an item per line."""
        found = []
        for name, one in self.parts.items():
            found.append(f"- **{name}**: {sentences(one.verdict, one.text)}")
            found += [f"    {line}" for line in one.lines()]
        return found

    def to_json(self) -> dict[str, Any]:
        """Return verdict, reason, effect, remarks and parts as JSON."""
        found: dict[str, Any] = {"verdict": self.verdict, "because": self.reason}
        if self.effect:
            found["effect"] = self.effect.to_json()
        if self.remarks:
            found["remarks"] = list(self.remarks)
        if self.parts:
            found["parts"] = {name: one.to_json() for name, one in self.parts.items()}
        return found

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Verdict":
        """Return what ``to_json`` stored; other entries are ignored."""
        parts = content.get("parts", {}).items()
        effect = content.get("effect")
        return Verdict(
            content["verdict"],
            content["because"],
            {name: Verdict.from_json(one) for name, one in parts},
            effect=Effect(**effect) if effect else None,
            remarks=tuple(content.get("remarks", ())),
        )


def not_finite(named: dict[str, ArrayLike]) -> str:
    """Return which values are missing, NaN or infinite; empty if all are numbers.

    Comparisons with NaN are false, so that a guard or a count would pass over it.

    Args:
        named: Values by the name that the text gives them.
    """
    for name, values in named.items():
        array = np.asarray(values, dtype=np.float64)
        bad = int((~np.isfinite(array)).sum())
        if bad:
            return f"{name}: {bad} of {array.size} values are NaN or infinite"
        if not array.size:
            return f"{name}: there is no value"
    return ""


def sentences(*texts: str) -> str:
    """Return texts as sentences; empty ones are left out, and symbols stay small.

    >>> sentences("borne out", "", "ε = 3.3")
    'Borne out. ε = 3.3.'
    """
    found = []
    for text in filter(None, texts):
        first = text[0].upper() if text[0].isascii() else text[0]
        found.append(f"{first}{text[1:]}.")
    return " ".join(found)


def text_of(found: ConfidenceInterval, digits: int = 3) -> str:
    """Return an estimate with the ends of its interval, as text."""
    middle, low, high = (f"{value:.{digits}f}" for value in found)
    return f"{middle} [{low}, {high}]"


def of_tests(p_for: float, p_against: float, effect: Effect, *remarks: str) -> Verdict:
    """Return the verdict of two one-sided tests.

    Args:
        p_for: p-value of the test that the claim is true.
        p_against: p-value of the test that it is false.
        effect: What was measured.
        remarks: Further sentences on it.
    """
    found = Verdict(UNDECIDED, effect=effect, remarks=remarks)
    if p_for <= LEVEL:
        return replace(found, verdict=BORNE_OUT)
    if p_against <= LEVEL:
        return replace(found, verdict=NOT_BORNE_OUT, p_against=p_against)
    return found


def agreed(found: Iterable[Verdict], cases: Sequence[str]) -> Verdict:
    """Return the verdict on which several measurements of one claim agree.

    Where two of them differ, the claim is undecided. The first measurement that decides
    nothing is the last one to be made.

    Args:
        found: At least one verdict; the effect of the first one is kept.
        cases: What each measurement assumes, for the text.
    """
    made: list[Verdict] = []
    for one in found:
        made.append(one)
        kinds = [each.verdict for each in made]
        if len(set(kinds)) > 1:
            pairs = zip(cases, kinds, strict=False)
            text = "; ".join(f"{case}, the part is {kind}" for case, kind in pairs)
            kind = NOT_TESTABLE if NOT_TESTABLE in kinds else UNDECIDED
            return replace(
                made[0],
                verdict=kind,
                p_against=1.0,
                remarks=(*made[0].remarks, text),
            )
        if one.verdict not in (BORNE_OUT, NOT_BORNE_OUT):
            break
    return replace(made[0], p_against=max(one.p_against for one in made))


def combined(verdicts: dict[str, Verdict], reason: str = "") -> Verdict:
    """Return one verdict over several parts, and their parts.

    It is borne out only if all parts are. Each test finds a true part not borne out in
    up to 2.5 % of the cases, and many tests find one more often. So it is not borne out
    only if the smallest p-value, times the number of tests that were made, is at most
    2.5 % (Holm). Else one part that cannot be tested leaves the claim untested, and one
    that is not borne out for itself alone, or undecided, leaves it undecided.

    Args:
        verdicts: The parts by name; those with an empty verdict do not count.
        reason: What to say before the parts.
    """
    leaves = Verdict("", parts=verdicts).judged
    kinds = [one.verdict for one in leaves]
    made = [
        one for one in leaves if one.verdict in (BORNE_OUT, NOT_BORNE_OUT, UNDECIDED)
    ]
    least = min((one.p_against for one in made), default=1.0)
    if made and len(made) * least <= LEVEL:
        return Verdict(NOT_BORNE_OUT, reason, verdicts, least)
    if NOT_BORNE_OUT in kinds:
        one = (
            f"the smallest p of a part that is not borne out is {least:.4f}, but among "
            f"{len(made)} parts chance alone often produces such a p"
        )
        kind = NOT_TESTABLE if NOT_TESTABLE in kinds else UNDECIDED
        return Verdict(kind, "; ".join(filter(None, (reason, one))), verdicts)
    for kind in (NOT_TESTABLE, UNDECIDED, DESCRIBED):
        if kind in kinds:
            return Verdict(kind, reason, verdicts)
    return Verdict(BORNE_OUT, reason, verdicts)


def with_remark(verdict: Verdict, name: str, text: str) -> Verdict:
    """Return a verdict with a further part that does not count."""
    return replace(verdict, parts=verdict.parts | {name: Verdict("", text)})
