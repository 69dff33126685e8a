"""A forward pass of a training loop, kept so that a copy can repeat it.

The random states and the automatic mixed precision are those at its beginning, so that
a copy of the model draws the same numbers and rounds in the same way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from opacus_pi.models.accelerators import (
    device_random_states,
    set_device_random_states,
)
from opacus_pi.models.batches import device_of, map_tensors

__all__ = ["ForwardCall"]


@dataclass(frozen=True)
class ForwardCall:
    """Everything that is needed to repeat a forward pass.

    Args:
        args: The model's positional inputs.
        kwargs: Its inputs by keyword.
        state: Torch's random state before the pass, on the CPU.
        states: Those of the accelerators.
        device: The type of the model's device.
        mixed_type: The data type of automatic mixed precision; None: it was off.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Tensor
    states: list[Tensor]
    device: str
    mixed_type: torch.dtype | None

    @classmethod
    def now(
        cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> "ForwardCall":
        """Return what the pass that is about to be made needs.

        Args:
            module: The model.
            args: Its positional inputs.
            kwargs: Its inputs by keyword.
        """
        device = device_of(module).type
        is_mixed = torch.is_autocast_enabled(device)
        kind = torch.get_autocast_dtype(device) if is_mixed else None
        states = device_random_states()
        return cls(args, kwargs, torch.get_rng_state(), states, device, kind)

    def with_copied_inputs(self) -> "ForwardCall":
        """Return the same call on copies of its inputs: the loop may change these."""
        args, kwargs = map_tensors(_copied, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """Set random states and mixed precision as they were before the pass.

        The caller restores the random states afterwards.
        """
        torch.set_rng_state(self.state)
        set_device_random_states(self.states)
        is_mixed = self.mixed_type is not None
        with torch.autocast(self.device, dtype=self.mixed_type, enabled=is_mixed):
            yield


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor without its graph."""
    return tensor.detach().clone()
