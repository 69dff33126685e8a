"""Measure without disturbing: random states restored, gradients on."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Restore the states of ``random``, numpy and torch (CUDA if in use) at the end.

    Gradients are on inside, also within ``no_grad`` or ``inference_mode``.

    >>> with isolated():
    ...     first = torch.rand(1)
    >>> bool(first == torch.rand(1))
    True
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with (
        torch.random.fork_rng(devices=list(devices)),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
