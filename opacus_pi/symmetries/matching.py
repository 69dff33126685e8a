"""Find the permutation that brings one network closest to another.

The idea: to match the hidden units of two networks is an assignment problem for each
symbol, if the other symbols are held fixed. ``weight_matching`` maximizes the inner
product of the parameters by solving one assignment problem after another until none
improves; ``activation_matching`` maximizes the correlation of the units' activations
and needs one problem per symbol. A symbol with inner parts (heads and their widths) is
solved jointly: first the best inner assignment for every pair of outer indices, then
the outer assignment, which is exact.

The guarantee: the result of ``weight_matching`` is never worse than no permutation, and
a permuted copy of a network is matched back. It is a local optimum, not a global one.

>>> import numpy as np
>>> import torch
>>> from opacus_pi.symmetries.permutations import apply_permutation, permutation_spec
>>> model = torch.nn.Sequential(
...     torch.nn.Linear(2, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)
... )
>>> spec = permutation_spec(model, torch.zeros(1, 2))
>>> params = model.state_dict()
>>> mixed = apply_permutation(spec, spec.random(np.random.default_rng(0)), params)
>>> back = apply_permutation(spec, weight_matching(spec, params, mixed), mixed)
>>> all(torch.equal(back[name], params[name]) for name in params)
True
"""

from collections.abc import Collection, Iterable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from opacus_pi._torch_compat import pytree
from opacus_pi._validate import expect
from opacus_pi.models.batches import forward
from opacus_pi.models.copies import independent_copy
from opacus_pi.models.no_trace import random_state_untouched
from opacus_pi.symmetries.axes import Axes, Factor
from opacus_pi.symmetries.permutations import (
    Params,
    Permutation,
    PermutationSpec,
    as_input,
    permuted,
)
from opacus_pi.symmetries.tracing import OutputCapture, elementary_operations

__all__ = ["activation_matching", "weight_matching"]

Matrix = NDArray[np.float64]
_MAX_SWEEPS = 100
_ROUNDING = 1e-9


def weight_matching(
    spec: PermutationSpec, params_a: Params, params_b: Params
) -> Permutation:
    r"""Find the permutation of ``params_b`` that is closest to ``params_a``.

    Closest means the largest inner product of the parameters. Each symbol of ``spec``
    (an independent permutation of hidden units) in turn is set to the optimum of a
    linear assignment problem while the others are held fixed, until none improves. The
    search starts from the identity, or from a first matching if that has the larger
    inner product. The first matching decides the symbols one after the other. It sorts
    the entries along the symbols that are not decided yet, so that their order does not
    matter.

    Args:
        spec: The networks' symmetries.
        params_a: Parameters (or state dict) of network a, to match to, by name.
        params_b: Those of network b, to permute, with ``apply_permutation(spec, found,
            params_b)``.

    Returns:
        An int64 array for each symbol, as ``spec.random`` returns. Buffers are not
        compared.

    Raises:
        ValueError: If a tensor of the spec is missing or has another shape.

    Source: Ainsworth et al. 2023 (arXiv:2209.04836), Algorithm 1; the first matching
    and the inner permutations of groups and heads are ours.
    """
    problem = _InnerProduct(spec, params_a, params_b)
    starts = [spec.identity(), problem.first_matching()]
    return problem.ascend(max(starts, key=problem.inner_product))


def activation_matching(
    spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, inputs: Any
) -> Permutation:
    """Find the permutation of ``model_b`` that correlates most with ``model_a``.

    For each symbol of ``spec`` (an independent permutation of hidden units),
    correlations over examples and positions are summed over all activations in which
    the symbol appears (outputs of linear layers, convolutions and pointwise
    operations), and one linear assignment problem is solved. A symbol that appears in
    no activation is not permuted.

    Args:
        spec: The networks' symmetries.
        model_a: The model to match to; not changed.
        model_b: The model whose parameters are to be permuted; not changed.
        inputs: One batch, in the same form as the example that the spec was traced on.

    Returns:
        An int64 array for each symbol, for ``apply_permutation(spec, found,
        params_b)``.

    Raises:
        ValueError: If the models do not run the operations that were traced.

    Source: Li et al. 2016 (arXiv:1511.07543); Ainsworth et al. 2023, Section 3.1.
    """
    a, b = (_activations(spec, model, inputs) for model in (model_a, model_b))
    permutation = spec.identity()
    for root in _outer_symbols(spec):
        gains = _Assignment(spec, root)
        for number, axes in spec.sites:
            for place in _positions(axes, root):
                axes = _resized(axes, a[number].shape)
                rows_a, inner = _rows_over(a[number], axes, place, gains.inner_parts)
                rows_b, _ = _rows_over(b[number], axes, place, gains.inner_parts)
                gains.add(inner, _standardised(rows_a) @ _standardised(rows_b).T)
        permutation |= gains.best()
    return permutation


