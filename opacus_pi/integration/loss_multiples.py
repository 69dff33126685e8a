"""Judge the factors by which a training loop multiplies an audited loss.

A loop may multiply the criterion, so that all gradients of an update are one multiple
of those that were audited. A constant factor is harmless, and so is one that follows
the number of the update, such as a warm-up of the loss. A factor that depends on the
batch is not: no gradient belongs to one example then. The factor alone does not show
which kind it is, so one that changes leaves the link "loss" unchecked. It breaks the
link where it is seen to follow the batch: the number of its samples, as the sum of the
losses in place of their mean does, or the loss of the batch, as its logarithm or its
square root does. It also breaks the link if the batch has ignored labels and the
criterion divides by a quantity of all its labels, such as the number of the others.

*Guarantee.* A factor is said to follow the batch only if, in six comparisons in a row,
its quotient by the quantity (or by a power of it) stays the same, and it both rises and
falls. For the loss, whose values are no whole numbers, four are enough. The factors of
most schedules do not rise and fall.

*What breaks it.* If a factor follows another quantity of the batch, such as the sign of
a sum, or follows it in fewer comparisons, the link is only left unchecked.
"""

import math
from dataclasses import dataclass

from opacus_pi.custody import Chain

__all__ = ["LossMultiples"]

_ALIKE = 1e-3  # relative difference of two factors that counts as none
_LARGEST_TOLERANCE = 4e-3  # of a factor that is compared with quantities of the batch
_NUM_SIZES, _NUM_LOSSES = 6, 4  # comparisons in a row
_SCALED = (
    "All gradients of an update were {ratio:.4g} times those of the audited criterion. "
    "A constant factor is allowed. A factor that depends on the batch is not: a sum of "
    "losses in place of their mean has such a factor. Which kind this one is could "
    "not be checked. Put the factor into the criterion, and audit that."
)
_VARYING = (
    "All gradients of an update were {ratio:.4g} times those of the audited criterion, "
    "and in another update {before:.4g} times. So the loop multiplies its loss or its "
    "gradients by a factor that changes. If the factor follows the number of the "
    "update, as in a warm-up of the loss or in a GradScaler, nothing needs to be done. "
    "If it depends on the batch, no gradient belongs to one example: call "
    "criterion(model(x), y) without a factor. Which kind this one is could not be "
    "checked."
)
_FOLLOWING = (
    "All gradients of an update were {ratio:.4g} times those of the audited criterion, "
    "and in another update {before:.4g} times. In {count} comparisons in a row, this "
    "factor followed the batch: it depended on {what}. So no gradient belongs to one "
    "example. This happens if the loop trains on the sum of the losses and their mean "
    "was audited, or on the logarithm or the square root of the audited loss. Call "
    "criterion(model(x), y) without a factor."
)
_IGNORED = (
    "All gradients of an update were {ratio:.4g} times those of the audited criterion, "
    "and in another update {before:.4g} times. The batch of the first one has labels "
    "that the criterion ignores, and the criterion divides by a quantity of the labels "
    "of the whole batch. So the loss of an example depends on the labels of the "
    "others, or the factor does. Call and audit a criterion that returns one loss for "
    "each example, such as the mean over its own labels."
)


@dataclass
class _Quantity:
    """A power of a quantity of the batch, and how often factors were a multiple of it.

    Args:
        name: What it is.
        power: The power.
        num_needed: After how many comparisons in a row it is said to be followed.
    """

    name: str
    power: float
    num_needed: int
    count: int = 0  # comparisons in a row that have one quotient
    has_risen: bool = False  # the size of the factor, among them
    has_fallen: bool = False
    low: float = 0.0  # logarithms of the quotients
    high: float = 0.0
    last: float = 0.0  # factor

    def is_followed(self, factor: float, value: float, tolerance: float) -> bool:
        """Return whether enough factors in a row were a multiple of the quantity.

        Args:
            factor: The newest factor, not 0.
            value: The quantity of its batch, before the power.
            tolerance: The relative difference that rounding may cause.
        """
        if not 0 < value < math.inf:
            return False
        size, before = math.log(abs(factor)), self.last
        quotient, self.last = size - self.power * math.log(value), factor
        low, high = min(self.low, quotient), max(self.high, quotient)
        if not self.count or before * factor < 0 or high - low > 2 * tolerance:
            self.count, self.has_risen, self.has_fallen = 1, False, False
            self.low = self.high = quotient
            return False
        self.count, self.low, self.high = self.count + 1, low, high
        step = size - math.log(abs(before))
        self.has_risen |= step > 4 * tolerance
        self.has_fallen |= step < -4 * tolerance
        return self.count >= self.num_needed and self.has_risen and self.has_fallen


class LossMultiples:
    """Compares the factors of the updates with each other and with their batches.

    Args:
        chain: The chain of custody of the run; its link "loss" is left unchecked or
            broken.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._scaled, self._is_varying_said = "", False
        self._first: float | None = None
        self._sizes = [
            _Quantity("the number of its samples", power, _NUM_SIZES)
            for power in (1, -1)
        ]
        self._losses = [
            _Quantity("its loss", power, _NUM_LOSSES) for power in (-1, -0.5, 1)
        ]

    def saw(
        self,
        factor: float,
        *,
        size: int,
        num_passes: int = 1,
        loss: float = math.nan,
        tolerance: float = _ALIKE,
    ) -> None:
        """Compare a factor of the gradients of the outputs with those before.

        Args:
            factor: By which the gradients differ from the criterion's.
            size: The number of samples of the pass.
            num_passes: The number of passes of the update. A loop may divide by it.
            loss: The audited criterion of the pass; NaN: not known.
            tolerance: The relative difference that rounding may cause.
        """
        if num_passes > 1 and abs(factor * num_passes - 1) <= tolerance:
            return
        before = self._first
        if before is None:
            before = self._first = factor
        if factor and tolerance <= _LARGEST_TOLERANCE:
            self._compare_with_batch(factor, before, size, loss, tolerance)
        if abs(factor - before) > tolerance * abs(before):
            self.varies(factor, before)

    def _compare_with_batch(
        self, factor: float, before: float, size: int, loss: float, tolerance: float
    ) -> None:
        """Break the link if the factors follow a quantity of their batches."""
        for value, quantities in ((float(size), self._sizes), (loss, self._losses)):
            for quantity in quantities:
                if quantity.is_followed(factor, value, tolerance):
                    text = _FOLLOWING.format(
                        ratio=factor,
                        before=before,
                        count=quantity.num_needed,
                        what=quantity.name,
                    )
                    self._chain.break_link("loss", text)

    def is_scaled(self, ratio: float) -> None:
        """Leave the link unchecked: the gradients of all updates have one factor.

        Args:
            ratio: The factor.
        """
        if not self._scaled and not self._is_varying_said:
            self._scaled = _SCALED.format(ratio=ratio)
            self._chain.leave_unchecked("loss", self._scaled)

    def varies(self, ratio: float, before: float, *, coupling: str = "") -> None:
        """Tell the chain that the factor of an update is not that of another one.

        Args:
            ratio: The factor.
            before: The other one.
            coupling: Why the examples of the batch have no loss of their own; empty if
                each has one.
        """
        if coupling:
            self._chain.break_link("loss", _IGNORED.format(ratio=ratio, before=before))
        elif not self._is_varying_said:
            self._is_varying_said = True
            text = _VARYING.format(ratio=ratio, before=before)
            self._chain.leave_unchecked("loss", text, instead_of=self._scaled or None)
