"""Looking at a model without changing it or the random numbers of the run."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from opacus_pi.models.random_state import random_state_untouched
from opacus_pi.models.skeleton import evaluation_copy


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer (CPU if it has none)."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def independent_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode with its own weights, without wrappers and their hooks.

    Args:
        model: Plain, or wrapped by Opacus or for distributed training; only read.

    Returns:
        A module that shares nothing with the model.

    Raises:
        ValueError: If a BatchNorm layer has no running statistics.
    """
    return copy.deepcopy(evaluation_copy(model))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random states as before afterwards.

    Args:
        model: The model; each submodule gets its own training flag back.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with random_state_untouched(), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
