"""Give stored weights the names that a model has for them.

A wrapped model saves other names than the plain one, and safetensors files keep one
name of a tensor that has several.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["with_names_of", "without_wrapper"]

_WRAPPED = "_module."  # Opacus's GradSampleModule puts it before every name


def without_wrapper(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the prefix that Opacus's wrapper puts before names.

    >>> without_wrapper({"_module.weight": Tensor()})
    {'weight': tensor([])}

    Args:
        state: Tensors by name. If any name lacks the prefix, all are kept.
    """
    wrapped = all(name.startswith(_WRAPPED) for name in state)
    return {n.removeprefix(_WRAPPED) if wrapped else n: t for n, t in state.items()}


def with_names_of(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return stored weights under the names of a model, with the names of tied ones.

    Args:
        model: The model.
        state: The weights of a file, by name.
    """
    if not all(name.startswith(_WRAPPED) for name in model.state_dict()):
        state = without_wrapper(state)
    return {**_tied(model, state), **state}


def _tied(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that a file holds under another name of the same tensor.

    A model may use one tensor under several names. Files of safetensors keep one of the
    names, because they do not store memory that is shared.

    Args:
        model: The model, whose tensors show which names are tied.
        state: The weights of the file, by name.
    """
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.numel():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            names.setdefault(place, []).append(name)
    return {
        missing: state[given]
        for tied in names.values()
        for given in tied
        if given in state
        for missing in tied
        if missing not in state
    }
