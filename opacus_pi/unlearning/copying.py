"""A deep copy of a model, without what training wrapped around it or hooked into it."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from opacus_pi.gradients.skeleton import unwrap

# what Opacus hangs on the modules that it observes
_LEFT_BY_OPACUS = (
    "autograd_grad_sample_hooks",
    "activations",
    "max_batch_len",
    "ft_compute_sample_grad",
    "_forward_counter",
)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_HOOK_OPTIONS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
_DROPPED = object()


def bare_copy(model: nn.Module) -> nn.Module:
    """A deep copy without wrappers, per-sample gradients, gradients or Opacus's hooks.

    The user's own hooks are copied. The original is only read.

    Args:
        model: A module, plain or wrapped.

    Returns:
        A new module with equal weights and buffers and the same train/eval mode.
    """
    model = unwrap(model)
    # deepcopy puts the stand-in wherever it meets one of these objects, so that no
    # hook drags its wrapper into the copy; parameters are copied without attributes
    stand_ins: dict[int, Any] = {}
    for module in model.modules():
        for hook in _hooks(module).values():
            if _of_opacus(hook):
                stand_ins[id(hook)] = _DROPPED
        for name, value in vars(module).items():
            if name in _LEFT_BY_OPACUS and isinstance(value, list):
                stand_ins[id(value)] = _DROPPED
            elif isinstance(value, torch.Tensor) and not value.is_leaf:
                stand_ins[id(value)] = value.detach().clone()  # deepcopy refuses it
    twin = copy.deepcopy(model, stand_ins)
    for module in twin.modules():
        _sweep(module)
    return twin


def _hooks(module: nn.Module) -> dict[int, Callable]:
    """All hooks of one module, by their numbers."""
    return {k: hook for name in _HOOKS for k, hook in getattr(module, name).items()}


def _of_opacus(hook: Callable) -> bool:
    """Whether a hook's code belongs to Opacus or to this library."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.split(".")[0] in ("opacus", "opacus_pi")


def _sweep(module: nn.Module) -> None:
    """Take the stand-ins and Opacus's attributes off one copied module."""
    gone = {key for key, hook in _hooks(module).items() if hook is _DROPPED}
    for name in (*_HOOKS, *_HOOK_OPTIONS):
        for key in gone & set(getattr(module, name, ())):
            del getattr(module, name)[key]
    for name in _LEFT_BY_OPACUS:
        module.__dict__.pop(name, None)
