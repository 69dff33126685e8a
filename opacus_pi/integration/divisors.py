"""Find a divisor of noised gradients that changes from update to update.

DP-SGD divides the sum with noise by the expected batch size, which is the same number
whoever was drawn. A loop that sets ``optimizer.expected_batch_size = len(batch)``
divides the noise by a number that depends on who was drawn: with one example more, the
noise on every weight is smaller, also if this example's gradient is 0.

*Guarantee.* In every update the number is compared with the one of the update before.
A constant that was set before the first update is accepted, unless it is the number of
samples of that update.

*What breaks it.* A number that was computed from the data set, and then stays. Writes
to gradients that have the same effect are found by ``noised_steps``.
"""

from opacus.optimizers import DPOptimizer

from opacus_pi.custody import Chain
from opacus_pi.ledger.custody import CHANGED_DIVISOR

__all__ = ["Divisor"]


class Divisor:
    """The number by which an optimizer of Opacus divides sums of gradients.

    Args:
        optimizer: The optimizer, as ``make_private`` prepared it.
        chain: The chain of custody of the run.
    """

    def __init__(self, optimizer: DPOptimizer, chain: Chain) -> None:
        self._chain, self._number = chain, optimizer.expected_batch_size
        self._is_first = True

    def is_used(self, optimizer: DPOptimizer, num_samples: int) -> None:
        """Compare the number by which an update is divided with the one before.

        Args:
            optimizer: The optimizer that is about to divide.
            num_samples: Samples that entered the update.
        """
        number, before = optimizer.expected_batch_size, self._number
        is_first, self._is_first, self._number = self._is_first, False, number
        if number == before or optimizer.loss_reduction != "mean":
            return
        if not is_first or number == num_samples:
            self._chain.leave_unchecked("noise", CHANGED_DIVISOR)
