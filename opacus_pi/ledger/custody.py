"""The chain of custody of a ledger: what is known about how its numbers came to be.

A recorded gradient norm is the norm of one example's loss only if several things hold:
the batch came from the data loader, its samples are the examples they are taken for,
the model treats examples separately, and so on. Each of these is a *link*. During
training every link is watched by ``opacus_pi.custody``; what was found is stored in the
ledger, and every function that reads the ledger looks at it.

A link is in one of three states:

* *checked*: it was observed to hold;
* *unchecked*: it could not be observed, and is taken to hold. It then stands in the
  list of assumptions of every guarantee;
* *broken*: it does not hold. No number is given, and the error says why.

A ledger without a chain (``custody=None``) was made by hand or by an earlier release.
Whoever made it declares that every link holds, so numbers are given.

>>> chain = Custody((Link("loss", "unchecked", "The criterion was not seen."),))
>>> chain.unchecked[0].sentence
'The criterion was not seen.'
>>> Custody((Link("draw", "broken", "A batch was used twice."),)).require_intact()
Traceback (most recent call last):
    ...
opacus_pi._errors.AccountingError: A batch was used twice.
"""

import json
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from opacus_pi._errors import AccountingError
from opacus_pi._validate import expect

__all__ = [
    "BROKEN",
    "CHANGED_DIVISOR",
    "CHECKED",
    "LINKS",
    "MAX_UNATTRIBUTED",
    "UNCHECKED",
    "Custody",
    "Link",
    "unchecked_in",
]

CHECKED, UNCHECKED, BROKEN = "checked", "unchecked", "broken"
_STATES = (CHECKED, UNCHECKED, BROKEN)
_LINE = 88  # characters
#: The statement that each link makes, by name, in the order of an update.
LINKS = MappingProxyType(
    {
        "draw": "every batch came from the prepared data loader, and was used in one "
        "update only",
        "schedule": "each example was drawn as often as the accounting assumes",
        "identity": "each sample of a batch is matched to the right example",
        "rows": (
            "an example was in an update at most once, in the same position of every "
            "input"
        ),
        "model": "the model's output for one example depends on that example only",
        "loss": "the loss is the mean or the sum of the examples' own losses",
        "norm": (
            "the norm covers exactly the parameters that the update changed, and "
            "clipping used this norm"
        ),
        "noise": "each update had one draw of noise of the recorded size",
        "weights": "the training data changed the weights through the recorded updates "
        "only",
    }
)
#: Why the link "noise" is unchecked if the divisor of the noised sums has changed.
CHANGED_DIVISOR = (
    "optimizer.expected_batch_size was changed after make_private, so updates were "
    "divided by different numbers. If such a number depends on the examples that were "
    "drawn, as the size of a batch does, so does the size of the noise, and neither "
    "get_epsilon nor the ledger covers that. Leave expected_batch_size as make_private "
    "sets it, or set it once, before the first update, to a number that does not "
    "depend on the training data."
)
_UNKNOWN = (
    "More samples of the updates are unattributed than is allowed: it is not known "
    "which examples they are. "
)
#: Largest share of unattributed samples for which numbers are still given.
MAX_UNATTRIBUTED = 0.01


@dataclass(frozen=True)
class Link:
    """One link of the chain, with its state and the reason for it.

    Args:
        name: One of ``LINKS``.
        state: ``"checked"``, ``"unchecked"`` or ``"broken"``.
        sentence: How it was checked, why it could not be, or what broke it and what to
            do about it.

    Raises:
        ValueError: If the name or the state is unknown.
    """

    name: str
    state: str
    sentence: str

    def __post_init__(self) -> None:
        for field, known in (("name", tuple(LINKS)), ("state", _STATES)):
            value = getattr(self, field)
            expect(
                value in known,
                f"the link's {field}",
                repr(value),
                f"must be one of {', '.join(known)}",
                "Leave the chain of custody to the engine that recorded the run.",
            )


