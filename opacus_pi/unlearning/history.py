"""What earlier runs of unlearning were, as far as a guarantee depends on it.

A model is the work of all runs since its training: one that looked at its forget set,
or that evidence could have ended early, costs every later claim about the model.

>>> from opacus_pi.unlearning.methods import FineTune
>>> History().after(FineTune(), None)
History(stop=None, looked='')
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from opacus_pi.unlearning.methods import Method
from opacus_pi.unlearning.stopping import StopWhen


@dataclass(frozen=True)
class History:
    """The runs that a model went through.

    Args:
        stop: What could have ended one of them early, or None.
        looked: Why not all of them are known not to have looked at the forget set;
            empty if they are.
    """

    stop: StopWhen | None = None
    looked: str = ""

    def after(self, method: Method, stop: StopWhen | None) -> "History":
        """The same with one run more.

        Args:
            method: By which.
            stop: What could end it early, or None.
        """
        looks = f"{type(method).__name__} uses it" if method.needs_forget_set else ""
        return History(stop or self.stop, looks or self.looked)

    def joined(self, other: "History") -> "History":
        """The runs of both."""
        return History(other.stop or self.stop, other.looked or self.looked)

    @property
    def text(self) -> str:
        """JSON of it."""
        return json.dumps(asdict(self))


UNKNOWN = History(looked="an earlier run is not described")


def history_of(text: str | None) -> History | None:
    """Read what ``text`` wrote.

    Args:
        text: The JSON; ``None`` of weights that say nothing about it.

    Returns:
        The runs, ``None`` if the text says nothing of the kind.
    """
    if text is None:
        return UNKNOWN
    try:
        found: dict[str, Any] = json.loads(text)
        stop = found["stop"]
        rule = None if stop is None else StopWhen(**stop)
        history = History(rule, found["looked"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return history if isinstance(history.looked, str) else None
