"""The chain of custody of one run, while it is being recorded.

A link is a condition that makes recorded norms valid, such as "each batch is used
once". Three results are reported for a link: it holds (``check``), it could not be
checked (``leave_unchecked``), or it does not hold (``break_link``). The worst result
counts: a broken link stays broken, and an unchecked link stays unchecked even if it is
later seen to hold.

What was checked before a run was saved holds for the updates until then. A run that is
continued, or a copy that is trained further, must have its links checked again.

This table shows which code reports on which link:

========== =========================================================================
draw       ``draws`` in this room: deliveries of the loader, and what used them
schedule   the recorder, which counts participations; the loader's settings
identity   ``opacus_pi.attribution``: evidence for each sample
rows       ``opacus_pi.attribution`` and the update: one example, one row
model      ``model_probe`` in this room: a forward pass with one example replaced
loss       ``loss_probe`` in this room, or ``engine.audit``
norm       the optimizer: what was clipped, how, and over which parameters
noise      the optimizer: draws of noise, and steps without
weights    ``weights`` in this room: writes between two updates
========== =========================================================================

>>> chain = Chain()
>>> chain.check("draw", "All batches came from the prepared loader.")
>>> chain.break_link("draw", "A batch was used twice. Draw a new one for each update.")
>>> chain.custody().broken[0].name
'draw'
"""

import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from opacus_pi.ledger.custody import (
    BROKEN,
    CHECKED,
    LINKS,
    UNCHECKED,
    Custody,
    Link,
)

__all__ = ["Chain", "SampleCounts"]

# The sentences of links without a report, where more can be said than "not checked".
_NOT_LOOKED_AT = {
    "loss": "The engine does not see the loss that the training loop computes. Call "
    "engine.audit(criterion) before training, and again after loading a checkpoint: "
    "then updates of the loop are checked.",
}
_ONLY_BEFORE = (
    "It was checked for the updates before the run was resumed, and not for those "
    "since. {now}"
)
_ONLY_SINCE = (
    "It was checked for the updates since the run was resumed, and not for those "
    "before. {before}"
)


@dataclass(frozen=True)
class SampleCounts:
    """Counts of the samples that entered updates and of those without a known example.

    Args:
        num_samples: Samples that entered updates.
        num_unattributed: Those of them whose example is not known.
        cause: Why they are unattributed, as a sentence; empty if there are none.
    """

    num_samples: int = 0
    num_unattributed: int = 0
    cause: str = ""

    def plus(self, other: "SampleCounts") -> "SampleCounts":
        """Return the counts of both, with the cause of the first that has one.

        Args:
            other: The counts of another part of the run.
        """
        return SampleCounts(
            self.num_samples + other.num_samples,
            self.num_unattributed + other.num_unattributed,
            self.cause or other.cause,
        )

    def since(self, other: "SampleCounts") -> "SampleCounts":
        """Return the counts of the part of the run that came later.

        Args:
            other: The counts at an earlier moment. Samples of before that were counted
                as unattributed since are left out as far as this can be known.
        """
        num_samples = self.num_samples - other.num_samples
        unattributed = self.num_unattributed - other.num_unattributed
        unattributed = min(max(0, unattributed), num_samples)
        return SampleCounts(
            num_samples, unattributed, self.cause if unattributed else ""
        )


@dataclass(frozen=True)
class _Observer:
    """A function that a chain calls before it is read.

    Args:
        reference: Returns the function; None if its object does not exist any more.
        can_break: Whether it may break a link.
    """

    reference: Callable[[], Callable[[], None] | None]
    can_break: bool


