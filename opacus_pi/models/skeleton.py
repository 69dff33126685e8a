"""Copies of a model without what training wrapped around it or hooked into it.

``bare_copy`` owns its weights, to train on. ``evaluation_copy``, to measure on, shares
the storage of the parameters (nothing writes to them) and owns all else: modules,
buffers, evaluation mode. What happens to a copy leaves no trace on the live model.

>>> live = nn.Linear(2, 1)
>>> copied = evaluation_copy(live)
>>> copied.training, copied.weight.data_ptr() == live.weight.data_ptr()
(False, True)
"""

import copy
import functools
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from opacus_pi._torch_compat import (
    BACKWARD_HOOK_TABLES,
    COMPILED_CALL,
    FORWARD_HOOK_TABLES,
    BatchNormBase,
    compiled_module,
)
from opacus_pi._validate import expect
from opacus_pi.models.batches import floating

_PACKAGES = ("opacus", "opacus_pi")
_HOOKS = (*FORWARD_HOOK_TABLES, *BACKWARD_HOOK_TABLES)
_OBSERVED = "autograd_grad_sample_hooks"  # Opacus hangs it on a model that it hooks
_LEFT_BY_OPACUS = (
    _OBSERVED,
    "activations",
    "max_batch_len",
    "ft_compute_sample_grad",
    "_forward_counter",
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
    return _copied(unwrap(model), {}, _HOOKS)


def evaluation_copy(model: nn.Module) -> nn.Module:
    """Copy a model without its wrappers, gradients and Opacus hooks, to evaluate it.

    Forward hooks of the user stay, since they may take part in the computation
    (weight normalisation does); backward hooks do not.

    Args:
        model: A plain module, or one wrapped by Opacus or for distributed training.

    Returns:
        A module in evaluation mode whose parameters share the live ones' storage.

    Raises:
        ValueError: If a BatchNorm layer has no running statistics, so that examples
            would depend on each other.
    """
    model = unwrap(model)
    _check_batch_statistics(model)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = _parameter(parameter.detach(), parameter)
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm:
            weight = cast(nn.Parameter, module.weight)  # forward rescales it in place
            memo[id(weight)] = _parameter(weight.detach().clone(), weight)
    return _copied(model, memo, FORWARD_HOOK_TABLES).eval()


def working_copy(model: nn.Module) -> nn.Module:
    """The same, each layer in the live one's mode.

    Args:
        model: An unwrapped module.

    Raises:
        ValueError: As ``evaluation_copy`` does.
    """
    twin = evaluation_copy(model)
    for ours, theirs in zip(twin.modules(), model.modules(), strict=True):
        ours.training = theirs.training
    return twin


def check_separate(outputs: Any, live: Iterable[nn.Parameter]) -> None:
    """Raise if outputs of the copy were computed with parameters of the live model.

    Args:
        outputs: What the copy returned, with its autograd graph.
        live: The live model's parameters.

    Raises:
        ValueError: If a gradient would flow to one of them.
    """
    foreign = {id(p) for p in live}
    pending = [leaf.grad_fn for leaf in floating(outputs).values()]
    seen = set(pending)
    while pending:
        node = pending.pop()
        expect(
            id(getattr(node, "variable", None)) not in foreign,
            "model",
            "a module whose copy uses the original's parameters",
            "to be copied by copy.deepcopy",
            "Bind replaced methods with types.MethodType, not in a closure.",
        )
        new = {child for child, _ in getattr(node, "next_functions", ())} - seen
        seen |= new
        pending.extend(new)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module inside Opacus, distributed and compile wrappers."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def made_by_opacus(value: Any) -> bool:
    """Whether a class of Opacus, or of this package, is among the value's classes."""
    return any(_in_packages(cls.__module__) for cls in type(value).__mro__)


def _inner(model: nn.Module) -> nn.Module | None:
    """What a wrapper wraps, ``None`` if the model is no wrapper."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner: nn.Module = model.module
        return inner
    if made_by_opacus(model):
        parts = {**getattr(model, "_modules", {}), **vars(model)}
        return parts.get("_module", parts.get("module"))
    return compiled_module(model)


def _parameter(values: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
    """A parameter without the gradients and attributes of another."""
    return nn.Parameter(values, requires_grad=like.requires_grad)


def _copied(
    model: nn.Module, memo: dict[int, Any], kept_hooks: tuple[str, ...]
) -> nn.Module:
    """A deep copy without what Opacus or torch.compile hung on the modules.

    Args:
        model: An unwrapped model.
        memo: What to put in the place of objects, by their ids, as in ``deepcopy``.
        kept_hooks: The tables of hooks whose entries, if the user's, are copied.
    """
    observed = any(_OBSERVED in vars(module) for module in model.modules())
    left_over = _LEFT_BY_OPACUS if observed else ()
    for module in model.modules():
        for name, value in vars(module).items():
            if name in kept_hooks:
                ours = [hook for hook in value.values() if _is_ours(hook)]
                memo |= {id(hook): _DROPPED for hook in ours}
            elif name in _HOOKS:
                memo[id(value)] = OrderedDict()
            elif name == COMPILED_CALL:
                memo[id(value)] = None
            elif name in left_over and isinstance(value, list):
                memo[id(value)] = []
            elif isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()  # deepcopy refuses these
    for module in model.modules():
        if (inner := compiled_module(module)) is not None:
            memo[id(module)] = copy.deepcopy(inner, memo)
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for name in left_over:
            vars(module).pop(name, None)
        for name in kept_hooks:
            _take_off_dropped(getattr(module, name))
    return twin


def _take_off_dropped(hooks: dict[int, Any]) -> None:
    """Delete the entries that were not to be copied."""
    for key in [key for key, hook in hooks.items() if hook is _DROPPED]:
        del hooks[key]


def _is_ours(hook: Any) -> bool:
    """Whether a hook is a function, method or object of Opacus or this package."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    owner = getattr(hook, "__self__", None)
    return _in_packages(getattr(hook, "__module__", "")) or made_by_opacus(owner)


def _in_packages(module_name: str | None) -> bool:
    """Whether a dotted module name lies in Opacus or in this package."""
    return (module_name or "").split(".")[0] in _PACKAGES


def _check_batch_statistics(model: nn.Module) -> None:
    """Raise if a layer's statistics are those of the batch."""
    for name, module in model.named_modules():
        expect(
            not isinstance(module, BatchNormBase) or module.running_mean is not None,
            "model",
            f"{type(module).__name__} {name!r} without running statistics",
            "to treat the examples of a batch separately",
            "Use track_running_stats=True or GroupNorm.",
        )
