"""An accountant for Opacus that speaks of whole groups of examples.

Registered as ``"group"``. Its ``get_epsilon`` holds for **any** m examples at once:

>>> accountant = GroupAccountant()
>>> for _ in range(100):
...     accountant.step(noise_multiplier=4.0, sample_rate=0.01)
>>> one = accountant.get_epsilon(1e-5)
>>> accountant.group_size = 4
>>> 0 < one < accountant.get_epsilon(1e-5) < 4 * one
True
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from opacus.accountants import RDPAccountant

from opacus_pi._errors import AccountingError
from opacus_pi._validate import expect
from opacus_pi.accounting import GramLedger, group_divergence, rdp_to_epsilon
from opacus_pi.accounting.group.worst_case import group_step_divergence
from opacus_pi.integration.accountants import num_steps_of

__all__ = ["GroupAccountant"]

GROUP_ORDERS = (*(1 + np.geomspace(0.01, 1, 20)), *np.geomspace(2, 64, 24)[1:])
_SET_ORDERS = (1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
_SIZE = "group_size"


class GroupAccountant(RDPAccountant):
    """Group privacy of DP-SGD, and an estimate for removing one given group.

    Opacus's engine makes it for groups of one example, where ``get_epsilon`` is plain
    Rényi accounting. Set ``group_size`` at any time: the record of updates is the same
    for all groups. Like Opacus's accountants it assumes Poisson sampling.

    Args:
        group_size: m, examples added or removed together; at least 1.

    Raises:
        ValueError: If the size is no whole number above 0.
    """

    def __init__(self, group_size: int = 1) -> None:
        super().__init__()
        self.group_size = group_size

    @classmethod
    def mechanism(cls) -> str:
        """The name it is registered by."""
        return "group"

    @property
    def group_size(self) -> int:
        """How many examples ``get_epsilon`` speaks of at once."""
        return self._group_size

    @group_size.setter
    def group_size(self, value: int) -> None:
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        expect(
            whole and value >= 1,
            _SIZE,
            repr(value),
            "must be a whole number above 0",
            "Count the examples that are added or removed together.",
        )
        self._group_size = int(value)

    def get_privacy_spent(
        self, *, delta: float, alphas: Sequence[float] | None = None
    ) -> tuple[float, float]:
        """Epsilon for any ``group_size`` examples, and the order that gave it.

        Args:
            delta: Failure probability, in (0, 1).
            alphas: Rényi orders to choose from.

        Returns:
            Epsilon and order. For groups of one, Opacus's own.
        """
        if self.group_size == 1 or not self.history:
            spent: tuple[float, float] = super().get_privacy_spent(
                delta=delta, alphas=alphas
            )
            return spent
        orders = np.asarray(GROUP_ORDERS if alphas is None else alphas, np.float64)
        each = [float(rdp_to_epsilon([self.divergence(a)], [a], delta)) for a in orders]
        best = int(np.argmin(each))
        return each[best], float(orders[best])

    def divergence(
        self, order: float, gram_ledger: GramLedger | None = None, **options: Any
    ) -> float:
        """Rényi divergence of training with a group from training without it.

        Args:
            order: Rényi order, above 1.
            gram_ledger: Of one group, from ``group_record.gram_ledger``. Default: the
                worst case over all groups of ``group_size`` examples, which is a bound
                in both directions.
            **options: Of ``opacus_pi.accounting.group_divergence``.

        Returns:
            The divergence, in nats. A given group's is an estimate of a bound, from
            one run; it is never above the worst case of its size.

        Raises:
            AccountingError: If the ledger is not of the updates that were counted.
            ValueError: As ``group_divergence``.
        """
        if gram_ledger is not None:
            self._require_counted(gram_ledger)
            return group_divergence(gram_ledger, order, **options)
        expect(
            order > 1, "order", order, "must be above 1", "Rényi orders here exceed 1."
        )
        total: float = sum(
            num_steps
            * group_step_divergence(_ratio(noise), rate, self.group_size, order)
            for noise, rate, num_steps in self.history
        )
        return total

    def epsilon(
        self,
        delta: float,
        gram_ledger: GramLedger,
        *,
        orders: Sequence[float] = _SET_ORDERS,
        method: str = "scalar",
        **options: Any,
    ) -> float:
        """Epsilon of removing one given group: an estimate, as the divergence is.

        What is estimated is one-sided: with the group every event has at most e^ε times
        the probability that it has without it, plus δ. Sensitive, like the ledger.

        Args:
            delta: Failure probability, in (0, 1).
            gram_ledger: The group's, from ``group_record.gram_ledger``.
            orders: Rényi orders to choose from.
            method: Of ``group_divergence``. The default is deterministic; a minimum
                over orders of Monte Carlo values would choose the lowest error.
            **options: More of ``group_divergence``.

        Returns:
            Epsilon, at least 0.

        Raises:
            AccountingError: If the ledger is not of the updates that were counted.
            ValueError: As ``group_divergence``.
        """
        values = [
            self.divergence(order, gram_ledger, method=method, **options)
            for order in orders
        ]
        return float(rdp_to_epsilon(values, orders, delta))

    def state_dict(self, destination: dict[str, Any] | None = None) -> dict[str, Any]:
        """History and group size.

        Args:
            destination: A dict to fill; default: a new one.
        """
        state: dict[str, Any] = super().state_dict(destination)
        state[_SIZE] = self.group_size
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue what ``state_dict`` saved.

        Args:
            state_dict: What ``state_dict`` returned.

        Raises:
            ValueError: If it is no state of this kind of accountant.
        """
        super().load_state_dict(state_dict)
        self.group_size = state_dict.get(_SIZE, self.group_size)

    def _require_counted(self, gram_ledger: GramLedger) -> None:
        """Refuse a ledger of other updates."""
        recorded, counted = gram_ledger.mechanism.num_steps, num_steps_of(self)
        if recorded != counted:
            raise AccountingError(
                f"{counted} updates were counted, and the Gram ledger is of a run of "
                f"{recorded}. Compute it from the ledger of this training when it ends."
            )


def _ratio(noise_multiplier: float) -> float:
    """C / σ; without noise nothing is hidden."""
    return 1 / noise_multiplier if noise_multiplier > 0 else float("inf")
