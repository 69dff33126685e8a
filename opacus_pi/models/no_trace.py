"""Contexts in which a model can be run without leaving a trace on the training run.

Three things outside the model change when it is run: the states of random number
generators, the modes of its layers, and switches of the thread (gradients, inference
mode, autocast). Each context restores those that it touches, also after an error.
The model's own state (weights, buffers, hooks) is protected by running a copy
(:mod:`opacus_pi.models.copies`).

* :func:`random_state_untouched` restores random states and nothing else.
* :func:`evaluating` is for forward passes of the live model: evaluation mode, no
  gradients.
* :func:`isolated` is for measuring gradients on a copy, wherever it is called from.
"""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from opacus_pi.models.accelerators import (
    device_random_states,
    kinds_in_use,
    set_device_random_states,
)

__all__ = ["evaluating", "isolated", "random_state_untouched"]


@contextmanager
def random_state_untouched() -> Iterator[None]:
    """Restore the states of ``random``, numpy and torch at the end.

    Of torch these are the states of the CPU and of the accelerators that are in use.

    >>> with random_state_untouched():
    ...     first = torch.rand(1)
    >>> bool(first == torch.rand(1))
    True
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cpu_state, device_states = torch.get_rng_state(), device_random_states()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        set_device_random_states(device_states)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, without gradients; restore modes afterwards.

    Args:
        model: The live model; each submodule gets its own training flag back. Random
            states are restored, too.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with random_state_untouched(), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def isolated() -> Iterator[None]:
    """Turn gradients on and autocast off, whatever contexts surround the call.

    Norms must not depend on where a sweep is called from: under ``no_grad`` there would
    be none, under autocast they would be rounded. Random states are restored.

    >>> with torch.inference_mode(), isolated():
    ...     torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    (True, False)
    """
    with ExitStack() as stack:
        stack.enter_context(random_state_untouched())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in kinds_in_use():
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
