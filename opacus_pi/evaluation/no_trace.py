"""Looking at a model without changing it, or the random numbers of the run."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer (CPU if it has none)."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def same_random_states() -> Iterator[None]:
    """Put back the global random states of Python, numpy and torch afterwards."""
    python, legacy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random states as before afterwards.

    Args:
        model: The model; each submodule gets its own training flag back.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with same_random_states(), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