class _InnerProduct:
    """The inner product of two networks, as a function of a permutation of b.

    To maximise it is to minimise the Euclidean distance of the parameters, because a
    permutation does not change the norm of b. Buffers are left out: running statistics
    follow from the weights and the data.

    Args:
        spec: The networks' symmetries.
        a: Parameters to match to, by name.
        b: Parameters to permute, by name.

    Raises:
        ValueError: If a tensor of the spec is missing or has another shape.
    """

    def __init__(self, spec: PermutationSpec, a: Params, b: Params) -> None:
        names = [name for name in spec.axes if name not in spec.buffers]
        for label, params in (("params_a", a), ("params_b", b)):
            missing = [name for name in names if name not in params]
            expect(
                not missing,
                label,
                f"{len(params)} tensors without these names",
                f"must contain {missing[:3]}",
                "Pass the state dict of a model of the traced architecture.",
            )
        self.spec = spec
        self.axes = {name: spec.axes[name] for name in names}
        self.a = {name: _checked(name, a[name], spec.axes[name]) for name in names}
        self.b = {name: _checked(name, b[name], spec.axes[name]) for name in names}

    def inner_product(
        self, permutation: Permutation, names: Collection[str] | None = None
    ) -> float:
        """Return the inner product over some tensors, by default all.

        Args:
            permutation: Of b; symbols without an array are not permuted.
            names: Names of the tensors; None: all.
        """
        return sum(
            float((self.a[n] * permuted(self.b[n], self.axes[n], permutation)).sum())
            for n in (self.axes if names is None else names)
        )

    def first_matching(self) -> Permutation:
        """Decide each symbol in turn from what the undecided symbols cannot change.

        Coordinate ascent from the identity can end in a poor optimum, because the first
        symbols are matched while all others are still in a wrong order. Here the
        entries along undecided symbols are compared after sorting, which no permutation
        of them changes.
        """
        permutation: Permutation = {}
        for root in _outer_symbols(self.spec):
            permutation |= self.assignment(root, permutation).best()
        return permutation

    def ascend(self, permutation: Permutation) -> Permutation:
        """Improve each symbol in turn until no symbol can be improved.

        Ends after ``_MAX_SWEEPS`` sweeps at the latest. An improvement must exceed
        rounding: otherwise two optima of equal value could replace each other without
        end.

        Args:
            permutation: Where to start, an array for each symbol.
        """
        for _ in range(_MAX_SWEEPS):
            improved = False
            for root in _outer_symbols(self.spec):
                gains = self.assignment(root, permutation)
                trial = permutation | gains.best()
                before, after = gains.value(permutation), gains.value(trial)
                names = self._tensors_with_two(root)
                if names:  # the gain at one position depends on the other position
                    before = self.inner_product(permutation, names)
                    after = self.inner_product(trial, names)
                if after > before + _ROUNDING * abs(before):
                    permutation, improved = trial, True
            if not improved:
                break
        return permutation

    def _tensors_with_two(self, root: str) -> list[str]:
        """Return the tensors of a symbol if it has two positions in one of them.

        The weight of a residual block without an intermediate width has the symbol in
        rows and columns. The gain is then quadratic, not linear, in the permutation.
        The assignment problem uses the current permutation at one position, so its
        solution is only a proposal: the inner product itself decides whether it is
        better.

        Returns:
            The names of all tensors with the symbol; empty if it never has two
            positions.
        """
        counts = {name: len(_positions(axes, root)) for name, axes in self.axes.items()}
        twice = max(counts.values(), default=0) > 1
        return [name for name, count in counts.items() if count] if twice else []

    def assignment(self, root: str, permutation: Permutation) -> "_Assignment":
        """Return the assignment problem of one symbol, given the others.

        Args:
            root: The symbol, which is not an inner part.
            permutation: The other symbols' current arrays. Symbols without one are
                undecided.
        """
        gains, decided = _Assignment(self.spec, root), set(permutation)
        for name, axes in self.axes.items():
            for place in _positions(axes, root):
                own = _without(axes, place[0], {root, *gains.inner_parts})
                b = permuted(self.b[name], own, permutation)
                options = axes, place, gains.inner_parts, decided
                rows_a, inner = _rows_over(self.a[name], *options)
                rows_b, _ = _rows_over(b, *options)
                gains.add(inner, rows_a @ rows_b.T)
        return gains


