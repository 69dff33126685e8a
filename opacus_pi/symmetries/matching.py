"""Find the permutation that brings one network closest to another.

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

from collections.abc import Collection

from torch import Tensor

from opacus_pi._validate import expect
from opacus_pi.symmetries.assignment import Gains, front_rows, held_out, places, roots
from opacus_pi.symmetries.axis_symbols import Axes
from opacus_pi.symmetries.permutations import (
    Params,
    Permutation,
    PermutationSpec,
    permuted,
)

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
        for root in roots(self.spec):
            permutation |= self.gains(root, permutation).best()
        return permutation

    def ascend(self, permutation: Permutation) -> Permutation:
        """Improve one symbol after another until none can be improved."""
        for _ in range(_MAX_SWEEPS):
            improved = False
            for root in roots(self.spec):
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
        counts = {name: len(places(axes, root)) for name, axes in self.axes.items()}
        twice = max(counts.values(), default=0) > 1
        return [name for name, count in counts.items() if count] if twice else []

    def gains(self, root: str, permutation: Permutation) -> "Gains":
        """What it gains to put each index of b at each place of a, for one symbol."""
        gains, decided = Gains(self.spec, root), set(permutation)
        for name, axes in self.axes.items():
            for place in places(axes, root):
                own = held_out(axes, place[0], {root, *gains.inner_parts})
                b = permuted(self.b[name], own, permutation)
                rows = [
                    front_rows(tensor, axes, place, gains.inner_parts, decided)
                    for tensor in (self.a[name], b)
                ]
                gains.add(rows[0][1], rows[0][0] @ rows[1][0].T)
        return gains


def _checked(name: str, tensor: Tensor, axes: Axes) -> Tensor:
    """A tensor of the traced shape, on the CPU in float64."""
    return permuted(tensor.detach().cpu().double(), axes, {}, name)
