"""Leave the random number generators as they were."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def random_state_untouched() -> Iterator[None]:
    """Restore the states of ``random``, numpy and torch (CUDA if in use) at the end.

    >>> with random_state_untouched():
    ...     first = torch.rand(1)
    >>> bool(first == torch.rand(1))
    True
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    has_cuda = torch.cuda.is_initialized()
    devices = range(torch.cuda.device_count()) if has_cuda else ()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