def _checked(name: str, tensor: Tensor, axes: Axes) -> Tensor:
    """Return a tensor on the CPU in float64, after checking its shape.

    Raises:
        ValueError: If the shape differs from the axes.
    """
    return permuted(tensor.detach().cpu().double(), axes, {}, name)


def _standardised(rows: Tensor) -> Tensor:
    """Return rows of mean 0 and length 1 (length 0 for a constant row).

    The product of two such rows is their correlation. A unit that is never active has a
    constant row and correlates with no other.
    """
    centred = rows - rows.mean(dim=1, keepdim=True)
    lengths = centred.norm(dim=1, keepdim=True)
    return centred / torch.where(lengths > 0, lengths, 1.0)


def _activations(
    spec: PermutationSpec, model: nn.Module, inputs: Any
) -> dict[int, Tensor]:
    """Return the activations at the spec's sites, from one run in evaluation mode.

    Args:
        spec: The symmetries, with the numbers of the operations.
        model: The model; a copy on the CPU in float64 runs.
        inputs: One batch, of any size.

    Raises:
        ValueError: If the model does not run the operations that were traced.
    """
    twin = independent_copy(model).cpu().double()
    inputs = pytree.tree_map_only(Tensor, as_input, inputs)
    capture = OutputCapture(number for number, _ in spec.sites)
    with random_state_untouched(), elementary_operations(), capture:
        forward(twin, inputs)
    expect(
        all(_fits(axes, capture.kept.get(number)) for number, axes in spec.sites),
        "model",
        type(twin).__name__,
        "must run the operations that were traced",
        "Pass models of the architecture that the spec was made from.",
    )
    return capture.kept


def _fits(axes: Axes, activation: Tensor | None) -> bool:
    """Return whether an activation has the traced shape, up to the batch size.

    Args:
        axes: Axes of the activation, as traced.
        activation: What the model computed there; None if it ran fewer operations.
    """
    if activation is None:
        return False
    resized = _resized(axes, activation.shape)
    return activation.shape == tuple(prod(f.size for f in dim) for dim in resized)