@dataclass(frozen=True)
class Custody:
    """The links of one run, and how many of its samples have no known example.

    Args:
        links: The links with a known state, at most one for each name; every other link
            counts as unchecked.
        num_samples: Samples that entered updates.
        num_unattributed: Those of them whose example is not known.
        allows_unattributed: Whether any share of unattributed samples is allowed,
            because the recorder had an option that says how to charge them.
        cause: Why samples are unattributed, as a sentence; empty if none are.
        leaves_epsilon: The names of broken links whose sentence does not show whether
            the ε of the engine's accountant is a bound for the training.
    """

    links: tuple[Link, ...] = ()
    num_samples: int = 0
    num_unattributed: int = 0
    allows_unattributed: bool = False
    cause: str = ""
    leaves_epsilon: tuple[str, ...] = ()

    @property
    def share_unattributed(self) -> float:
        """Share of the samples whose example is not known, in [0, 1]."""
        return self.num_unattributed / max(1, self.num_samples)

    @property
    def broken(self) -> tuple[Link, ...]:
        """The links that do not hold."""
        found = [link for link in self.links if link.state == BROKEN]
        if self._has_too_many_unattributed:
            found.append(Link("identity", BROKEN, self._too_many_unattributed()))
        return tuple(found)

    @property
    def _has_too_many_unattributed(self) -> bool:
        """Whether more samples are unattributed than is allowed."""
        is_many = self.share_unattributed > MAX_UNATTRIBUTED
        return is_many and not self.allows_unattributed

    def epsilon_reason(self) -> tuple[str, bool]:
        """Return what is known against the ε of the engine's accountant.

        The text is the same as long as no other reason is found, so that a warning
        with it is printed once.

        Returns:
            A sentence, empty if no link is broken; and whether it shows that ε is no
            bound for the training. If not, it is not known whether it is one.
        """
        found = [link for link in self.links if link.state == BROKEN]
        for link in found:
            if link.name not in self.leaves_epsilon:
                return link.sentence, True
        if found:
            return found[0].sentence, False
        return (_UNKNOWN + self.cause if self._has_too_many_unattributed else ""), False

    @property
    def unchecked(self) -> tuple[Link, ...]:
        """The links that are taken to hold without having been observed."""
        known = {link.name: link for link in self.links}
        missing = (
            Link(name, UNCHECKED, "It was not checked.")
            for name in LINKS
            if name not in known
        )
        found = (link for link in self.links if link.state == UNCHECKED)
        return (*found, *missing)

    @property
    def summary(self) -> str:
        """The names of the broken links; if none is broken, of the unchecked ones."""
        for state, links in ((BROKEN, self.broken), (UNCHECKED, self.unchecked)):
            if links:
                return f"{state}: {', '.join(link.name for link in links)}"
        return "every link checked"

    def __str__(self) -> str:
        """Return a paragraph for each link: its name, its state and the reason."""
        found = {link.name: link for link in (*self.links, *self.unchecked)}
        found |= {link.name: link for link in self.broken}
        return "\n".join(
            textwrap.fill(
                f"{name:10}{found[name].state:11}{found[name].sentence}",
                width=_LINE,
                subsequent_indent=" " * 21,
                break_long_words=False,
            )
            for name in LINKS
        )

    def with_doubt(self, name: str, sentence: str) -> "Custody":
        """Return the chain with one more reason why a link is unchecked.

        Args:
            name: One of ``LINKS``. A broken link stays as it is.
            sentence: The reason, which is put behind those that are known.
        """
        known = {link.name: link for link in (*self.unchecked, *self.links)}
        before = known[name]
        if before.state == BROKEN:
            return self
        reasons = sentence
        if before.state == UNCHECKED and before in self.links:
            reasons = f"{before.sentence} {sentence}"
        known[name] = Link(name, UNCHECKED, reasons)
        links = tuple(known[found] for found in LINKS if found in known)
        return replace(self, links=links)

    def require_intact(self) -> None:
        """Refuse to give numbers if a link is broken.

        Raises:
            AccountingError: If a link is broken, or too many samples are unattributed;
                the message gives the first reason that was found, and its remedy.
        """
        for link in self.broken:
            raise AccountingError(link.sentence)

    def _too_many_unattributed(self) -> str:
        """Say how many samples are unattributed, why, and what can be done."""
        return (
            f"{self.num_unattributed} of {self.num_samples} samples are unattributed: "
            f"it is not known which examples they are. At most {MAX_UNATTRIBUTED:.0%} "
            f"are allowed. {self.cause} Only if you know that no example has several "
            "of these samples in an update, and that the loader drew it for the same "
            "update, as for generated samples, which hold data of no example, pass "
            'Recorder(unattributed="worst_case"): it charges every example that may be '
            "among them at the clip norm, and lists this as an assumption."
        )

    def to_json(self) -> str:
        """Return the chain as the text that a ledger's file stores."""
        facts: dict[str, Any] = {
            "links": [[link.name, link.state, link.sentence] for link in self.links],
            "num_samples": self.num_samples,
            "num_unattributed": self.num_unattributed,
        }
        if self.allows_unattributed:
            facts["allows_unattributed"] = True
        if self.cause:
            facts["cause"] = self.cause
        if self.leaves_epsilon:
            facts["leaves_epsilon"] = list(self.leaves_epsilon)
        return json.dumps(facts, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Custody":
        """Return the chain that ``to_json`` described.

        Args:
            text: The text from a ledger's file.

        Raises:
            ValueError: If it is not such a text.
        """
        try:
            facts = json.loads(text)
            links = tuple(Link(*map(str, entry)) for entry in facts["links"])
            counts = [int(facts[name]) for name in ("num_samples", "num_unattributed")]
            allows = bool(facts.get("allows_unattributed", False))
            cause = str(facts.get("cause", ""))
            leaves = tuple(map(str, facts.get("leaves_epsilon", ())))
        except (KeyError, TypeError, RecursionError, json.JSONDecodeError):
            links, counts, allows, cause, leaves = (), [-1, -1], False, "", ()
        expect(
            0 <= counts[1] <= counts[0],
            "the file's chain of custody",
            repr(text[:80]),
            "must be what the ledger wrote",
            "Restore the file from a copy.",
        )
        return cls(links, counts[0], counts[1], allows, cause, leaves)


def unchecked_in(custodies: Iterable[Custody | None]) -> tuple[Link, ...]:
    """Return the links that any of several runs left unchecked, each name once.

    Args:
        custodies: The chains of the runs; None for a ledger that was made by hand.
    """
    known = (custody for custody in custodies if custody is not None)
    return tuple({k.name: k for custody in known for k in custody.unchecked}.values())
