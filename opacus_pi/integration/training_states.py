"""The state of a training run that a rewind goes back to: weights, optimizer, settings.

The engine knows how it clips, adds noise and divides; it does not know the loop around
it. So a state holds everything that one update depends on, but no learning-rate
schedule: the learning rate of every update is recorded instead, and used again. Whether
other conditions change during a run is recorded, too: a rewind does not follow that.

The random states are saved as well. A rewind does not use them, because it needs fresh
noise; with them the same training can be repeated exactly.
"""

import hashlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.optim import Optimizer

from opacus_pi._torch_compat import BatchNormBase, DropoutBase, num_writes
from opacus_pi._validate import require
from opacus_pi.integration.checkpoints import RunState
from opacus_pi.integration.own_steps import ClearedStates, has_own_step_hooks
from opacus_pi.models.copies import unwrap
from opacus_pi.models.module_list import module_list
from opacus_pi.recording.state_file import copied

# Entries of a parameter group that are recorded by themselves, or act through the rate.
_FOLLOWED = ("params", "lr", "initial_lr", "max_lr", "min_lr")
_OF_OPACUS = ("expected_batch_size", "loss_reduction")  # settings of DPOptimizer
_FIRST = {"obstacle": "It was saved while the first update was being made."}


class TrainingStates:
    """Gives the state of one training in progress.

    Model and optimizer are the user's to delete, so they are referred to weakly.

    Args:
        module: The model that is trained, plain or wrapped.
        optimizer: The optimizer of the training, Opacus's or a plain one.
        run_state: Gives its random states; None: they are not saved.
        settings: More facts by name: numbers and strings.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        run_state: RunState | None = None,
        **settings: Any,
    ) -> None:
        self._module: Callable[[], nn.Module | None] = weakref.ref(unwrap(module))
        self._optimizer: Callable[[], Any] = weakref.ref(optimizer)
        self._run_state = run_state
        self._settings = settings
        self._marks: list[int] = []
        self._remembered: dict[str, Any] | None = None
        self._conditions: tuple[Any, int] = (None, 0)  # and their hash
        self._cleared = ClearedStates()

    def remember(self) -> None:
        """Keep a copy of the present state, as the state before the first update.

        For a training run whose forward passes change buffers (BatchNorm): at its first
        update the state before it is gone.
        """
        self._remembered = copied(self.state(0))

    def state(self, num_steps: int) -> dict[str, Any]:
        """Return the present state; its tensors may be those of the training.

        Args:
            num_steps: Updates done.

        Raises:
            ValueError: If model or optimizer were deleted.
        """
        module, optimizer = self._module(), self._optimizer()
        if module is None or optimizer is None:
            raise ValueError(
                "The model or the optimizer of the training was deleted, so its state "
                "cannot be saved. Keep both in variables until the training ends."
            )
        if num_steps == 0 and self._remembered is not None:
            return self._first_state(module)
        plain = optimizer
        settings = {**self._settings, "clipping": type(optimizer).__name__}
        if isinstance(optimizer, DPOptimizer):
            plain = optimizer.original_optimizer
            settings["loss_reduction"] = optimizer.loss_reduction
            settings["expected_batch_size"] = optimizer.expected_batch_size
        self._marks = _writes(module)
        random_states = _FIRST if self._run_state is None or not num_steps else None
        return {
            "model": module.state_dict(),
            "modules": module_list(module),
            "optimizer": plain.state_dict(),
            "optimizer_class": f"{type(plain).__module__}.{type(plain).__qualname__}",
            "parameters": _names_of_groups(module, plain),
            "evaluating": [n for n, m in module.named_modules() if not m.training],
            "frozen": [n for n, p in module.named_parameters() if not p.requires_grad],
            "settings": settings,
            "random": random_states or self._random_states(),
        }

    def _random_states(self) -> dict[str, Any]:
        """Return the random states, or the reason why they cannot be saved."""
        return {} if self._run_state is None else self._run_state.state_dict()

    def learning_rates(self) -> tuple[float, ...]:
        """Return the learning rate of each parameter group."""
        optimizer = self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        return tuple(float(group.get("lr", 0.0)) for group in groups)

    def conditions(self) -> int:
        """Return a hash of what an update depends on beside weights and rates.

        That is: which parameters are trained, the optimizer's options except its
        learning rates, how often its state was cleared, the denominator of private
        training, which modules are in evaluation mode, and the rates of dropout.

        Returns:
            At least 0; below 0 if the user has put hooks on the optimizer's steps.
        """
        module, optimizer = self._module(), self._optimizer()
        if module is None or optimizer is None:
            return 0
        plain = getattr(optimizer, "original_optimizer", optimizer)
        self._cleared.saw(plain)
        present = (
            [p.requires_grad for p in module.parameters()],
            [_mode(layer) for layer in module.modules()],
            [_options(group) for group in optimizer.param_groups],
            self._cleared.count,
            [getattr(optimizer, name, None) for name in _OF_OPACUS],
        )
        if present != self._conditions[0]:
            digest = hashlib.sha256(repr(present).encode()).digest()
            self._conditions = present, int.from_bytes(digest[:8], "big") >> 1
        hash_of_them = self._conditions[1]
        return -1 - hash_of_them if has_own_step_hooks(plain) else hash_of_them

    def _first_state(self, module: nn.Module) -> dict[str, Any]:
        """Return what was remembered, unless other weights were loaded since."""
        first, self._remembered = self._remembered, None
        if first is not None and _writes(module) == self._marks:
            return first
        mixing = any(isinstance(m, BatchNormBase) for m in module.modules())
        require(
            not mixing,
            "The weights were changed after make_monitored, and the model has "
            "BatchNorm, so its state before the first update is not known.",
            "Load weights before make_monitored, or leave checkpoints out.",
        )
        return self.state(0)


def _mode(layer: nn.Module) -> Any:
    """Return the mode of a layer, with the rate if it is one of dropout."""
    return (
        (layer.training, layer.p) if isinstance(layer, DropoutBase) else layer.training
    )


def _options(group: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the options of a parameter group, without those that are followed."""
    options = [(name, v) for name, v in group.items() if name not in _FOLLOWED]
    plain = [(name, repr(v) if torch.is_tensor(v) else v) for name, v in options]
    return [*plain, ("params", len(group["params"]))]


def _writes(module: nn.Module) -> list[int]:
    """Return how often each parameter was written to."""
    return [-1 if p.is_inference() else num_writes(p) for p in module.parameters()]


def _names_of_groups(module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Return the names of the parameters in each group of an optimizer.

    Raises:
        ValueError: If the optimizer holds a parameter that is not the model's.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    held: list[list[torch.Tensor]] = [g["params"] for g in optimizer.param_groups]
    if any(id(p) not in names for group in held for p in group):
        raise ValueError(
            "The optimizer holds a parameter that is not in the model, so a saved "
            "state would not be complete. Make the optimizer from model.parameters()."
        )
    return [[names[id(p)] for p in group] for group in held]
