"""Measure without disturbing, and without being disturbed."""

import contextlib
from collections.abc import Iterator

import torch

from opacus_pi.gradients.random_state import random_state_untouched


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Gradients are on inside, whatever is outside; random states are restored.

    >>> with torch.inference_mode(), isolated():
    ...     torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    (True, False)
    """
    with random_state_untouched(), torch.inference_mode(False), torch.enable_grad():
        yield
