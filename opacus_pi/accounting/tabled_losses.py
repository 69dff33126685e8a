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

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from opacus_pi.accounting.composition import default_hoelder_p
from opacus_pi.accounting.losses import RunNorms
from opacus_pi.accounting.order_tables import OrderTables, order_tables
from opacus_pi.accounting.predicted_losses import ScorePlaces, means_of_scores
from opacus_pi.accounting.row_orders import RowUpdates
from opacus_pi.accounting.rules import intervals

__all__ = ["SMALLEST_TOLERANCE", "ExamplesLosses", "TabledLosses", "can_be_tabled"]

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

    def _tables_of_means(self, runs: RunNorms) -> list[tuple[Array, Array] | None]:
        """Return each row's means over scores, ``(5313, K)``; None: not needed.

        The second table has their differences from each order to the next, 0 at the
        last order.
        """
        if not runs.predictions:
            return [None] * len(self._rows)
        (predicted,) = runs.predictions
        assert predicted is not None
        found: list[tuple[Array, Array] | None] = []
        for i, row in enumerate(self._rows):
            if not predicted.has_means(row):
                found.append(None)
                continue
            s = self._squares(row, predicted.norms_on_grid(row))
            means = means_of_scores(self._tables.losses(i, s))
            found.append((means, np.diff(means, axis=1, append=means[:, -1:])))
        return found

    def of_examples(self, runs: RunNorms) -> "ExamplesLosses":
        """Return the losses of some examples, each at an order of its own.

        Args:
            runs: Norms of the examples, from the run of the tables.
        """
        rows = [self._row(i, row, runs) for i, row in enumerate(self._rows)]
        return ExamplesLosses(tuple(rows))

    def _row(self, i: int, row: int, runs: RunNorms) -> "_RowReader":
        """Return what reads the losses of one row."""
        norms, means = runs.norms[0, row], self._means[i]
        if means is None:
            return self._lines(i, self._squares(row, norms))
        (predicted,) = runs.predictions
        assert predicted is not None
        drawn, share = np.flatnonzero(predicted.drawn[row]), predicted.seen_share[row]
        seen = self._lines(i, self._squares(row, norms[drawn]))
        places = predicted.places(row)
        return _Means(places, *means, drawn, float(share), seen)

    def _lines(self, i: int, s: Array) -> "_Lines":
        """Return what reads the losses of observed norms."""
        slopes, intercepts = self._tables.slopes[i], self._tables.intercepts[i]
        width = slopes.shape[1]
        first = self._tables.cells_of(i, s).astype(np.int32) * np.int32(width)
        return _Lines(slopes.ravel(), intercepts.ravel(), first, s)

    def _squares(self, row: int, norms: Array) -> Array:
        """Return s = r²/2 of norms in a row."""
        ratios = self._mechanism.at_row(row).ratios(norms)
        ratios *= ratios
        ratios /= 2
        return ratios


class _RowReader(Protocol):
    """What reads the losses of one row, of all examples of a block.

    Both methods take a position among the tabulated orders for each example, ``(n,)``.
    """

    def at(self, orders: Integers) -> Array:
        """Return upper bounds of the losses, ``(n,)``."""

    def rises(self, orders: Integers) -> Array:
        """Return how much they rise to the next order, ``(n,)``."""


@dataclass(frozen=True, eq=False)
class ExamplesLosses:
    """Losses of some examples over the whole run, each at an order of its own.

    Args:
        rows: What reads the losses of each row.
    """

    rows: tuple[_RowReader, ...]

    def at(self, orders: Integers) -> Array:
        """Return upper bounds of the losses.

        Args:
            orders: For each example a position in ``TabledLosses.places``, ``(n,)``.

        Returns:
            float64 ``(n,)``, in nats.
        """
        total = np.zeros(len(orders))
        for row in self.rows:
            total += row.at(orders)
        return total

    def rises(self, orders: Integers) -> Array:
        """Return how much the losses rise from an order to the next.

        Args:
            orders: As in ``at``. At the last order the result has no meaning.

        Returns:
            float64 ``(n,)``, in nats; NaN or ``inf`` where the next order is never an
            example's best one.
        """
        total = np.zeros(len(orders))
        for row in self.rows:
            total += row.rises(orders)
        return total


@dataclass(frozen=True, eq=False)
class _Lines:
    """Losses of observed norms: one line of the table for each example.

    Args:
        slopes: float64 ``(cells * K,)``.
        intercepts: In the same form.
        first: int32 ``(n,)``, where the cell of each example begins.
        s: float64 ``(n,)``, r²/2 of each example.
    """

    slopes: Array
    intercepts: Array
    first: NDArray[np.int32]
    s: Array

    def at(self, orders: Integers) -> Array:
        """Return upper bounds of the losses, ``(n,)``."""
        return self._at(self.first + orders)

    def rises(self, orders: Integers) -> Array:
        """Return how much they rise to the next order, ``(n,)``."""
        place = self.first + orders
        following = np.minimum(place + 1, len(self.slopes) - 1)
        with np.errstate(invalid="ignore"):
            return self._at(following) - self._at(place)

    def _at(self, place: Integers) -> Array:
        """Return the values of lines, by their positions in the table."""
        values: Array = self.slopes[place]
        values *= self.s
        values += self.intercepts[place]
        return values


@dataclass(frozen=True, eq=False)
class _Means:
    """Losses of a row with gaps: means over scores, and in part observed norms.

    Args:
        places: Where the means of the examples are read.
        means: float64 ``(5313, K)``.
        differences: In the same form, from each order to the next.
        drawn: The examples with an observed norm.
        share: Share of the row's updates that are charged the observed norm.
        seen: What reads the losses of these norms.
    """

    places: ScorePlaces
    means: Array
    differences: Array
    drawn: Integers
    share: float
    seen: _Lines

    def at(self, orders: Integers) -> Array:
        """Return upper bounds of the losses, ``(n,)``."""
        mean = self.places.read(self.means, orders)
        return self._with_seen(mean, self.seen.at(orders[self.drawn]))

    def rises(self, orders: Integers) -> Array:
        """Return how much they rise to the next order, ``(n,)``."""
        mean = self.places.read(self.differences, orders)
        return self._with_seen(mean, self.seen.rises(orders[self.drawn]))

    def _with_seen(self, mean: Array, seen: Array) -> Array:
        """Mix means with values of observed norms; overwrites ``mean``."""
        mean[self.drawn] += self.share * (seen - mean[self.drawn])
        return mean
