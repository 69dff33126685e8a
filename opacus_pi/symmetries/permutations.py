"""Permutation symmetries of a network, traced from one run of it.

The hidden units of a network have no order: if they are permuted consistently in every
parameter and buffer, the network computes the same function. A ``PermutationSpec`` says
which dimensions of which tensors must be permuted together. It is traced from a run, so
that no architecture has to be described by hand.

The guarantee: ``permutation_spec`` applies a random permutation and checks that the
outputs stay the same. What breaks it: operations that depend on the values of the
example (branches, sorting) or that are random; they raise an error.

>>> import torch
>>> model = torch.nn.Sequential(
...     torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)
... )
>>> spec = permutation_spec(model, torch.zeros(1, 2))
>>> spec.symbols
{'0.weight[0]': Symbol(size=3, outer=None)}
>>> spec.axes["2.weight"]
((), (Factor(symbol='0.weight[0]', size=3),))
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from opacus_pi._torch_compat import pytree
from opacus_pi._validate import expect
from opacus_pi.models.batches import forward
from opacus_pi.models.copies import independent_copy
from opacus_pi.models.no_trace import random_state_untouched
from opacus_pi.symmetries.axes import Axes, Factor, Symbol, fix, name_symbols
from opacus_pi.symmetries.tracing import AxisTracer, elementary_operations

__all__ = ["PermutationSpec", "apply_permutation", "permutation_spec"]

Params = Mapping[str, Tensor]
Permutation = dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class PermutationSpec:
    """The groups of dimensions of a network's tensors that are permuted together.

    Attributes:
        symbols: The independent permutations, called symbols, by name: each with its
            size and, if it is nested in another symbol, with that outer symbol.
            The channels within a group of GroupNorm are nested, and the width within an
            attention head; they have one permutation for each index of the outer
            symbol.
        axes: The factors of each dimension of each tensor of the state dict, outermost
            first.
        buffers: Names of tensors that are not parameters. They are permuted, but not
            compared by ``weight_matching``.
        sites: Activations in which symbols appear: the number of the operation in the
            run, and the axes of its output.
    """

    symbols: dict[str, Symbol]
    axes: dict[str, Axes]
    buffers: frozenset[str]
    sites: tuple[tuple[int, Axes], ...]

    def identity(self) -> Permutation:
        """Return the permutation that changes nothing."""
        return {name: self._rows(name, np.arange) for name in self.symbols}

    def random(self, generator: np.random.Generator) -> Permutation:
        """Draw uniformly from the permutations that the spec describes.

        Args:
            generator: Source of randomness.

        Returns:
            int64 ``(size,)`` by symbol, or ``(size of outer, size)`` for an inner one.
        """
        return {name: self._rows(name, generator.permutation) for name in self.symbols}

    def _rows(self, name: str, draw: Any) -> NDArray[np.int64]:
        """Return one permutation, or one for each index of the outer symbol.

        Args:
            name: The symbol.
            draw: From a number n to a permutation of 0, ..., n - 1.
        """
        symbol = self.symbols[name]
        if symbol.outer is None:
            return np.asarray(draw(symbol.size), dtype=np.int64)
        rows = range(self.symbols[symbol.outer].size)
        return np.array([draw(symbol.size) for _ in rows], dtype=np.int64)


def permutation_spec(model: nn.Module, example_input: Any) -> PermutationSpec:
    """Trace the permutation symmetries of a network from one run in evaluation mode.

    Every operation is traced, so residual connections, convolutions (grouped ones
    too), linear, normalization and embedding layers and attention heads need no special
    case. The dimensions of an operation without a rule are not permuted. The result is
    checked: a random permutation must not change the outputs on the example.

    Args:
        model: Plain or wrapped by Opacus. A copy on the CPU in float64 is traced.
        example_input: A batch of inputs, preferably of at least 2 examples with random
            values. A tuple is passed as several arguments, a dict by name.

    Returns:
        The spec.

    Raises:
        ValueError: If a random permutation changes the outputs, because operations of
            the model depend on the values of the example or are random.

    Source: Entezari et al. 2022 (arXiv:2110.06296); Ainsworth et al. 2023
    (arXiv:2209.04836), where specs are written by hand.
    """
    twin = independent_copy(model).cpu().double()
    inputs = pytree.tree_map_only(Tensor, as_input, example_input)
    state = {**_named(twin, "parameters"), **_named(twin, "buffers")}
    state = {name: state[name] for name in twin.state_dict() if name in state}
    tracer = AxisTracer(state.values())
    with random_state_untouched(), elementary_operations():
        with tracer:
            outputs = forward(twin, inputs)
        for tensor in pytree.tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                fix(tracer.dims(tensor))
        seen = {key: dims for key, (_, dims) in tracer.seen.items()}
        symbols, axes, sites = name_symbols(state, seen, tracer.outputs)
        buffers = frozenset(_named(twin, "buffers"))
        spec = PermutationSpec(symbols, axes, buffers & set(axes), sites)
        _check(spec, twin, inputs, outputs)
    return spec


def apply_permutation(
    spec: PermutationSpec, permutation: Permutation, params: Params
) -> dict[str, Tensor]:
    """Permute the tensors of a network, which then computes the same function.

    Along every dimension, ``new[i] = old[permutation[i]]``.

    Args:
        spec: The symmetries of the network.
        permutation: An int64 array for each symbol, as ``spec.random`` returns.
        params: Parameters, or the whole state dict, by name. Tensors that the spec does
            not contain are not changed.

    Returns:
        New tensors by name.

    Raises:
        ValueError: If a symbol is missing, an array is not a permutation, or the shape
            of a tensor differs from the traced one.
    """
    check_permutation(spec, permutation)
    return {
        name: permuted(tensor, spec.axes.get(name, ()), permutation, name)
        for name, tensor in params.items()
    }


def permuted(
    tensor: Tensor, axes: Axes, permutation: Permutation, name: str = "tensor"
) -> Tensor:
    """Permute the dimensions of one tensor; symbols without an array are kept.

    With an empty permutation this only checks the shape.

    Args:
        tensor: The tensor, on any device.
        axes: Its axes; an empty tuple leaves it as it is.
        permutation: Arrays by symbol, for all or some of the symbols.
        name: Name of the tensor, for the message.

    Raises:
        ValueError: If the shape differs from the axes.
    """
    for d, factors in enumerate(axes):
        expect(
            tensor.dim() == len(axes)
            and tensor.shape[d] == prod(f.size for f in factors),
            name,
            f"a tensor of shape {tuple(tensor.shape)}",
            f"must have shape {tuple(prod(f.size for f in dim) for dim in axes)}",
            "Pass the parameters of the model that was traced.",
        )
        if any(factor.symbol in permutation for factor in factors):
            index = torch.from_numpy(_order(factors, permutation)).to(tensor.device)
            tensor = tensor.index_select(d, index)
    return tensor


def check_permutation(spec: PermutationSpec, permutation: Permutation) -> None:
    """Raise unless there is one valid array for each symbol of the spec.

    An array with a repeated index would copy one hidden unit and lose another, and the
    network would compute something else without any error.

    Args:
        spec: The symmetries.
        permutation: Arrays by symbol. Further entries are ignored.

    Raises:
        ValueError: If an array is missing, has another shape or is not a permutation.
    """
    for name, wanted in spec.identity().items():
        array = permutation.get(name)
        expect(
            array is not None
            and np.shape(array) == wanted.shape
            and np.array_equal(np.sort(array, axis=-1), wanted),
            f"permutation[{name!r}]",
            array,
            f"must be a permutation of shape {wanted.shape}",
            "Take it from weight_matching, activation_matching or spec.random.",
        )


def _order(factors: tuple[Factor, ...], permutation: Permutation) -> NDArray[np.int64]:
    """Return the order of the indices of a dimension, given its factors.

    The factors are combined as in row-major order: for factors of sizes 2 and 3, index
    (i, j) is number 3 i + j.

    >>> swap = {"heads": np.array([1, 0])}
    >>> _order((Factor("heads", 2), Factor(None, 3)), swap)
    array([3, 4, 5, 0, 1, 2])

    Args:
        factors: Names and sizes, outermost first.
        permutation: An array by symbol. An array of two dimensions has one row for each
            index of the outer symbol, whose factor stands directly before.
    """
    order = np.zeros(1, dtype=np.int64)
    for symbol, size in factors:
        array = permutation.get(str(symbol), np.arange(size))
        if array.ndim == 2:  # the outer factor's position chooses the row
            array = array[np.arange(len(order)) % len(array)]
        order = (order[:, None] * size + array).ravel()
    return order


def _check(spec: PermutationSpec, twin: nn.Module, inputs: Any, outputs: Any) -> None:
    """Raise unless a random permutation leaves the outputs unchanged.

    One draw permutes every symbol, so it reveals a wrong rule unless the wrong
    dimensions happen to have equal entries. The run is in float64: the tolerance covers
    sums in another order, and is far below any change by misplaced weights.

    Args:
        spec: The symmetries to check.
        twin: The traced copy, in float64.
        inputs: The example, as in the traced run.
        outputs: The outputs of the traced run.
    """
    permutation = spec.random(np.random.default_rng(0))
    moved = copy.deepcopy(twin)
    moved.load_state_dict(apply_permutation(spec, permutation, twin.state_dict()))
    again = forward(moved, inputs)
    pairs = zip(pytree.tree_leaves(outputs), pytree.tree_leaves(again), strict=True)
    same = all(
        torch.allclose(a, b, rtol=1e-7, atol=1e-9 * float(a.abs().max()))
        for a, b in pairs
        if isinstance(a, Tensor) and a.numel()
    )
    expect(
        same,
        "model",
        type(twin).__name__,
        "must compute the same function after its hidden units are permuted",
        "Some operations of the model are random, or depend on the values of the "
        "example. Trace and match only a part of the model without such operations.",
    )


def _named(model: nn.Module, what: str) -> dict[str, Tensor]:
    """Return parameters or buffers by name; a shared tensor under each of its names.

    A state dict lists a shared tensor under every name. Each of these entries must be
    permuted.

    Args:
        model: The model.
        what: ``"parameters"`` or ``"buffers"``.
    """
    return dict(getattr(model, f"named_{what}")(remove_duplicate=False))


def as_input(tensor: Tensor) -> Tensor:
    """Return an input on the CPU; floating-point inputs in float64.

    Models are traced and compared as float64 copies on the CPU, so that rounding cannot
    hide or imitate a difference. Token numbers and masks keep their type.
    """
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor
