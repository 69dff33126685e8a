"""Find the permutation that brings one network closest to another.

>>> import torch
>>> from opacus_pi.evaluation.permutations import apply_permutation, permutation_spec
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

import copy
from collections.abc import Collection
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from opacus_pi._validate import expect
from opacus_pi.evaluation.axis_symbols import Axes, Factor
from opacus_pi.evaluation.axis_tracing import OutputCapture, elementary_operations
from opacus_pi.evaluation.permutations import (
    Params,
    Permutation,
    PermutationSpec,
    as_input,
    permuted,
)
from opacus_pi.gradients.batches import forward
from opacus_pi.gradients.random_state import random_state_untouched
from opacus_pi.gradients.skeleton import unwrap

Matrix = NDArray[np.float64]
_MAX_SWEEPS = 100
_ROUNDING = 1e-9


def weight_matching(
    spec: PermutationSpec, params_a: Params, params_b: Params
) -> Permutation:
    r"""Permute b so that its parameters have the largest inner product with a's.

    Coordinate ascent: one symbol after another is set to the optimum of a linear
    assignment problem with the others held, until none improves. It starts from a
    matching that compares only what no undecided permutation can change, or from the
    identity if that is better: the result is never worse than not permuting, and a
    permuted copy is matched back.

    Args:
        spec: The networks' symmetries.
        params_a: Parameters (or state dict) to match to, by name.
        params_b: Parameters to permute: ``apply_permutation(spec, found, params_b)``.

    Returns:
        An array for each symbol; buffers do not take part.

    Raises:
        ValueError: If a tensor of the spec is missing or has another shape.

    Source: Ainsworth et al. 2023 (arXiv:2209.04836), Algorithm 1; the first matching
    and the inner permutations of groups and heads are ours.
    """
    problem = _Problem(spec, params_a, params_b)
    starts = [spec.identity(), problem.first_matching()]
    return problem.ascend(max(starts, key=problem.inner_product))


def activation_matching(
    spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, inputs: Any
) -> Permutation:
    """Permute b so that its units' activations correlate most with a's.

    For each symbol the correlations over examples and places are summed over all
    activations in which it appears (linear and convolution outputs, pointwise
    operations), and one linear assignment problem is solved. A symbol that appears in
    none stays in place.

    Args:
        spec: The networks' symmetries.
        model_a: The model to match to; left as it is.
        model_b: The model whose parameters are to be permuted; left as it is.
        inputs: One batch, in the form of the spec's example.

    Returns:
        An array for each symbol, for ``apply_permutation(spec, found, params_b)``.

    Raises:
        ValueError: If the models do not run the operations that were traced.

    Source: Li et al. 2016 (arXiv:1511.07543); Ainsworth et al. 2023, Section 3.1.
    """
    a, b = (_activations(spec, model, inputs) for model in (model_a, model_b))
    permutation = spec.identity()
    for root in _roots(spec):
        gains = _Gains(spec, root)
        for number, axes in spec.sites:
            for place in _places(axes, root):
                axes = _resized(axes, a[number].shape)
                rows_a, inner = _front(a[number], axes, place, gains.inner_parts)
                rows_b, _ = _front(b[number], axes, place, gains.inner_parts)
                gains.add(inner, _standardised(rows_a) @ _standardised(rows_b).T)
        permutation |= gains.best()
    return permutation


class _Problem:
    """The inner product of two networks, a function of a permutation of the second."""

    def __init__(self, spec: PermutationSpec, a: Params, b: Params) -> None:
        names = [name for name in spec.axes if name not in spec.buffers]
        for label, params in (("params_a", a), ("params_b", b)):
            missing = [name for name in names if name not in params]
            expect(
                not missing,
                label,
                sorted(params)[:3],
                f"to hold {missing[:3]}",
                "Pass the state dict of a model of the traced architecture.",
            )
        self.spec = spec
        self.axes = {name: spec.axes[name] for name in names}
        self.a = {name: _checked(name, a[name], spec.axes[name]) for name in names}
        self.b = {name: _checked(name, b[name], spec.axes[name]) for name in names}

    def inner_product(
        self, permutation: Permutation, names: Collection[str] | None = None
    ) -> float:
        """Sum over some tensors (all by default) of the entries' products."""
        return sum(
            float((self.a[n] * permuted(self.b[n], self.axes[n], permutation)).sum())
            for n in (self.axes if names is None else names)
        )

    def first_matching(self) -> Permutation:
        """Decide symbol after symbol from what the undecided ones cannot change."""
        permutation: Permutation = {}
        for root in _roots(self.spec):
            permutation |= self.gains(root, permutation).best()
        return permutation

    def ascend(self, permutation: Permutation) -> Permutation:
        """Improve one symbol after another until none can be improved."""
        for _ in range(_MAX_SWEEPS):
            improved = False
            for root in _roots(self.spec):
                gains = self.gains(root, permutation)
                trial = permutation | gains.best()
                before, after = gains.value(permutation), gains.value(trial)
                names = self._tensors_with_two(root)
                if names:  # there the gain of one place depends on the other
                    before = self.inner_product(permutation, names)
                    after = self.inner_product(trial, names)
                if after > before + _ROUNDING * abs(before):
                    permutation, improved = trial, True
            if not improved:
                break
        return permutation

    def _tensors_with_two(self, root: str) -> list[str]:
        """Tensors of a symbol, if it stands at two places of one of them."""
        counts = {name: len(_places(axes, root)) for name, axes in self.axes.items()}
        twice = max(counts.values(), default=0) > 1
        return [name for name, count in counts.items() if count] if twice else []

    def gains(self, root: str, permutation: Permutation) -> "_Gains":
        """What it gains to put each index of b at each place of a, for one symbol."""
        gains, decided = _Gains(self.spec, root), set(permutation)
        for name, axes in self.axes.items():
            for place in _places(axes, root):
                held = _held(axes, place[0], {root, *gains.inner_parts})
                b = permuted(self.b[name], held, permutation)
                rows = [
                    _front(tensor, axes, place, gains.inner_parts, decided)
                    for tensor in (self.a[name], b)
                ]
                gains.add(rows[0][1], rows[0][0] @ rows[1][0].T)
        return gains


