"""Batches as the user has them: tensors, or tuples and dicts of tensors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset


def arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that hand ``x`` to a model.

    Args:
        x: A tensor, a tuple or list (``model(*x)``) or a dict (``model(**x)``); the
            first dimension of each tensor counts the examples.
    """
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x), {}) if isinstance(x, (tuple, list)) else ((x,), {})


def size_of(data_set: Dataset[Any]) -> int:
    """Return the number of examples of a map-style data set."""
    return len(data_set)  # type: ignore[arg-type]  # torch: Dataset has no __len__


def forward(model: nn.Module, x: Any) -> Any:
    """Return the model's outputs on the batch ``x``."""
    args, kwargs = arguments(x)
    return model(*args, **kwargs)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Return ``batch`` with ``function`` applied to each tensor in it."""
    if isinstance(batch, Tensor):
        return function(batch)
    return pytree.tree_map_only(Tensor, function, batch)


def rows(batch: Any, start: int, stop: int) -> Any:
    """Return the examples ``start`` to ``stop`` of each tensor in ``batch``."""
    return map_tensors(lambda tensor: tensor[start:stop], batch)


def unsqueeze(example: Any) -> Any:
    """Return one example as a batch of one."""
    return map_tensors(lambda tensor: tensor.unsqueeze(0), example)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return ``batch`` with its tensors on ``device``."""
    return map_tensors(lambda tensor: tensor.to(device), batch)


def to_float64(value: Any) -> Any:
    """Return ``value`` with its floating tensors in float64."""
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, value)


def floating(outputs: Any) -> dict[int, Tensor]:
    """Return the floating tensors in ``outputs``, by their place among its leaves."""
    alone = isinstance(outputs, Tensor)
    return {
        place: leaf
        for place, leaf in enumerate(
            [outputs] if alone else pytree.tree_leaves(outputs)
        )
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }


def reached(
    outputs: Any, cotangents: Mapping[int, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs that need a gradient, and their cotangents."""
    pairs = [
        (leaf, cotangents[place])
        for place, leaf in floating(outputs).items()
        if leaf.requires_grad
    ]
    return [leaf for leaf, _ in pairs], [cotangent for _, cotangent in pairs]
