"""Recognise models whose layers all treat each example alone, whatever the input.

Such a model need not be probed. Only chains of known layers are recognised: in any
other model an operation between two layers may mix examples. A layer type is on the
list only if its computation cannot confuse the dimension of the examples with another
one. This excludes recurrent layers, attention, and normalisation over given shapes.

>>> import torch
>>> x = torch.zeros(4, 3)
>>> separable_by_construction(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), (x,), {})
True
>>> separable_by_construction(nn.Sequential(nn.Flatten(0)), (x,), {})
False
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from opacus_pi._torch_compat import FORWARD_HOOK_TABLES
from opacus_pi.models.copies import is_hook_of_opacus

__all__ = ["separable_by_construction"]

# Layers that treat each entry, or each vector along the last dimension, alone.
_POINTWISE = (
    nn.Linear,
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Softplus,
    nn.Softsign,
    nn.LogSigmoid,
    nn.Dropout,
)
# Layers by the number of dimensions after examples and channels. With one less,
# torch takes the examples for channels.
_SPATIAL = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.MaxPool1d: 1,
    nn.MaxPool2d: 2,
    nn.MaxPool3d: 3,
    nn.AvgPool1d: 1,
    nn.AvgPool2d: 2,
    nn.AvgPool3d: 3,
    nn.AdaptiveAvgPool1d: 1,
    nn.AdaptiveAvgPool2d: 2,
    nn.AdaptiveAvgPool3d: 3,
}


def separable_by_construction(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    batch_dim: int = 0,
) -> bool:
    """Return whether a model is a chain of layers known to treat examples separately.

    Args:
        model: The user's module, unwrapped.
        args: Its positional inputs.
        kwargs: Its inputs by keyword.
        batch_dim: The dimension of the inputs along which the examples are.
    """
    if batch_dim != 0 or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
        return False
    num_dims: int | None = args[0].dim()
    for layer in _chain(model):
        num_dims = None if num_dims is None else _dims_after(layer, num_dims)
        if num_dims is None or num_dims < 2 or _is_changed(layer):
            return False
    return True


def _chain(model: nn.Module) -> list[nn.Module]:
    """Return the layers that a model applies one after another, in order.

    ``Sequential`` is taken apart; any other module is one layer.
    """
    if type(model) is not nn.Sequential or _is_changed(model):
        return [model]
    return [layer for part in model for layer in _chain(part)]


def _dims_after(layer: nn.Module, num_dims: int) -> int | None:
    """Return how many dimensions a layer's output has.

    Args:
        layer: The layer.
        num_dims: The dimensions of its input.

    Returns:
        None if the layer is not known, or treats such an input in another way.
    """
    kind = type(layer)
    if kind in _POINTWISE or kind is nn.GroupNorm:
        return num_dims
    if kind in _SPATIAL:
        return num_dims if num_dims == _SPATIAL[kind] + 2 else None
    if isinstance(layer, nn.Flatten) and kind is nn.Flatten:
        first, last = layer.start_dim, layer.end_dim % num_dims
        return num_dims - (last - first) if 1 <= first <= last else None
    return None


def _is_changed(layer: nn.Module) -> bool:
    """Return whether a hook of the user or a replaced method may change the outputs."""
    hooks = [h for name in FORWARD_HOOK_TABLES for h in getattr(layer, name).values()]
    return "forward" in vars(layer) or not all(map(is_hook_of_opacus, hooks))
