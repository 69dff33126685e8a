"""A copy of a model to measure on: the same weights, none of the live model's state.

The copy shares the storage of the parameters (nothing writes to them) and owns all
else: modules, buffers, evaluation mode. What happens to it leaves no trace on the
live model.

>>> live = nn.Linear(2, 1)
>>> copied = evaluation_copy(live)
>>> copied.training, copied.weight.data_ptr() == live.weight.data_ptr()
(False, True)
"""

import copy
import functools
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from opacus_pi._validate import expect
from opacus_pi.gradients.batches import floating

_PACKAGES = ("opacus", "opacus_pi")
_HOOK_TABLES = {
    "_forward_pre_hooks": True,
    "_forward_hooks": True,
    "_backward_pre_hooks": False,
    "_backward_hooks": False,
}  # whether the copy keeps the user's own hooks of this kind


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
            weight = module.weight  # forward rescales it in place
            memo[id(weight)] = _parameter(weight.detach().clone(), weight)
        for name, value in vars(module).items():
            if name in _HOOK_TABLES:
                memo[id(value)] = _hooks_to_keep(name, value)
            elif name == "_compiled_call_impl":
                memo[id(value)] = None
            elif isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()  # deepcopy refuses these
    for module in model.modules():
        if "_orig_mod" in module._modules:  # torch.compile
            memo[id(module)] = copy.deepcopy(module._orig_mod, memo)
    return copy.deepcopy(model, memo).eval()


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
        return model.module
    if made_by_opacus(model):
        parts = {**getattr(model, "_modules", {}), **vars(model)}
        return parts.get("_module", parts.get("module"))
    return model._modules.get("_orig_mod")


def _parameter(values: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
    """A parameter without the gradients and attributes of another."""
    return nn.Parameter(values, requires_grad=like.requires_grad)


def _hooks_to_keep(table: str, hooks: dict) -> OrderedDict:
    """Forward hooks that neither Opacus nor this package set; no backward hooks."""
    if not _HOOK_TABLES[table]:
        return OrderedDict()
    return OrderedDict((k, h) for k, h in hooks.items() if not _is_ours(h))


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
            not isinstance(module, _BatchNorm) or module.running_mean is not None,
            "model",
            f"{type(module).__name__} {name!r} without running statistics",
            "to treat the examples of a batch separately",
            "Use track_running_stats=True or GroupNorm.",
        )
