"""Per-example gradients of any parameters of any model, computed slowly and exactly.

Parameters that the taps cannot measure are differentiated example by example, in one of
two ways: all at once by ``torch.func.vmap`` (:func:`vmapped_squares`,
:func:`vmapped_gradients`), or, where a model cannot be run under vmap, one after the
other by plain autograd (:func:`looped_squares`). The second way is also the reference
for all other computations of norms.

The guarantee: each example is alone in its forward pass, so whatever the model does
across a batch cannot mix examples. What breaks it: randomness that differs between the
passes. Memory: vmap forms the gradients of several examples at a time, at most 2^26
numbers. If even that does not fit, the out-of-memory error reaches the user; it never
turns into a loop.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi._torch_compat import pytree
from opacus_pi.models.batches import (
    arguments,
    forward,
    map_tensors,
    num_examples,
    reached,
    rows,
    unsqueeze,
)
from opacus_pi.models.losses import Losses, unit_cotangents

_MAX_ELEMENTS = 1 << 26  # of per-example gradients held at once
_CONVERTED = 1 << 16  # entries of a gradient that are converted to float64 at once
# What the code of a model raises where it cannot be run on other inputs or by
# ``torch.func.vmap``, which refuses control flow on values, random layers, in-place
# writes and operations without a batching rule.
MODEL_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    Warning,  # where the user has turned warnings into errors
)
_NO_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED")


def raise_if_out_of_memory(error: BaseException) -> None:
    """Raise an error again if it says that memory ran out.

    A slower way would also run out of memory, or hide from the user why it is slow.

    Args:
        error: An error for which the caller otherwise uses a slower way.

    Raises:
        RuntimeError: The error itself, as ``torch.OutOfMemoryError`` or of the CPU's
            allocator.
    """
    if isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(t in str(error) for t in _NO_MEMORY)
    ):
        raise error


def vmapped_squares(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    x: Any,
    cotangents: Mapping[int, Tensor],
) -> Tensor:
    r"""Differentiate many examples at once by ``torch.func``, each alone.

    :math:`\|\nabla_\theta \langle u_i, f_\theta(x_i)\rangle\|^2` for the parameters
    :math:`\theta` given.

    Args:
        model: The model, in evaluation mode.
        parameters: Parameters to differentiate with respect to, by name.
        x: Inputs of ``b`` examples.
        cotangents: ``u`` from :func:`unit_cotangents`.

    Returns:
        float64 ``(b,)``.

    Raises:
        RuntimeError: If ``torch.func.vmap`` refuses the model, or another of
            ``MODEL_ERRORS``.
    """
    values = {name: p.detach() for name, p in parameters.items()}
    places = list(cotangents)

    def squares(x: Any, cotangents: list[Tensor]) -> Tensor:
        ends = dict(zip(places, unsqueeze(cotangents), strict=True))
        gradients = _pulled_back(model, values, arguments(unsqueeze(x)), ends)
        parts = [g.square().sum().double() for g in gradients.values()]
        return torch.stack(parts).sum()

    size = sum(p.numel() for p in values.values())
    vectorised = torch.func.vmap(squares, chunk_size=max(1, _MAX_ELEMENTS // size))
    with _only_trainable(model, []):  # vjp differentiates w.r.t. the values given
        return vectorised(x, list(cotangents.values()))


def vmapped_gradients(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    call: tuple[tuple[Any, ...], dict[str, Any]],
    cotangents: Mapping[int, Tensor],
) -> dict[str, Tensor]:
    """Form each example's gradients of the given parameters with ``torch.func``.

    Args:
        model: A module, in the mode in which it was called.
        parameters: Parameters to differentiate with respect to, by name.
        call: Positional and keyword arguments of the call; tensors whose first
            dimension has the length of the cotangents hold one row per example.
        cotangents: The gradient at each floating output, ``(b, ...)``, by its place
            among the output's leaves.

    Returns:
        ``(b, *shape)`` by name.

    Raises:
        RuntimeError: If ``torch.func.vmap`` refuses the model, or another of
            ``MODEL_ERRORS``.
    """
    values = {name: p.detach() for name, p in parameters.items()}
    leaves, shape = pytree.tree_flatten(call)
    b = len(next(iter(cotangents.values())))
    own = {
        place: leaf.detach()
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.shape[:1] == (b,)
    }

    def gradients(own: dict[int, Tensor], ends: dict[int, Tensor]) -> dict[str, Tensor]:
        alone = {place: leaf.unsqueeze(0) for place, leaf in own.items()}
        filled = [alone.get(place, leaf) for place, leaf in enumerate(leaves)]
        one = pytree.tree_unflatten(filled, shape)
        ends = {place: end.unsqueeze(0) for place, end in ends.items()}
        return _pulled_back(model, values, one, ends)

    found: dict[str, Tensor] = torch.func.vmap(gradients)(own, dict(cotangents))
    return found


def _pulled_back(
    model: nn.Module,
    values: dict[str, Tensor],
    call: tuple[tuple[Any, ...], dict[str, Any]],
    cotangents: Mapping[int, Tensor],
) -> dict[str, Tensor]:
    """Return a call's vector-Jacobian product by the values of parameters."""

    def outputs(values: dict[str, Tensor]) -> list[Tensor]:
        leaves = pytree.tree_leaves(torch.func.functional_call(model, values, *call))
        return [leaves[place] for place in cotangents]

    pullback = torch.func.vjp(outputs, values)[1]
    found: dict[str, Tensor] = pullback(list(cotangents.values()))[0]
    return found


def looped_squares(
    model: nn.Module,
    parameters: Sequence[Tensor],
    losses: Losses,
    x: Any,
    y: Any,
) -> tuple[Tensor, list[Any]]:
    """Differentiate one example after the other by plain autograd.

    Args:
        model: The model, in evaluation mode.
        parameters: Parameters of the model to differentiate with respect to.
        losses: Per-example losses, from ``float64_losses``.
        x: Inputs of ``b`` examples.
        y: Their targets.

    Returns:
        Squared norms, float64 ``(b,)``, and the outputs of each example.
    """
    found, all_outputs = [], []
    with _only_trainable(model, parameters):
        for i in range(num_examples(y)):
            outputs = forward(model, rows(x, i, i + 1))
            cotangents, scales = unit_cotangents(losses, outputs, rows(y, i, i + 1))
            squares = _squares(outputs, parameters, cotangents)
            found.append(squares * scales.square())
            all_outputs.append(map_tensors(Tensor.detach, outputs))
    return torch.cat(found), all_outputs


def _squares(
    outputs: Any, parameters: Sequence[Tensor], cotangents: Mapping[int, Tensor]
) -> Tensor:
    """Return the squared norm of one vector-Jacobian product, float64 ``()``."""
    ends, units = reached(outputs, cotangents)
    if ends:  # backward(), because reentrant checkpointing refuses autograd.grad
        torch.autograd.backward(ends, units)
    total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    for p in parameters:
        if p.grad is not None:
            parts = p.grad.to_dense().flatten().split(_CONVERTED)
            total += sum(part.double().square().sum() for part in parts)
            p.grad = None
    return total


@contextmanager
def _only_trainable(model: nn.Module, chosen: Sequence[Tensor]) -> Iterator[None]:
    """Let gradients flow to these parameters and to no others for a while."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        for p in chosen:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