class _Gains:
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
    return linear_sum_assignment(gains, maximize=True)[1].astype(np.int64)


def _roots(spec: PermutationSpec) -> list[str]:
    """Symbols that are no inner part, in order of the run."""
    return [name for name, symbol in spec.symbols.items() if symbol.outer is None]


def _places(axes: Axes, symbol: str) -> list[tuple[int, int]]:
    """Where a symbol stands: (dimension, factor)."""
    return [
        (d, k)
        for d, factors in enumerate(axes)
        for k, factor in enumerate(factors)
        if factor.symbol == symbol
    ]


def _held(axes: Axes, dimension: int, symbols: Collection[str]) -> Axes:
    """The axes as if some symbols did not stand in one dimension."""
    return tuple(
        tuple(
            Factor(None, f.size) if d == dimension and f.symbol in symbols else f
            for f in factors
        )
        for d, factors in enumerate(axes)
    )


def _front(
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


def _standardised(rows: Tensor) -> Tensor:
    """Rows of mean 0 and length 1 (0 where a row is constant)."""
    centred = rows - rows.mean(dim=1, keepdim=True)
    lengths = centred.norm(dim=1, keepdim=True)
    return centred / torch.where(lengths > 0, lengths, 1.0)


def _checked(name: str, tensor: Tensor, axes: Axes) -> Tensor:
    """A tensor of the traced shape, on the CPU in float64."""
    return permuted(tensor.detach().cpu().double(), axes, {}, name)


def _activations(
    spec: PermutationSpec, model: nn.Module, inputs: Any
) -> dict[int, Tensor]:
    """The outputs of the spec's sites in one run of the model in evaluation mode."""
    twin = copy.deepcopy(unwrap(model)).cpu().double().eval()
    inputs = pytree.tree_map_only(Tensor, as_input, inputs)
    capture = OutputCapture(number for number, _ in spec.sites)
    with random_state_untouched(), elementary_operations(), capture:
        forward(twin, inputs)
    fit = all(
        number in capture.kept
        and _sizes(_resized(axes, capture.kept[number].shape))
        == capture.kept[number].shape
        for number, axes in spec.sites
    )
    expect(
        fit,
        "model",
        type(twin).__name__,
        "to run the operations that were traced",
        "Pass models of the architecture of the spec.",
    )
    return capture.kept


def _sizes(axes: Axes) -> torch.Size:
    """The shape of a tensor with these axes."""
    return torch.Size(prod(factor.size for factor in dim) for dim in axes)


def _resized(axes: Axes, shape: torch.Size) -> Axes:
    """Axes traced with another batch size: the first fixed factor takes up the rest."""
    fitted = []
    for dim, size in zip(axes, shape, strict=False):
        first = next((k for k, factor in enumerate(dim) if factor.symbol is None), None)
        if first is not None:
            rest = prod(factor.size for k, factor in enumerate(dim) if k != first)
            dim = (*dim[:first], Factor(None, size // rest), *dim[first + 1 :])
        fitted.append(dim)
    return tuple(fitted)
