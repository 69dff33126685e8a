"""How far back a rewind goes, what it costs, and what it proves."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opacus_pi.accounting.filtered_rewind import DeletionPolicy
from opacus_pi.accounting.guarantee import Guarantee, rounded_up

__all__ = ["RewindPlan"]

_LITTLE = 0.2  # of a bound: a rewind that lowers it by less hardly helps


@dataclass(frozen=True)
class RewindPlan:
    """The saved state to which a model must go back to forget a set, and the cost.

    Args:
        forget: int64, the examples to forget, sorted.
        forgotten_before: int64, examples that were forgotten by earlier requests.
        start: Number of updates after which the state to go back to was saved;
            ``num_steps`` if the trained model can be kept.
        num_steps: Updates of the training, T.
        first_update: Update in which one of the examples may have been drawn first;
            T + 1 if none was drawn.
        updates_per_epoch: Updates of an epoch of the training.
        num_samples: Samples that are trained on again, as an expectation under Poisson
            sampling.
        num_bytes: Size of the state's file; 0 if no file is read.
        policy: The deletion policy, or None for an exact rewind.
        guarantee: What may be claimed afterwards.
        exact_start: For a filtered rewind, where an exact one would start; None: it has
            no state to go back to, or the rewind is exact.
        num_kept_exact: How many of ``forgotten_before`` an exact rewind has forgotten,
            and limit how late a filtered one may start.
        kept_epsilon: For a filtered rewind, the bound on ε at the policy's δ, in both
            directions, if the trained model were kept; ``inf``: there is none.
        clip_charge: For a filtered rewind, the part of the policy that one update at
            the clip norm may use for one example; above 1 it exceeds the policy.
    """

    forget: NDArray[np.int64]
    forgotten_before: NDArray[np.int64]
    start: int
    num_steps: int
    first_update: int
    updates_per_epoch: float
    num_samples: float
    num_bytes: int
    policy: DeletionPolicy | None
    guarantee: Guarantee
    exact_start: int | None = None
    num_kept_exact: int = 0
    kept_epsilon: float = math.inf
    clip_charge: float = 0.0

    @property
    def is_free(self) -> bool:
        """Return whether the trained model can be kept."""
        return self.start == self.num_steps

    @property
    def cost(self) -> float:
        """Share of the updates of the training that must be made again, in [0, 1]."""
        return 1 - self.start / self.num_steps

    @property
    def cost_text(self) -> str:
        """How far back the rewind goes, and what is trained again, in words."""
        if self.is_free:
            return (
                "The trained model can be kept: nothing is trained again. (A model "
                "with other weights than the training left is refused.)"
                f"{self._compared()}"
            )
        kept = (
            " This state is from before the first use of the examples that an "
            f"earlier exact rewind has forgotten ({self.num_kept_exact}), which "
            "stay exactly forgotten."
        )
        return (
            f"Go back to the state after update {self.start} of {self.num_steps} "
            f"({self.num_bytes} bytes) and make {self.num_updates} "
            f"updates again: {self.cost:.1%} of the training, about "
            f"{self.num_samples:.0f} samples.{kept * bool(self.num_kept_exact)}"
            f"{self._compared()}"
        )

    def _compared(self) -> str:
        """Compare a filtered rewind with an exact one, and with keeping the model.

        Empty if this one is exact, or is free where an exact one is not.
        """
        if self.policy is None:
            return ""
        if self.exact_start is not None and self.exact_start >= self.start:
            why = (
                " The noise is too small for this policy: one update at the clip norm "
                "may exceed it."
            )
            return (
                " An exact rewind (without the deletion policy) does not need more "
                f"updates and has ε = 0.{why * (self.clip_charge > 1)}"
            )
        if self.is_free:
            return ""
        exact = ""
        if self.exact_start is not None:
            updates = self.num_steps - self.exact_start
            exact = f" An exact rewind makes {updates} updates again and has ε = 0."
        return f"{exact}{self._lowers()}"

    def _lowers(self) -> str:
        """Compare the policy with the bound of the trained model; empty without one."""
        if self.policy is None or math.isinf(self.kept_epsilon):
            return ""
        share = 1 - self.policy.epsilon / self.kept_epsilon
        verdict = ", so it hardly helps" * (share < _LITTLE)
        return (
            f" Without any rewind ε is at most {rounded_up(self.kept_epsilon)}; this "
            f"one lowers the bound to {rounded_up(self.policy.epsilon)}, by "
            f"{100 * share:.2g} %{verdict}."
        )

    @property
    def num_updates(self) -> int:
        """Updates that must be made again."""
        return self.num_steps - self.start

    def facts(self) -> dict[str, Any]:
        """Return a dict that describes the planned run and can be written as JSON."""
        return {
            "method": "exact rewind" if self.policy is None else "filtered rewind",
            "forget_indices": self.forget.tolist(),
            "forgotten_before": self.forgotten_before.tolist(),
            "policy": None if self.policy is None else asdict(self.policy),
            "start": self.start,
            "num_steps": self.num_updates,
            "num_kept_exact": self.num_kept_exact,
        }

    @property
    def gone(self) -> NDArray[np.int64]:
        """All examples that are forgotten afterwards, sorted."""
        return np.union1d(self.forgotten_before, self.forget)

    def __str__(self) -> str:
        return self.text()

    def text(self, delta: float | None = None) -> str:
        """Return the plan in words.

        Args:
            delta: δ in (0, 1) of the guarantee's ε. Default: that of the policy, or
                1e-5.
        """
        if delta is None:
            delta = 1e-5 if self.policy is None else self.policy.delta
        drawn = (
            "None of them was ever drawn."
            if self.first_update > self.num_steps
            else f"None of them was drawn before update {self.first_update}."
        )
        return (
            f"Examples to forget: {len(self.forget)}; forgotten before: "
            f"{len(self.forgotten_before)}. {drawn}\n{self.cost_text}\n"
            f"{self.guarantee.text(delta, in_full=False)}"
        )
