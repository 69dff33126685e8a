"""Losses of many examples at many orders, read from the tables of a run.

**Idea.** ``order_tables`` bounds the loss of each row at every order. Which cell of the
table an example's norm lies in does not depend on the order, so it is looked up once;
the search for the best order then reads one line for each example and row. Where a
norm was not observed, the mean over the norms that it may have been is a weighted mean
of the table's values (``predicted_losses``), so it is an upper bound as well.

**Guarantee.** As for ``order_tables``: never below the loss.

**What breaks it.** Several runs, sampling other than Poisson's, and runs without
clipping, for which ``can_be_tabled`` returns False.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from opacus_pi.accounting.composition import default_hoelder_p
from opacus_pi.accounting.losses import RunNorms
from opacus_pi.accounting.order_tables import OrderTables, order_tables
from opacus_pi.accounting.predicted_losses import means_of_scores
from opacus_pi.accounting.row_orders import RowUpdates
from opacus_pi.accounting.rules import intervals

__all__ = ["SMALLEST_TOLERANCE", "TabledLosses", "can_be_tabled"]

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
SMALLEST_TOLERANCE = 1e-4  # a table grows with 1 / tolerance
_HIGHEST_RATIO = 100.0  # clip norm over noise; beyond it no epsilon is of any use


def can_be_tabled(runs: RunNorms, tolerance: float) -> bool:
    """Return whether tables give the losses of a run.

    Args:
        runs: Norms of the run, of any examples.
        tolerance: Largest relative error.
    """
    mechanism = runs.mechanism
    rates = np.asarray(mechanism.sample_rate)
    ratios = np.asarray(mechanism.max_grad_norm) / np.asarray(mechanism.noise_std)
    return bool(
        tolerance >= SMALLEST_TOLERANCE
        and mechanism.sampling == "poisson"
        and len(runs.norms) == 1
        and len(runs.steps)
        and mechanism.num_steps
        and ((rates > 1e-20) & (rates < 1)).all()
        and ((ratios > 0) & (ratios <= _HIGHEST_RATIO)).all()
    )


class TabledLosses:
    """Tables for the losses of a run at many orders.

    Args:
        runs: Norms of any of its examples, with predictions if the run has gaps.
        orders: Rényi orders, ascending.
        offsets: What each order adds to a loss to make it an epsilon.
        tolerance: Largest relative error of an epsilon.
    """

    def __init__(
        self, runs: RunNorms, orders: Array, offsets: Array, tolerance: float
    ) -> None:
        mechanism, rows = runs.mechanism, []
        parts: dict[int, list[tuple[int, int]]] = {}
        for interval in intervals(runs.steps, mechanism.num_steps):
            last = mechanism.num_steps - interval.first
            remaining = (mechanism.num_steps - interval.last, last)
            parts.setdefault(interval.right, []).append(remaining)
        self._rows, self._mechanism = tuple(parts), mechanism
        for row, of_row in parts.items():
            facts = mechanism.at_row(row)
            highest = float(facts.ratios(np.inf)) ** 2 / 2
            rows.append(RowUpdates(float(facts.sample_rate), tuple(of_row), highest))
        self._tables: OrderTables = order_tables(
            tuple(rows),
            tuple(orders.tolist()),
            tuple(offsets.tolist()),
            default_hoelder_p(mechanism.num_steps),
            tolerance,
            bool(runs.predictions),
        )
        self.places = self._tables.places
        self._means = self._tables_of_means(runs)

    def _tables_of_means(self, runs: RunNorms) -> list[Array | None]:
        """Return each row's means over scores, ``(5313, K)``; None: not needed."""
        if not runs.predictions:
            return [None] * len(self._rows)
        (predicted,) = runs.predictions
        assert predicted is not None
        return [
            means_of_scores(
                self._tables.losses(i, self._squares(row, predicted.norms_on_grid(row)))
            )
            if predicted.has_means(row)
            else None
            for i, row in enumerate(self._rows)
        ]

    def of_examples(self, runs: RunNorms) -> Callable[[Integers], Array]:
        """Return a function that gives some examples' losses, each at its own order.

        Args:
            runs: Norms of the examples, from the run of the tables.

        Returns:
            A function from positions in ``places``, ``(n,)``, to upper bounds of the
            losses, ``(n,)``.
        """
        rows = [self._row(i, row, runs) for i, row in enumerate(self._rows)]

        def losses(orders: Integers) -> Array:
            total = np.zeros(len(orders))
            for loss in rows:
                total += loss(orders)
            return total

        return losses

    def _row(self, i: int, row: int, runs: RunNorms) -> Callable[[Integers], Array]:
        """Return the function of ``of_examples`` for one row."""
        norms, means = runs.norms[0, row], self._means[i]
        if means is None:
            return self._lines(i, self._squares(row, norms))
        (predicted,) = runs.predictions
        assert predicted is not None
        drawn, share = np.flatnonzero(predicted.drawn[row]), predicted.seen_share[row]
        places = predicted.places(row)
        seen = self._lines(i, self._squares(row, norms[drawn]))

        def loss(orders: Integers) -> Array:
            mean = places.read(means, orders)
            mean[drawn] += share * (seen(orders[drawn]) - mean[drawn])
            return mean

        return loss

    def _lines(self, i: int, s: Array) -> Callable[[Integers], Array]:
        """Return the function of ``of_examples`` for observed norms."""
        slopes, intercepts = self._tables.slopes[i], self._tables.intercepts[i]
        width = slopes.shape[1]
        first = self._tables.cells_of(i, s).astype(np.int32) * np.int32(width)

        def loss(orders: Integers) -> Array:
            place = first + orders
            values: Array = slopes.ravel()[place]
            values *= s
            values += intercepts.ravel()[place]
            return values

        return loss

    def _squares(self, row: int, norms: Array) -> Array:
        """Return s = r²/2 of norms in a row."""
        ratios = self._mechanism.at_row(row).ratios(norms)
        ratios *= ratios
        ratios /= 2
        return ratios
