"""Individual privacy budgets: leave an example out before it exceeds its budget.

>>> budget = RenyiFilter(budget=1.0, order=8.0)
>>> budget.begin(num_examples=3)
>>> budget.admit([0, 2], ratios=[0.4, 0.6])  # 8·0.4²/2 = 0.64, 8·0.6²/2 = 1.44
array([ True, False])
>>> budget.admit([0, 1], ratios=[0.4, 0.4])
array([False,  True])
>>> budget.spent.round(9)
array([0.64, 0.64, 0.  ])

**Idea.** Charge an example for each step that contains it, before the step's noise is
drawn, and leave it out as soon as the next charge would exceed its budget. Because the
sum of charges is limited on every path, the example's privacy is limited too, although
the charges depend on the model and therefore on earlier noise.

**Guarantee.** Let P be the distribution of all outputs with an example and Q without
it. A step that contains the example adds Gaussian noise to a vector that the example
moves by r standard deviations, and r is known before the noise is drawn. If every
decision depends only on past outputs and on the example itself, then Σr² ≤
2·budget/order on every path, and so (Feldman and Zrnic)

    D_a(P ‖ Q) ≤ a·budget/order  and  D_a(Q ‖ P) ≤ a·budget/order  at every order a > 1.

More is true. Spend what is left of the budget on one more Gaussian release, which can
only help the adversary. Then log dP/dQ is a sum of Gaussian steps whose variances add
up to the constant μ² = 2·budget/order, so it is exactly that of one Gaussian shift of
μ standard deviations. ``epsilons`` are those of this shift (Smith and Thakurta; Koskela
et al.).

**What breaks it.** A charge computed after the noise, or from anything but the past and
the example itself. Also amplification by sampling: the charge is that of a step known
to contain the example (sample rate 1), made at the steps that do. That conditions on
the schedule of batches, which does not depend on the data, and the divergences are
jointly convex. To charge only those steps *and* at the amplified rate is wrong.
Amplification assumes that the adversary does not know which steps contained the
example, but an example whose charges depend on when it was sampled reveals this by its
absence. Amplified charges would have to be made at every step, sampled or not.

What was spent, and which examples were left out, reveals unusual examples: it is as
sensitive as the data. ``spent`` is no bound; it is itself a function of the outputs.

Source: Feldman and Zrnic 2021 (arXiv:2008.11193); Smith and Thakurta 2022
(arXiv:2210.17520); Koskela, Tobaben and Honkela 2023 (arXiv:2209.15596).
"""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi._validate import distinct_indices, expect, in_range, numbers, positive
from opacus_pi.accounting.conversion import gaussian_epsilon, gaussian_mu
from opacus_pi.ledger.checks import frozen
from opacus_pi.ledger.same_data import same_data_set

Array = NDArray[np.float64]


