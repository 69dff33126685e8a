"""Match two networks by what their units do on the same examples."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from opacus_pi._validate import expect
from opacus_pi.models.batches import forward
from opacus_pi.models.copies import independent_copy
from opacus_pi.models.no_trace import random_state_untouched
from opacus_pi.symmetries.assignment import Gains, front_rows, places, roots
from opacus_pi.symmetries.axis_symbols import Axes, Factor
from opacus_pi.symmetries.axis_tracing import OutputCapture, elementary_operations
from opacus_pi.symmetries.permutations import Permutation, PermutationSpec, as_input


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
    for root in roots(spec):
        gains = Gains(spec, root)
        for number, axes in spec.sites:
            for place in places(axes, root):
                axes = _resized(axes, a[number].shape)
                rows_a, inner = front_rows(a[number], axes, place, gains.inner_parts)
                rows_b, _ = front_rows(b[number], axes, place, gains.inner_parts)
                gains.add(inner, _standardised(rows_a) @ _standardised(rows_b).T)
        permutation |= gains.best()
    return permutation


def _standardised(rows: Tensor) -> Tensor:
    """Rows of mean 0 and length 1 (0 where a row is constant)."""
    centred = rows - rows.mean(dim=1, keepdim=True)
    lengths = centred.norm(dim=1, keepdim=True)
    return centred / torch.where(lengths > 0, lengths, 1.0)


def _activations(
    spec: PermutationSpec, model: nn.Module, inputs: Any
) -> dict[int, Tensor]:
    """The outputs of the spec's sites in one run of the model in evaluation mode."""
    twin = independent_copy(model).cpu().double()
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
