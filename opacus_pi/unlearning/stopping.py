"""When to stop unlearning: as soon as the evidence says that it is enough.

>>> trace = UnlearningTrace([0, 1, 2], {"forget_loss": [0.1, 0.5, 0.58]})
>>> StopWhen("forget_loss", target=0.6).reached(trace)
True
"""

import math
from dataclasses import dataclass

from opacus_pi._validate import expect, in_range
from opacus_pi.evaluation.trace import UnlearningTrace, arrived


@dataclass(frozen=True)
class StopWhen:
    """Stop once a metric has been near its target for some evaluations in a row.

    "Near" is what ``time_to_unlearn`` counts as there. Stopping by a metric that sees
    the forget set makes the number of updates depend on it: unlearning then is no mere
    post-processing of the trained model, and its guarantee is empirical.

    Args:
        metric: Name of a number that ``evaluate`` returns.
        target: The value of retrained models, or another goal.
        tolerance: Largest distance that counts as there, at least 0.
        patience: Evaluations in a row that must be there, at least 1.

    Raises:
        ValueError: If a number leaves its range.
    """

    metric: str
    target: float
    tolerance: float = 0.05
    patience: int = 1

    def __post_init__(self) -> None:
        expect(
            math.isfinite(self.target),
            "target",
            self.target,
            "must be finite",
            "Take the mean over retrained models.",
        )
        in_range(0, math.inf, tolerance=self.tolerance, remedy="0.05 is usual.")
        in_range(1, math.inf, patience=self.patience, remedy="1 stops at once.")

    def reached(self, trace: UnlearningTrace) -> bool:
        """Whether the latest evaluations are all there.

        Args:
            trace: The evaluations so far.

        Raises:
            ValueError: If the metric was not evaluated.
        """
        there = arrived(
            trace, self.target, metric=self.metric, tolerance=self.tolerance
        )
        return len(there) >= self.patience and bool(there[-self.patience :].all())
