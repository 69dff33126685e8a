"""Gradients as ``backward()`` gives them, without a trace on other tensors.

``torch.autograd.grad`` runs only the part of a graph that leads to the tensors it is
asked for. A part of a model may compute its gradients in a backward pass of its own, as
``torch.utils.checkpoint`` with ``use_reentrant=True`` does. Its parameters are not in
the graph, so ``torch.autograd.grad`` raises an error, or returns gradients that lack
that part. ``backward()``, with which models are trained, is right for all models.

**What breaks it.** Tensors that only such a part uses, other than those asked for, are
not found in the graph: their ``.grad`` is changed. So models are copied before.

>>> weight = torch.ones(2, requires_grad=True)
>>> gradients_by_backward((3 * weight).sum(), [weight])
[tensor([3., 3.])]
>>> weight.grad is None
True
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi.models.copies import graph_leaves

__all__ = ["gradients_by_backward", "other_gradients_kept"]


def gradients_by_backward(
    value: Tensor, wanted: Sequence[Tensor], gradient: Tensor | None = None
) -> list[Tensor | None]:
    """Return the gradients of a tensor with respect to leaves of its graph.

    The ``.grad`` of all tensors in the graph is afterwards as it was before.

    Args:
        value: A scalar, or any tensor if ``gradient`` is given.
        wanted: Leaves of the graph, or of parts that run a backward pass of their own.
        gradient: The gradient at ``value``, of its shape; None for a scalar.

    Returns:
        A tensor for each leaf, sparse if its ``.grad`` would be; None if it is unused.

    Raises:
        RuntimeError: If ``value`` does not require gradients.
    """
    held = [leaf.grad for leaf in wanted]
    with other_gradients_kept(value, wanted):
        try:
            for leaf in wanted:
                leaf.grad = None
            torch.autograd.backward(value, gradient)
            return [leaf.grad for leaf in wanted]
        finally:
            for leaf, before in zip(wanted, held, strict=True):
                leaf.grad = before


@contextmanager
def other_gradients_kept(outputs: Any, own: Iterable[Tensor]) -> Iterator[None]:
    """Keep the ``.grad`` of tensors in a graph, such as a criterion's weights.

    Args:
        outputs: Tensors with their autograd graph, also nested.
        own: Tensors whose gradients may change, such as the parameters of a copy.
    """
    known = {id(tensor) for tensor in own}
    leaves = graph_leaves(outputs)
    # Expanded weights, which stand for a copy's own, are neither of the two types.
    plain = (leaf for leaf in leaves if type(leaf) in (Tensor, nn.Parameter))
    others = [(leaf, leaf.grad) for leaf in plain if id(leaf) not in known]
    for leaf, _ in others:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, before in others:
            leaf.grad = before
