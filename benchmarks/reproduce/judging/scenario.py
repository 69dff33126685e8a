"""A simulated study of known truth, and how often its judge gives each verdict.

*Without the effect*, "borne out" is an error: its rate is the size of the judge. *With
the effect*, "borne out" is right: its rate is the power, and "not borne out" is an
error. A claim that must not be confirmed for another reason (a damaged model, too few
oracles) counts as one without the effect.

Some errors cannot be avoided with a few trainings or sets: what is rare is often not
drawn. Such scenarios are simulated, too, and listed as *known to fool* their judge.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    NOT_TESTABLE,
    UNDECIDED,
    Verdict,
)

Rng = np.random.Generator
KINDS = (BORNE_OUT, NOT_BORNE_OUT, UNDECIDED, NOT_TESTABLE)


@dataclass(frozen=True)
class Scenario:
    """A study of known truth.

    Attributes:
        judge: The judge, and the figures that use it.
        name: What is simulated.
        effect: Whether the claim is true in it.
        draw: Draws the numbers and returns the verdict.
        fools: It is known to fool the judge in more than 5 % of the studies.
        draws: Studies to simulate; fewer where every choice of the sets is judged.
    """

    judge: str
    name: str
    effect: bool
    draw: Callable[[Rng], Verdict]
    fools: bool = False
    draws: int = 400

    def verdicts(self, draws: int) -> list[str]:
        """Return the verdict of each draw; the first ones are the same at each call."""
        rng = np.random.default_rng(0)
        return [self.draw(rng).verdict for _ in range(draws)]


def counted(verdicts: list[str]) -> dict[str, int]:
    """Return how often each verdict was given."""
    return {kind: verdicts.count(kind) for kind in KINDS}
