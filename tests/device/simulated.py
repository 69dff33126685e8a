"""The simulated device of these tests as torch knows it: registration and counts."""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from opacus_pi.models.accelerators import has_float64

NAME = "simulated"
_KINDS = ("to_host", "to_host_later", "to_device", "scalar", "shape", "synchronize")
_WAITS = ("to_host", "scalar", "shape", "synchronize")


def register(library: Path) -> None:
    """Make the device known to torch; must precede the first backward pass.

    Args:
        library: What ``tests.device.build`` compiled.
    """
    torch.ops.load_library(str(library))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()


def _module() -> Any:
    """Return the module ``torch.simulated`` with what torch expects of a device."""
    ops = torch.ops.simulated_device
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = lambda device: None
    module.synchronize = lambda device=None: torch.accelerator.synchronize()
    module.get_rng_state = lambda device=0: ops.rng_state()
    module.set_rng_state = lambda state, device=0: ops.set_rng_state(state)
    module.manual_seed = ops.seed
    module.manual_seed_all = ops.seed
    module.device = _nothing
    module._is_in_bad_fork = lambda: False
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    return module


@contextmanager
def _nothing(device: Any) -> Iterator[None]:
    """Stand for ``torch.cuda.device``: there is one device, so nothing is changed."""
    yield


class Counts:
    """How often the host waited for the device, and what was copied, in a block."""

    def __init__(self) -> None:
        self._before: list[int] = torch.ops.simulated_device.counts()

    def now(self) -> dict[str, int]:
        """Return the numbers since the object was made, by kind, without zeros."""
        after = torch.ops.simulated_device.counts()
        found = zip(_KINDS, after, self._before, strict=True)
        return {kind: a - b for kind, a, b in found if a != b}

    def waits(self) -> int:
        """Return how often the host waited for the device."""
        return sum(self.now().get(kind, 0) for kind in _WAITS)


@contextmanager
def without_waits() -> Iterator[None]:
    """Make every wait of the host for the device an error, with its traceback."""
    torch.ops.simulated_device.refuse_waits(True)
    try:
        yield
    finally:
        torch.ops.simulated_device.refuse_waits(False)


@contextmanager
def without_float64() -> Iterator[None]:
    """Make the device refuse float64, as Apple's MPS does."""
    torch.ops.simulated_device.refuse_float64(True)
    has_float64.cache_clear()
    try:
        yield
    finally:
        torch.ops.simulated_device.refuse_float64(False)
        has_float64.cache_clear()
