"""One symbol's assignment problem: which index of b goes to each place of a."""

from collections.abc import Collection
from math import prod

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from opacus_pi.symmetries.axis_symbols import Axes, Factor
from opacus_pi.symmetries.permutations import Permutation, PermutationSpec

Matrix = NDArray[np.float64]


class Gains:
    """The assignment problem of one symbol and its inner parts.

    Args:
        spec: The networks' symmetries.
        root: A symbol that is not an inner part itself.

    Attributes:
        inner_parts: Symbols that have one permutation for each index of the root.
    """

    def __init__(self, spec: PermutationSpec, root: str) -> None:
        self.root, self.size = root, spec.symbols[root].size
        self.inner_parts = {
            name: symbol.size
            for name, symbol in spec.symbols.items()
            if symbol.outer == root
        }
        self._total: dict[str | None, Matrix] = {}

    def add(self, inner: str | None, products: Tensor) -> None:
        """Add the inner products of all rows of a with all rows of b.

        Rows are the root's indices, or (root, inner part) row-major if there is one.
        """
        matrix = products.numpy()
        self._total[inner] = self._total.get(inner, 0.0) + matrix

    def value(self, permutation: Permutation) -> float:
        """The inner product under a permutation of the root and its inner parts."""
        total, order = 0.0, permutation[self.root]
        if None in self._total:
            total += float(self._total[None][np.arange(self.size), order].sum())
        for inner, m in self.inner_parts.items():
            if inner in self._total:
                columns = (order[:, None] * m + permutation[inner]).ravel()
                rows = np.arange(len(columns))
                total += float(self._total[inner][rows, columns].sum())
        return total

    def best(self) -> Permutation:
        """The optimum: inner assignments for every pair, then the outer assignment."""
        n, chosen = self.size, {}
        value = np.zeros((n, n)) + self._total.get(None, 0.0)
        for inner, m in self.inner_parts.items():
            total = self._total.get(inner, np.zeros((n * m, n * m)))
            blocks = total.reshape(n, m, n, m).transpose(0, 2, 1, 3)
            chosen[inner] = np.array(
                [[_assign(pair) for pair in row] for row in blocks]
            )
            value = value + np.take_along_axis(
                blocks, chosen[inner][..., None], axis=3
            ).sum((2, 3))
        order = _assign(value)
        parts = {inner: c[np.arange(n), order] for inner, c in chosen.items()}
        return {self.root: order, **parts}


def _assign(gains: Matrix) -> NDArray[np.int64]:
    """For each row a column, each column once, with the largest sum."""
    columns: NDArray[np.int64] = linear_sum_assignment(gains, maximize=True)[1]
    return columns.astype(np.int64)


def roots(spec: PermutationSpec) -> list[str]:
    """Symbols that are no inner part, in order of the run."""
    return [name for name, symbol in spec.symbols.items() if symbol.outer is None]


def places(axes: Axes, symbol: str) -> list[tuple[int, int]]:
    """Where a symbol stands: (dimension, factor)."""
    return [
        (d, k)
        for d, factors in enumerate(axes)
        for k, factor in enumerate(factors)
        if factor.symbol == symbol
    ]


def held_out(axes: Axes, dimension: int, symbols: Collection[str]) -> Axes:
    """The axes as if some symbols did not stand in one dimension."""
    return tuple(
        tuple(
            Factor(None, f.size) if d == dimension and f.symbol in symbols else f
            for f in factors
        )
        for d, factors in enumerate(axes)
    )


def front_rows(
    tensor: Tensor,
    axes: Axes,
    place: tuple[int, int],
    inner_parts: Collection[str],
    decided: Collection[str] | None = None,
) -> tuple[Tensor, str | None]:
    """A tensor as rows over a symbol, and the inner part that the rows also run over.

    Columns over symbols that are not decided yet are sorted, so that they do not depend
    on them (``None``: all are decided).
    """
    factors = [factor for dim in axes for factor in dim]
    front = [sum(len(dim) for dim in axes[: place[0]]) + place[1]]
    inner = [p for p, factor in enumerate(factors) if factor.symbol in inner_parts]
    front += sorted(inner, key=lambda p: abs(p - front[0]))[:1]
    rest = [p for p in range(len(factors)) if p not in front]
    open_ = [
        p
        for p in rest
        if decided is not None and factors[p].symbol not in (None, *decided)
    ]
    known = [p for p in rest if p not in open_]
    sizes = [prod(factors[p].size for p in group) for group in (front, known, open_)]
    cells = tensor.reshape([factor.size for factor in factors])
    cells = cells.permute(*front, *known, *open_).reshape(sizes)
    rows = (cells.sort(dim=2).values if open_ else cells).reshape(sizes[0], -1)
    return rows, factors[front[1]].symbol if len(front) > 1 else None
