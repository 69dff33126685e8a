"""Permutation symmetries of a network, traced from a run of it.

The hidden units of a network have no order: permuting them consistently in every
parameter and buffer gives the same function. A spec says which dimensions of which
tensors go together; no architecture is written by hand.

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
from torch.utils import _pytree as pytree

from opacus_pi._validate import expect
from opacus_pi.models.batches import forward
from opacus_pi.models.copies import independent_copy
from opacus_pi.models.no_trace import random_state_untouched
from opacus_pi.symmetries.axes import pin
from opacus_pi.symmetries.axis_symbols import Axes, Factor, Symbol, name_symbols
from opacus_pi.symmetries.axis_tracing import AxisTracer, elementary_operations

Params = Mapping[str, Tensor]
Permutation = dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class PermutationSpec:
    """Which dimensions of a network's tensors are permuted together.

    Attributes:
        symbols: Each independent permutation by name: its size, and the symbol of which
            it is the inner part (channels inside a group of GroupNorm, the width inside
            an attention head): then there is one permutation for each outer index.
        axes: For each tensor of the state dict and each of its dimensions the factors,
            outermost first.
        buffers: Names of tensors that are not parameters; they are permuted, but take
            no part in matching.
        sites: Where symbols appear in pointwise operations' outputs: the operation's
            number in the run, and the output's axes.
    """

    symbols: dict[str, Symbol]
    axes: dict[str, Axes]
    buffers: frozenset[str]
    sites: tuple[tuple[int, Axes], ...]

    def identity(self) -> Permutation:
        """The permutation that changes nothing."""
        return {name: self._rows(name, np.arange) for name in self.symbols}

    def random(self, generator: np.random.Generator) -> Permutation:
        """A uniform draw from the permutations that the spec describes.

        Args:
            generator: Source of randomness.

        Returns:
            int64 ``(size,)`` by symbol, or ``(size of outer, size)`` for an inner one.
        """
        return {name: self._rows(name, generator.permutation) for name in self.symbols}

    def _rows(self, name: str, draw: Any) -> NDArray[np.int64]:
        """One permutation, or one for each index of the outer symbol."""
        symbol = self.symbols[name]
        if symbol.outer is None:
            return np.asarray(draw(symbol.size), dtype=np.int64)
        rows = range(self.symbols[symbol.outer].size)
        return np.array([draw(symbol.size) for _ in rows], dtype=np.int64)


def permutation_spec(model: nn.Module, example_input: Any) -> PermutationSpec:
    """Trace a network's permutation symmetries from one run in evaluation mode.

    Every operation is followed, so residual connections, convolutions (grouped ones
    too), linear, norm and embedding layers, attention heads and whatever else the model
    composes need no special case. An operation that is not understood keeps its inputs
    in place. The result is checked: a random permutation must leave the outputs on the
    example as they are.

    Args:
        model: Plain or wrapped by Opacus; it is copied to the CPU, in float64.
        example_input: A batch of inputs, best of at least 2 examples of random values;
            a tuple is passed as several arguments, a dict by name.

    Returns:
        The spec.

    Raises:
        ValueError: If a random permutation changes the outputs: the model's operations
            depend on the values of the example, or are random.

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
                pin(tracer.dims(tensor))
        symbols, axes, sites = name_symbols(state, tracer)
        buffers = frozenset(_named(twin, "buffers"))
        spec = PermutationSpec(symbols, axes, buffers & set(axes), sites)
        _check(spec, twin, inputs, outputs)
    return spec


def apply_permutation(
    spec: PermutationSpec, permutation: Permutation, params: Params
) -> dict[str, Tensor]:
    """Permute a network's tensors; the network computes the same function.

    Along every dimension new[i] = old[permutation[i]].

    Args:
        spec: The network's symmetries.
        permutation: For each symbol an array as ``spec.random`` gives.
        params: Parameters, or the whole state dict, by name. Tensors that the spec does
            not know are kept.

    Returns:
        New tensors by name.

    Raises:
        ValueError: If a symbol is missing, an array is no permutation, or a tensor has
            another shape than the traced one.
    """
    check_permutation(spec, permutation)
    return {
        name: permuted(tensor, spec.axes.get(name, ()), permutation, name)
        for name, tensor in params.items()
    }


def permuted(
    tensor: Tensor, axes: Axes, permutation: Permutation, name: str = "tensor"
) -> Tensor:
    """One tensor with its dimensions permuted; symbols without an array stay."""
    for d, factors in enumerate(axes):
        expect(
            tensor.dim() == len(axes)
            and tensor.shape[d] == prod(f.size for f in factors),
            name,
            f"a tensor of shape {tuple(tensor.shape)}",
            f"to have shape {tuple(prod(f.size for f in dim) for dim in axes)}",
            "Pass the parameters of the model that was traced.",
        )
        if any(factor.symbol in permutation for factor in factors):
            index = torch.from_numpy(_order(factors, permutation)).to(tensor.device)
            tensor = tensor.index_select(d, index)
    return tensor


def check_permutation(spec: PermutationSpec, permutation: Permutation) -> None:
    """Raise unless there is one valid array for each symbol of the spec."""
    for name, wanted in spec.identity().items():
        array = permutation.get(name)
        expect(
            array is not None
            and np.shape(array) == wanted.shape
            and np.array_equal(np.sort(array, axis=-1), wanted),
            f"permutation[{name!r}]",
            array,
            f"to be a permutation of shape {wanted.shape}",
            "Take it from weight_matching, activation_matching or spec.random.",
        )


def _order(factors: tuple[Factor, ...], permutation: Permutation) -> NDArray[np.int64]:
    """The order of a dimension's indices under the permutations of its factors."""
    order = np.zeros(1, dtype=np.int64)
    for symbol, size in factors:
        array = permutation.get(str(symbol), np.arange(size))
        if array.ndim == 2:  # the outer factor's position chooses the row
            array = array[np.arange(len(order)) % len(array)]
        order = (order[:, None] * size + array).ravel()
    return order


def _check(spec: PermutationSpec, twin: nn.Module, inputs: Any, outputs: Any) -> None:
    """Raise unless a random permutation leaves the outputs as they are."""
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
        "to compute the same function after a permutation that its run suggests",
        "Its operations depend on the example's values, or are random; "
        "match the parts of it that do not.",
    )


def _named(model: nn.Module, what: str) -> dict[str, Tensor]:
    """Parameters or buffers by name, those of several names under each."""
    return dict(getattr(model, f"named_{what}")(remove_duplicate=False))


def as_input(tensor: Tensor) -> Tensor:
    """An input on the CPU, floating ones in float64."""
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor
