"""An accountant for Opacus that bounds the privacy loss of groups of examples.

``opacus_pi.integration`` registers it as ``"group"``. Its ``get_epsilon`` holds for
**any** group of m examples that are added or removed together:

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
from opacus_pi.recording import Recorder

__all__ = ["GroupAccountant"]

# The larger the group, the closer to 1 is the best order: hence many orders below 2.
_WORST_CASE_ORDERS = (*(1 + np.geomspace(0.01, 1, 20)), *np.geomspace(2, 64, 24)[1:])
# Fewer orders for a given group: each order evaluates all its Gram matrices.
_GIVEN_GROUP_ORDERS = (1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
_SIZE = "group_size"


class GroupAccountant(RDPAccountant):
    """Group privacy of DP-SGD, and an estimate for removing one given group.

    ``PrivacyEngine(accountant="group")`` creates it for groups of one example, for
    which ``get_epsilon`` is plain Rényi accounting. Set ``group_size`` at any time,
    also after training: the history of updates does not depend on it. Like Opacus's
    accountants it assumes Poisson sampling.

    Args:
        group_size: m, the number of examples added or removed together; at least 1.

    Raises:
        ValueError: If the size is not a whole number above 0.
    """

    # None: not the accountant of a run that an engine records
    _recorder: Recorder | None = None

    def __init__(self, group_size: int = 1) -> None:
        super().__init__()
        self.group_size = group_size

    def follow(self, recorder: Recorder) -> None:
        """Make the methods for groups raise if the recorded run has a broken link.

        Args:
            recorder: The engine's recorder.
        """
        self._recorder = recorder

    def _require_intact(self) -> None:
        """Raise ``AccountingError`` if the run was not what the history describes."""
        reason = "" if self._recorder is None else self._recorder.refusal
        if reason:
            raise AccountingError(reason)

    @classmethod
    def mechanism(cls) -> str:
        """Return the name under which the accountant is registered."""
        return "group"

    @property
    def group_size(self) -> int:
        """Number of examples in the groups for which ``get_epsilon`` holds."""
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
        """Return epsilon for any ``group_size`` examples, and the best Rényi order.

        Args:
            delta: Failure probability, in (0, 1).
            alphas: Rényi orders to choose from. Default: 43 from 1.01 to 64; for
                groups of one, Opacus's own.

        Returns:
            The smallest epsilon over the orders, and its order. For groups of one these
            are Opacus's own values.

        Raises:
            AccountingError: If groups are larger, and a link of the chain of custody is
                broken.
        """
        if self.group_size == 1 or not self.history:
            spent: tuple[float, float] = super().get_privacy_spent(
                delta=delta, alphas=alphas
            )
            return spent
        orders = np.asarray(
            _WORST_CASE_ORDERS if alphas is None else alphas, np.float64
        )
        each = [float(rdp_to_epsilon([self.divergence(a)], [a], delta)) for a in orders]
        best = int(np.argmin(each))
        return each[best], float(orders[best])

    def divergence(
        self, order: float, gram_ledger: GramLedger | None = None, **options: Any
    ) -> float:
        """Return the Rényi divergence between training with and without a group.

        Args:
            order: Rényi order, above 1.
            gram_ledger: The Gram matrices of one group, from
                ``opacus_pi.recording.gram_ledger``. Default: the worst
                case over all groups of ``group_size`` examples, which is a bound in
                both directions.
            **options: Options of ``opacus_pi.accounting.group_divergence``.

        Returns:
            The divergence, in nats. For a given group it is an estimate of a bound,
            from one run; it is never above the worst case of the group's size.

        Raises:
            AccountingError: If the Gram ledger has another number of updates than were
                counted, or a link of the chain of custody is broken.
            ValueError: As ``group_divergence``.
        """
        self._require_intact()
        if gram_ledger is not None:
            self._require_counted(gram_ledger)
            return group_divergence(gram_ledger, order, **options)
        expect(
            order > 1,
            "order",
            order,
            "must be above 1",
            "Pass a Rényi order above 1: group bounds hold for no others.",
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
        orders: Sequence[float] = _GIVEN_GROUP_ORDERS,
        method: str = "scalar",
        **options: Any,
    ) -> float:
        """Return an estimate of epsilon for removing one given group.

        The estimate is one-sided: training with the group gives every event at most e^ε
        times the probability that training without it gives, plus δ. It is sensitive,
        like the ledger: it says how unusual the group is.

        Args:
            delta: Failure probability, in (0, 1).
            gram_ledger: The Gram matrices of the group, as for ``divergence``.
            orders: Rényi orders to choose from.
            method: Method of ``group_divergence``. The default is deterministic. With a
                Monte Carlo method the minimum over orders would select the value with
                the most favourable error.
            **options: Further options of ``group_divergence``.

        Returns:
            Epsilon, at least 0.

        Raises:
            AccountingError: If the Gram ledger has another number of updates than were
                counted.
            ValueError: As ``group_divergence``.
        """
        values = [
            self.divergence(order, gram_ledger, method=method, **options)
            for order in orders
        ]
        return float(rdp_to_epsilon(values, orders, delta))

    def state_dict(self, destination: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the history and the group size.

        Args:
            destination: A dict to fill. Default: a new one.

        Returns:
            The dict, for ``load_state_dict``.
        """
        state: dict[str, Any] = super().state_dict(destination)
        state[_SIZE] = self.group_size
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state_dict: A dict returned by ``state_dict()``.

        Raises:
            ValueError: If it is not the state of such an accountant; nothing is changed
                then.
        """
        before = self.group_size
        self.group_size = (state_dict or {}).get(_SIZE, before)
        try:
            super().load_state_dict(state_dict)
        except ValueError:
            self.group_size = before
            raise

    def _require_counted(self, gram_ledger: GramLedger) -> None:
        """Raise unless a Gram ledger has as many updates as were counted."""
        recorded, counted = gram_ledger.mechanism.num_steps, num_steps_of(self)
        if recorded != counted:
            raise AccountingError(
                f"The accountant has counted {counted} updates, but the Gram ledger "
                f"describes a run of {recorded}. After the training has ended, "
                "compute the Gram ledger from the ledger of this training "
                "(opacus_pi.recording.gram_ledger)."
            )


def _ratio(noise_multiplier: float) -> float:
    """Return C / σ, the ratio of the clip norm to the noise; infinite without noise."""
    return 1 / noise_multiplier if noise_multiplier > 0 else float("inf")
