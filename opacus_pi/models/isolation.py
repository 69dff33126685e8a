"""Measure without disturbing, and without being disturbed."""

import contextlib
from collections.abc import Iterator

import torch

from opacus_pi.models.random_state import random_state_untouched


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Gradients are on and autocast is off inside; random states are restored.

    >>> with torch.inference_mode(), isolated():
    ...     torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    (True, False)
    """
    has_cuda = torch.cuda.is_initialized()
    devices = ("cpu", "cuda") if has_cuda else ("cpu",)
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_state_untouched())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