def _resized(axes: Axes, shape: torch.Size) -> Axes:
    """Adapt axes to another batch size: the first fixed factor absorbs the change.

    The batch is a fixed dimension, and it may have been multiplied into another one (a
    sequence flattened into the batch). The result fits the shape only if the model is
    of the traced architecture, which ``_fits`` checks.

    Args:
        axes: Axes as traced.
        shape: Shape of the activation with another batch.
    """
    fitted = []
    for dim, size in zip(axes, shape, strict=False):
        first = next((k for k, factor in enumerate(dim) if factor.symbol is None), None)
        if first is not None:
            rest = prod(factor.size for k, factor in enumerate(dim) if k != first)
            dim = (*dim[:first], Factor(None, size // rest), *dim[first + 1 :])
        fitted.append(dim)
    return tuple(fitted)


class _Assignment:
    """The assignment problem of one outer symbol and its inner parts.

    It collects, over all tensors in which the symbol appears, the gain of sending unit
    j of b to the place of unit i of a. ``best`` then solves for the permutation with
    the largest sum of gains.

    Args:
        spec: The networks' symmetries.
        root: Name of the outer symbol.

    Attributes:
        inner_parts: Sizes of the symbols that have one permutation for each index of
            the root, by name.
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

        Args:
            inner: The inner part that the rows cover; None: only the root.
            products: ``(r, r)`` on the CPU. The r rows are the indices of the root, or
                (root, inner part) in row-major order.
        """
        matrix = products.numpy()
        self._total[inner] = self._total.get(inner, 0.0) + matrix

    def value(self, permutation: Permutation) -> float:
        """Return the gain of a permutation of the root and its inner parts.

        Args:
            permutation: With arrays for the root, ``(n,)``, and its inner parts, ``(n,
                m)``.
        """
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
        """Return the optimum.

        For every pair of root indices the inner parts are assigned first; the root is
        then assigned by the resulting gains. This is exact, because the inner parts of
        one root index do not influence those of another. With root size n and inner
        size m it solves n² problems of size m, and one of size n.

        Returns:
            int64 ``(n,)`` for the root, and ``(n, m)`` for each inner part.
        """
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
    """Assign a column to each row, each column once, with the largest sum."""
    columns: NDArray[np.int64] = linear_sum_assignment(gains, maximize=True)[1]
    return columns.astype(np.int64)


def _outer_symbols(spec: PermutationSpec) -> list[str]:
    """Return the symbols that are not inner parts, in order of the run."""
    return [name for name, symbol in spec.symbols.items() if symbol.outer is None]


def _positions(axes: Axes, symbol: str) -> list[tuple[int, int]]:
    """Return the positions of a symbol as pairs (dimension, factor).

    Most tensors have a symbol once or not at all; see ``_tensors_with_two``.
    """
    return [
        (d, k)
        for d, factors in enumerate(axes)
        for k, factor in enumerate(factors)
        if factor.symbol == symbol
    ]


def _without(axes: Axes, dimension: int, symbols: Collection[str]) -> Axes:
    """Return the axes with some symbols of one dimension treated as fixed.

    Before b is compared with a along one dimension, it is permuted in all others. The
    dimension itself must keep its order, because that order is what is being solved
    for.

    Args:
        axes: Axes of a tensor.
        dimension: Number of the dimension.
        symbols: The symbols that are not to be permuted there.
    """
    return tuple(
        tuple(
            Factor(None, f.size) if d == dimension and f.symbol in symbols else f
            for f in factors
        )
        for d, factors in enumerate(axes)
    )


def _rows_over(
    tensor: Tensor,
    axes: Axes,
    place: tuple[int, int],
    inner_parts: Collection[str],
    decided: Collection[str] | None = None,
) -> tuple[Tensor, str | None]:
    """Return a tensor as a matrix whose rows are the indices of a symbol.

    Each row holds all entries that move together when the symbol is permuted. Entries
    along undecided symbols are sorted, so that the rows do not depend on how these
    symbols will be permuted.

    Args:
        tensor: A weight or an activation.
        axes: Its axes.
        place: Where the symbol stands in the axes: dimension and factor.
        inner_parts: Names of the symbol's inner parts. If one of them is in the tensor,
            the rows are the pairs (index of the symbol, index of the inner part).
        decided: Symbols whose permutation is already chosen; None: all.

    Returns:
        The matrix, and the name of the inner part that its rows cover, if any.
    """
    factors = [factor for dim in axes for factor in dim]
    root = sum(map(len, axes[: place[0]])) + place[1]
    inner = _nearest(root, factors, inner_parts)
    rows = [root] if inner is None else [root, inner]
    settled, undecided = _columns_beside(rows, factors, decided)
    sizes = [_num_entries(factors, group) for group in (rows, settled, undecided)]
    cells = tensor.reshape([factor.size for factor in factors])
    cells = cells.permute(*rows, *settled, *undecided).reshape(sizes)
    if undecided:
        cells = cells.sort(dim=2).values
    name = None if inner is None else factors[inner].symbol
    return cells.reshape(sizes[0], -1), name


def _columns_beside(
    rows: Collection[int], factors: Sequence[Factor], decided: Collection[str] | None
) -> tuple[list[int], list[int]]:
    """Return the positions that are not rows: settled ones, and undecided ones.

    Args:
        rows: Positions of the factors that the rows of the matrix cover.
        factors: All factors of a tensor.
        decided: Symbols whose permutation is already chosen; None: all.
    """
    settled: list[int] = []
    undecided: list[int] = []
    for position, factor in enumerate(factors):
        if position not in rows:
            group = undecided if _is_undecided(factor, decided) else settled
            group.append(position)
    return settled, undecided


def _nearest(
    root: int, factors: Sequence[Factor], symbols: Collection[str]
) -> int | None:
    """Return the position of the factor with one of the symbols nearest to the root.

    Args:
        root: Position of the root.
        factors: All factors of a tensor.
        symbols: The inner parts of the root. A tensor that has the root twice, such as
            an attention projection of width to width, has its inner part twice as well.

    Returns:
        The position; None if the tensor has none of the symbols.
    """
    found = [p for p, factor in enumerate(factors) if factor.symbol in symbols]
    return min(found, key=lambda p: abs(p - root), default=None)


def _is_undecided(factor: Factor, decided: Collection[str] | None) -> bool:
    """Return whether a factor may still be permuted; a fixed one may not."""
    if decided is None or factor.symbol is None:
        return False
    return factor.symbol not in decided


def _num_entries(factors: Sequence[Factor], positions: Iterable[int]) -> int:
    """Return the product of the sizes of the factors at some positions."""
    return prod(factors[p].size for p in positions)