class Chain:
    """Chain of custody of one run: the state of each link, and the reason for it.

    Args:
        count_samples: Function that returns the counts of the run so far. Default: all
            counts are 0.

    Attributes:
        allows_unattributed: Whether any share of unattributed samples is allowed,
            because the recorder has an option that says how to charge them.
    """

    def __init__(
        self,
        count_samples: Callable[[], SampleCounts] = SampleCounts,
    ) -> None:
        self._count_samples = count_samples
        self.allows_unattributed = False
        self._before = SampleCounts()  # those before the run was resumed
        self._undone = SampleCounts()  # those of updates that were undone
        self._evidence: dict[str, str] = {}
        self._doubts: dict[str, list[str]] = {}
        self._settled: set[tuple[str, str]] = set()
        self._reasons: dict[str, str] = {}
        self._leaves_epsilon: set[str] = set()  # names of broken links
        self._awaited: dict[str, str] = {}
        self._earlier: dict[str, Link] = {}  # as they were when the run was saved
        self._is_continued: Callable[[], bool] = _always
        self._refuse: Callable[[str], None] | None = None
        self._observers: list[_Observer] = []
        self._kept: WeakKeyDictionary[nn.Module, list[object]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: the reports, but no functions that report."""
        changed = {"_observers": [], "_is_continued": _always, "_settled": set()}
        return {**self.__dict__, **changed, "_kept": None}

    def on_break(self, refuse: Callable[[str], None]) -> None:
        """Call a function when a link breaks, and for each that is broken already.

        Args:
            refuse: Called with the reason.
        """
        self._refuse = refuse
        for reason in self._reasons.values():
            refuse(reason)

    def on_read(self, observe: Callable[[], None], *, can_break: bool = True) -> None:
        """Call a function whenever the chain is about to be read.

        For checks that are made only when needed, such as reading results from an
        accelerator.

        Args:
            observe: Called without arguments; it reports to this chain. A method is
                referred to weakly, so that the chain keeps no weights in memory.
            can_break: Whether it may break a link. One that only leaves links unchecked
                is not called for ``refusal``.
        """
        is_method = inspect.ismethod(observe)
        reference = weakref.WeakMethod(observe) if is_method else lambda: observe
        self._observers.append(_Observer(reference, can_break))

    def keep_while(self, model: nn.Module, *watchers: object) -> None:
        """Keep objects whose methods were passed to ``on_read`` as long as a model.

        What they have seen is needed when results are read, and the optimizer that used
        them may be gone by then.

        Args:
            model: The user's module; referred to weakly.
            *watchers: The objects; they must not refer to the module strongly.
        """
        if self._kept is None:
            self._kept = WeakKeyDictionary()
        self._kept.setdefault(model, []).extend(watchers)

    def check(self, link: str, evidence: str) -> None:
        """Record that a link was seen to hold.

        Args:
            link: One of ``LINKS``.
            evidence: What was seen, as a sentence.
        """
        self._evidence[link] = evidence

    def await_check(self, link: str, sentence: str) -> None:
        """Say what is known of a link that is looked at later in the run.

        The link is unchecked until something is reported for it.

        Args:
            link: One of ``LINKS``.
            sentence: What was seen so far, and what was not, in sentences.
        """
        self._awaited[link] = sentence

    def leave_unchecked(
        self,
        link: str,
        cause: str,
        *,
        warn: bool = True,
        instead_of: str | None = None,
    ) -> None:
        """Record that a link could not be checked, and warn of it once.

        Args:
            link: One of ``LINKS``.
            cause: What could not be checked and why, and what to do, in sentences.
            warn: Whether to warn. False if another warning has named the cause.
            instead_of: A cause that was reported before and is replaced by this one,
                for example because a number in it has grown.
        """
        doubts = self._doubts.setdefault(link, [])
        if instead_of in doubts:
            doubts.remove(instead_of)
        if cause not in doubts and (link, cause) not in self._settled:
            doubts.append(cause)
            if warn:
                warnings.warn(
                    f"The library assumes, without a check, that {LINKS[link]}. "
                    f"{cause}",
                    stacklevel=3,
                )

    def settle(self, link: str, cause: str) -> None:
        """Record that the cause that left a link unchecked was examined and resolved.

        Args:
            link: One of ``LINKS``.
            cause: The cause that ``leave_unchecked`` was or will be given.
        """
        self._settled.add((link, cause))
        doubts = self._doubts.get(link, [])
        if cause in doubts:
            doubts.remove(cause)

    def break_link(
        self, link: str, reason: str, *, rules_out_epsilon: bool = True
    ) -> None:
        """Record that a link does not hold: from now on no number is given.

        Args:
            link: One of ``LINKS``.
            reason: What was found, what follows, and the remedy, in sentences. Only the
                first reason of a link is kept, or the first that rules out ε.
            rules_out_epsilon: Whether the reason shows that the ε of the engine's
                accountant is no bound for the training. False if this is not known.
        """
        is_new = link not in self._reasons
        if is_new or (rules_out_epsilon and link in self._leaves_epsilon):
            self._reasons[link] = reason
            self._leaves_epsilon -= {link}
            self._leaves_epsilon |= set() if rules_out_epsilon else {link}
        if is_new and self._refuse is not None:
            self._refuse(reason)

    def is_broken(self, link: str) -> bool:
        """Return whether a link was reported not to hold.

        Args:
            link: One of ``LINKS``.
        """
        return link in self._reasons

    def is_reported(self, link: str) -> bool:
        """Return whether anything was reported on a link in this part of the run.

        Args:
            link: One of ``LINKS``.
        """
        known = self._reasons, self._evidence, self._awaited
        return any(link in found for found in known) or bool(self._doubts.get(link))

    def is_checked(self, link: str) -> bool:
        """Return whether a link was seen to hold for all updates so far.

        Args:
            link: One of ``LINKS``.
        """
        return self._link(link).state == CHECKED

    @property
    def num_samples_before(self) -> int:
        """Samples of the updates before a saved state of the run was loaded."""
        return self._before.num_samples

    def undo_samples(self) -> None:
        """Leave out the samples so far: a saved state of the run was loaded."""
        self._before, self._undone = SampleCounts(), self._count_samples()

    def resume(
        self, saved: Custody, is_continued: Callable[[], bool] | None = None
    ) -> None:
        """Go on with the chain of a run that was saved and loaded.

        Args:
            saved: What ``custody`` returned when it was saved.
            is_continued: Returns whether an update was made since; until then links are
                as they were. Default: one was.
        """
        counts = (saved.num_samples, saved.num_unattributed, saved.cause)
        self._before = SampleCounts(*counts)
        self._is_continued = is_continued or _always
        for link in saved.links:
            if link.state == BROKEN and link.name not in self._reasons:
                self._reasons[link.name] = link.sentence
                self._leaves_epsilon |= {link.name} & set(saved.leaves_epsilon)
            elif link.state == UNCHECKED and not self._is_unreported(link):
                self._doubts.setdefault(link.name, []).append(link.sentence)
            else:
                self._earlier[link.name] = link

    def _is_unreported(self, link: Link) -> bool:
        """Return whether nothing was reported on a link that was saved as unchecked."""
        name = link.name
        return link.sentence in (_not_checked(name), self._awaited.get(name))

    def doubts(self) -> dict[str, list[str]]:
        """Return why links are unchecked, in sentences, by name of the link."""
        return {name: list(causes) for name, causes in self._doubts.items()}

    def share(self, doubts: Mapping[str, Sequence[str]]) -> None:
        """Leave links unchecked that another process of the run could not check.

        Args:
            doubts: What its chain returned by ``doubts``. It has warned of them.
        """
        for link, causes in doubts.items():
            for cause in causes:
                self.leave_unchecked(link, cause, warn=False)

    def refusal(self) -> str:
        """Return the reason not to give numbers now; empty if there is none."""
        broken = self.custody(only_breaking=True).broken
        return broken[0].sentence if broken else ""

    def custody(self, *, only_breaking: bool = False) -> Custody:
        """Return the present state of all links, for a ledger.

        Args:
            only_breaking: Whether only broken links are asked for, so that functions
                that leave links unchecked need not be called.
        """
        self._look(only_breaking=only_breaking)
        return self._known()

    def _look(self, *, only_breaking: bool) -> None:
        """Call the functions of ``on_read``, or those that can break a link."""
        for observer in self._observers:
            observe = observer.reference()
            if observe is not None and (observer.can_break or not only_breaking):
                observe()

    def _known(self) -> Custody:
        """Return the links as reported up to now."""
        counts = self._before.plus(self._count_samples().since(self._undone))
        return Custody(
            tuple(self._link(name) for name in LINKS),
            counts.num_samples,
            counts.num_unattributed,
            self.allows_unattributed,
            counts.cause,
            tuple(name for name in LINKS if name in self._leaves_epsilon),
        )

    def _link(self, name: str) -> Link:
        """Return the state of one link, with the sentence that decides it."""
        if name in self._reasons:
            return Link(name, BROKEN, self._reasons[name])
        if self._doubts.get(name):
            return Link(name, UNCHECKED, " ".join(self._doubts[name]))
        sentence = self._awaited.get(name) or _not_checked(name)
        now = Link(name, UNCHECKED, sentence)
        if name in self._evidence:
            now = Link(name, CHECKED, self._evidence[name])
        earlier = self._earlier.get(name)
        return now if earlier is None else self._joined(earlier, now)

    def _joined(self, before: Link, now: Link) -> Link:
        """Return the state of a link over both parts of a run that was resumed.

        Args:
            before: What was known when it was saved.
            now: What is known of the updates since.
        """
        if not self._is_continued():
            return before
        if before.state == now.state:
            return now
        if before.state == CHECKED:
            text = _ONLY_BEFORE.format(now=now.sentence)
        else:
            text = _ONLY_SINCE.format(before=before.sentence)
        return Link(now.name, UNCHECKED, text)


def _not_checked(name: str) -> str:
    """Return the sentence of a link on which nothing was reported."""
    return _NOT_LOOKED_AT.get(name, "It was not checked.")


def _always() -> bool:
    """Return True: a run whose updates are not counted is taken to be continued."""
    return True