class RenyiFilter:
    """Filter that keeps every example's Rényi divergence within its budget.

    Args:
        budget: Nats of Rényi divergence at ``order``, above 0: one number for all
            examples, or one for each, ``(n,)``; ``inf``: no limit. It must be chosen
            without looking at the data.
        order: Rényi order at which budgets and charges are counted, above 1. A Gaussian
            step's divergence is proportional to the order, so this is a unit: budget 2
            at order 16 is budget 1 at order 8.

    Raises:
        ValueError: If a budget is not above 0, or the order not above 1.

    Source: Feldman and Zrnic 2021 (arXiv:2008.11193).
    """

    def __init__(self, budget: ArrayLike, order: float = 8.0) -> None:
        in_range(
            1,
            np.inf,
            closed=False,
            order=order,
            remedy="Try 8.",
        )
        budgets = numbers("budget", budget).copy()
        expect(
            budgets.ndim <= 1,
            "budget",
            f"an array of shape {budgets.shape}",
            "must be a number or one number per example",
            "Pass one number for all, or a flat list with one for each example.",
        )
        positive(
            budget=budgets,
            remedy="To exclude an example altogether, remove it from the data set.",
        )
        self.budget, self.order = frozen(budgets), float(order)
        self._spent: Array | None = None
        self._data_set = ""

    @classmethod
    def from_epsilon(
        cls, epsilon: ArrayLike, delta: float, order: float = 8.0
    ) -> "RenyiFilter":
        """Return the filter with the largest budgets that guarantee (epsilon, delta).

        Args:
            epsilon: Above 0, one number or ``(n,)``.
            delta: δ in (0, 1).
            order: Rényi order in which the budgets are expressed.

        Returns:
            The filter, before ``begin``.

        Raises:
            ValueError: If an argument is outside its domain.
        """
        positive(
            epsilon=epsilon,
            remedy=("Pass a larger epsilon: at 0 no example could be trained on."),
        )
        return cls(order * gaussian_mu(epsilon, delta) ** 2 / 2, order)

    def __repr__(self) -> str:
        same = self.budget.ndim == 0
        budget = f"{float(self.budget):g}" if same else f"<{self.budget.size} numbers>"
        return f"RenyiFilter(budget={budget}, order={self.order:g})"

    @property
    def spent(self) -> Array:
        """Charges so far in nats, float64 ``(n,)``; sensitive, and not a bound.

        Raises:
            ValueError: Before ``begin``.
        """
        spent: Array = self._checked_spent().copy()
        return spent

    def begin(self, num_examples: int, data_set: str = "") -> None:
        """Set the data set of the budgets; later calls must name the same one.

        Args:
            num_examples: Number of examples, n.
            data_set: The data set's fingerprint.

        Raises:
            ValueError: If the budgets are for another number of examples, or charges
                have been made for another data set.
        """
        expect(
            self.budget.ndim == 0 or self.budget.size == num_examples,
            "budget",
            f"{self.budget.size} numbers",
            f"must be one number, or one for each of {num_examples} examples",
            "Give one number for all, or one for each example of the data set.",
        )
        if self._spent is None:
            self._spent, self._data_set = np.zeros(num_examples), data_set
        expect(
            self._spent.size == num_examples
            and same_data_set(self._data_set, data_set),
            "data_set",
            f"{data_set!r} with {num_examples} examples",
            f"must be the data set of the filter, {self._data_set!r} with "
            f"{self._spent.size} examples",
            "Make a new RenyiFilter for another data set.",
        )

    def admit(self, indices: ArrayLike, ratios: ArrayLike) -> NDArray[np.bool_]:
        """Charge the examples that may be in a step, and leave out the others.

        An example is admitted if the charges so far plus order·r²/2 are within its
        budget. Otherwise it is charged nothing and may try again later. Call this
        before the step's noise is drawn, once for each example.

        Args:
            indices: int ``(b,)``, each example at most once.
            ratios: r, ``(b,)``: upper limit of the example's contribution to the noised
                vector, divided by the standard deviation of this step's noise.

        Returns:
            bool ``(b,)``. An example with False must not enter the step.

        Raises:
            ValueError: If an index is repeated or out of range, or a ratio is negative
                or not a number. Nothing is charged then.
        """
        spent = self._checked_spent()
        r = numbers("ratios", ratios)
        expect(
            r.shape == np.shape(indices),
            "ratios",
            f"an array of shape {r.shape}",
            f"must have one ratio per index, shape {np.shape(indices)}",
            "Give one ratio for each example.",
        )
        if r.size == 0:
            return np.zeros(r.shape, dtype=np.bool_)
        in_range(
            0,
            np.inf,
            ratios=r,
            remedy="Divide each gradient norm by the noise's standard deviation.",
        )
        distinct_indices("indices", indices, spent.size)
        examples = np.asarray(indices, dtype=np.int64)
        after = spent[examples] + self.order * r**2 / 2
        admitted = after <= np.broadcast_to(self.budget, spent.shape)[examples]
        spent[examples[admitted]] = after[admitted]
        return admitted

    def epsilons(self, delta: float) -> Array:
        """Return the epsilon that each example's budget guarantees.

        The epsilon is known before training and holds afterwards, in both directions,
        however the steps were chosen. It is that of a Gaussian shift of
        √(2·budget/order) standard deviations.

        Args:
            delta: δ in (0, 1).

        Returns:
            float64 in the shape of ``budget``: a bound.

        Raises:
            ValueError: If ``delta`` is not in (0, 1).
        """
        return gaussian_epsilon(np.sqrt(2 * self.budget / self.order), delta)

    def state_dict(self) -> dict[str, Any]:
        """Return budgets and charges as a dict of arrays, numbers and strings.

        Raises:
            ValueError: Before ``begin``.
        """
        return {
            "budget": self.budget.copy(),
            "order": self.order,
            "data_set": self._data_set,
            "spent": self.spent,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the charges that ``state_dict`` saved.

        Args:
            state: A dict returned by ``state_dict``.

        Raises:
            ValueError: If budgets, order or data set differ, or this filter has charged
                more than was saved; nothing is changed in that case.
        """
        loaded = _checked_charges(state)
        same = np.array_equal(state["budget"], self.budget)
        expect(
            same and state["order"] == self.order,
            "the saved budget",
            f"{np.asarray(state['budget'])} at order {state['order']:g}",
            f"must equal that of this filter, {self.budget} at order {self.order:g}",
            "Resume with a RenyiFilter like that of the saved run.",
        )
        if self._spent is not None:
            self.begin(loaded.size, state["data_set"])
            expect(
                bool((self._spent <= loaded).all()),
                "the charges of this filter",
                "larger ones for some examples",
                "must be at most those that were saved",
                "What the filter has charged since the save cannot be taken back. Load "
                "into a new RenyiFilter, and discard the model trained since.",
            )
        self._spent, self._data_set = loaded, state["data_set"]

    def _checked_spent(self) -> Array:
        """Return the charges, or raise ``ValueError`` before ``begin``."""
        expect(
            self._spent is not None,
            "RenyiFilter",
            "a filter without examples",
            "must know its examples",
            "Call begin(num_examples), or pass it to PrivacyEngine(renyi_filter=...) "
            "and call make_private.",
        )
        return cast(Array, self._spent)


def _checked_charges(state: Mapping[str, Any]) -> Array:
    """Return a saved state's charges, or raise ``ValueError`` if it has none."""
    spent, order = np.asarray(state.get("spent", ())), state.get("order")
    sound = spent.dtype == np.float64 and spent.ndim == 1 and spent.size > 0
    expect(
        sound
        and bool((np.isfinite(spent) & (spent >= 0)).all())
        and isinstance(order, float)
        and isinstance(state.get("data_set"), str)
        and "budget" in state,
        "the saved filter",
        sorted(state),
        "must contain budget, order, data_set and one charge of at least 0 per example",
        "Resume from another checkpoint.",
    )
    charges: Array = spent.copy()
    return charges
