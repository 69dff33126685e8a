"""Model copies: the user's own module, without what training wrapped around it.

A model that is trained privately is wrapped (by Opacus, ``DistributedDataParallel`` or
``torch.compile``), and its modules have hooks and per-sample gradients of Opacus.
:func:`unwrap` finds the user's module inside. Four functions copy it; the copies differ
in what they share with the model and in the mode in which they run:

=========================  ==============  ================  ======================
function                   weights         mode              for
=========================  ==============  ================  ======================
:func:`training_copy`      own             as in the model   training on
:func:`same_mode_copy`     shared          as in the model   repeating a forward
                                                             pass of training
:func:`evaluation_copy`    shared          evaluation        measuring
:func:`independent_copy`   own             evaluation        changing the weights
=========================  ==============  ================  ======================

*Shared* means that the parameters are new objects on the storage of the live model's
parameters: the copy has gradients and flags of its own, but a write to the weights
changes both models. Modules, buffers and attributes are always the copy's own, and so
are the user's forward hooks, because the forward pass may need them (weight
normalisation does). The user's backward hooks are copied by ``training_copy`` only.
Hooks, lists and gradients of Opacus and of this package are never copied.

The guarantee is that running a copy leaves no trace on the live model. It rests on
``copy.deepcopy`` and breaks if a module's method was replaced by a closure over the
live module: the copy then computes with the live parameters.
:func:`require_own_parameters` finds this in the autograd graph of the outputs.

>>> live = nn.Linear(2, 1)
>>> copied = evaluation_copy(live)
>>> copied.training, copied.weight.data_ptr() == live.weight.data_ptr()
(False, True)
"""

import copy
import functools
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

from opacus_pi._torch_compat import (
    BACKWARD_HOOK_TABLES,
    COMPILED_CALL,
    FORWARD_HOOK_TABLES,
    BatchNormBase,
    compiled_module,
    forward_hooks,
)
from opacus_pi.models.batches import floating

_PACKAGES = ("opacus", "opacus_pi")
_ALL_HOOK_TABLES = (*FORWARD_HOOK_TABLES, *BACKWARD_HOOK_TABLES)
# The attribute in which Opacus keeps the handles of its hooks: it marks a hooked model.
_HANDLES_OF_OPACUS = "autograd_grad_sample_hooks"
_NOTING = "capture_activations_hook"  # the hook by which Opacus notes inputs of layers
# The attributes that Opacus adds to the layers with this hook. The user's layers may
# have attributes of these names, too.
_ACTIVATIONS = "activations"
_ADDED_TO_LAYERS = (
    _ACTIVATIONS,
    "max_batch_len",
    "ft_compute_sample_grad",
    "_forward_counter",
)
_NOT_COPIED = object()  # stands in the copy for a hook that is removed afterwards


def training_copy(model: nn.Module) -> nn.Module:
    """Return a copy to train, with its own weights, buffers and hooks, equal in value.

    Args:
        model: A module, plain or wrapped; it is only read.

    Returns:
        A new module, each layer in the mode that it has in the model.
    """
    return _deep_copy(unwrap(model), {}, _ALL_HOOK_TABLES)


def evaluation_copy(model: nn.Module) -> nn.Module:
    """Return a copy to measure, in evaluation mode, on the storage of the live weights.

    An embedding with ``max_norm`` gets weights of its own, because its forward pass
    rescales them in place.

    Args:
        model: A plain module, or one wrapped by Opacus or for distributed training.

    Returns:
        A new module; nothing may write to its parameters.

    Raises:
        ValueError: If a BatchNorm layer has no running statistics, so that the
            examples of a batch would influence each other.
    """
    model = unwrap(model)
    _require_running_statistics(model)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = _parameter(parameter.detach(), parameter)
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm:
            weight = cast(nn.Parameter, module.weight)
            memo[id(weight)] = _parameter(weight.detach().clone(), weight)
    return _deep_copy(model, memo, FORWARD_HOOK_TABLES).eval()


def same_mode_copy(model: nn.Module) -> nn.Module:
    """Return an :func:`evaluation_copy` with each layer in the live layer's mode.

    Args:
        model: An unwrapped module.

    Raises:
        ValueError: As :func:`evaluation_copy` does.
    """
    copied = evaluation_copy(model)
    for ours, theirs in zip(copied.modules(), model.modules(), strict=True):
        ours.training = theirs.training
    return copied


def independent_copy(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode whose weights may be overwritten.

    Args:
        model: Plain, or wrapped by Opacus or for distributed training; only read.

    Returns:
        A new module that shares nothing with the model.

    Raises:
        ValueError: As :func:`evaluation_copy` does.
    """
    return copy.deepcopy(evaluation_copy(model))


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module inside Opacus, distributed and compile wrappers."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def added_by_opacus(module: nn.Module) -> set[str]:
    """Return the names of the attributes that Opacus has added to a module.

    A layer whose inputs Opacus notes has a hook for it. The list of these inputs has
    one list of tensors for each pass; any other list is the user's. An empty list in a
    hooked layer is taken for Opacus's.

    Args:
        module: A module of a model that may be in training.
    """
    present = vars(module)
    found = {_HANDLES_OF_OPACUS} & present.keys()
    if any(_notes_inputs(hook) for hook in forward_hooks(module).values()):
        found |= set(_ADDED_TO_LAYERS) & present.keys()
    if _ACTIVATIONS in found and not _are_of_opacus(present[_ACTIVATIONS]):
        found.remove(_ACTIVATIONS)
    return found


def _notes_inputs(hook: Any) -> bool:
    """Return whether a forward hook is the one by which Opacus notes inputs."""
    return getattr(hook, "__name__", "") == _NOTING and is_hook_of_opacus(hook)


def _are_of_opacus(activations: Any) -> bool:
    """Return whether an attribute is the list in which Opacus notes inputs."""
    return isinstance(activations, list) and all(
        isinstance(one, list) and all(isinstance(x, torch.Tensor) for x in one)
        for one in activations
    )


def made_by_opacus(value: Any) -> bool:
    """Return whether a class of the value is defined in Opacus or in this package."""
    return any(_in_packages(cls.__module__) for cls in type(value).__mro__)


def require_own_parameters(outputs: Any, live: Iterable[nn.Parameter]) -> None:
    """Raise if outputs of a copy were computed with parameters of the live model.

    Args:
        outputs: What the copy returned, with its autograd graph.
        live: The live model's parameters.

    Raises:
        ValueError: If a gradient would flow to one of them.
    """
    foreign = {id(p) for p in live}
    if any(id(leaf) in foreign for leaf in graph_leaves(outputs)):
        raise ValueError(
            "A copy of the model still computes with the parameters of the "
            "original, so copy.deepcopy does not copy it completely. If you "
            "replaced a method of the model, bind the new one with "
            "types.MethodType: a function that refers to the model is not copied."
        )


def graph_leaves(outputs: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor to whose ``.grad`` a backward pass would add.

    Args:
        outputs: Tensors with their autograd graph, also nested.
    """
    pending = [leaf.grad_fn for leaf in floating(outputs).values()]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if (variable := getattr(node, "variable", None)) is not None:
            yield variable
        new = {child for child, _ in getattr(node, "next_functions", ())} - seen
        seen |= new
        pending.extend(new)


def _inner(model: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper, ``None`` if the model is not a wrapper."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner: nn.Module = model.module
        return inner
    if made_by_opacus(model):
        is_module = isinstance(model, nn.Module)
        children = dict(model.named_children()) if is_module else {}
        parts = {**children, **vars(model)}
        return parts.get("_module", parts.get("module"))
    return compiled_module(model)


def _parameter(values: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
    """Return a parameter without the gradients and attributes of another."""
    return nn.Parameter(values, requires_grad=like.requires_grad)


def _deep_copy(
    model: nn.Module, memo: dict[int, Any], kept_tables: tuple[str, ...]
) -> nn.Module:
    """Copy a module without what Opacus and torch.compile added to it.

    ``copy.deepcopy`` does not copy an object whose id is in its memo, but uses the
    value found there. So everything that the copy must not have is replaced through
    the memo before the copy is made.

    Args:
        model: An unwrapped model.
        memo: The replacements of objects, by the objects' ids, as in ``deepcopy``.
        kept_tables: The hook tables whose entries, if the user's, are copied.
    """
    added = [(module, added_by_opacus(module)) for module in model.modules()]
    for module, names in added:
        memo |= _replacements(module, kept_tables, names)
    for module in model.modules():
        if (inner := compiled_module(module)) is not None:
            memo[id(module)] = copy.deepcopy(inner, memo)
    copied = copy.deepcopy(model, memo)
    for module, names in added:
        for name in names if id(module) in memo else ():
            vars(memo[id(module)]).pop(name, None)
    for module in copied.modules():
        for name in kept_tables:
            _remove_replaced_(getattr(module, name))
    return copied


def _replacements(
    module: nn.Module, kept_tables: tuple[str, ...], added: set[str]
) -> dict[int, Any]:
    """Return the replacements for parts of one module in the copy, by the parts' ids.

    Args:
        module: One module of the model, without its children.
        kept_tables: The hook tables of which only the entries of Opacus are replaced.
        added: The attributes that Opacus has added to the module.
    """
    found: dict[int, Any] = {}
    for name, value in vars(module).items():
        if name in kept_tables:
            hooks = [hook for hook in value.values() if is_hook_of_opacus(hook)]
            found |= {id(hook): _NOT_COPIED for hook in hooks}
        elif (stand_in := _stand_in(name, value, added)) is not value:
            found[id(value)] = stand_in
    return found


def _stand_in(name: str, value: Any, added: set[str]) -> Any:
    """Return an attribute's replacement in the copy; the value itself if it is copied.

    Hook tables that are not kept become empty, and so do lists of Opacus, such as the
    activations of the last batch. A compiled call is dropped, because it would run the
    original module.

    Args:
        name: Name of the attribute.
        value: Its value.
        added: The attributes that Opacus has added to the module.
    """
    if name in _ALL_HOOK_TABLES:
        return OrderedDict()
    if name == COMPILED_CALL:
        return None
    if name in added and isinstance(value, list):
        return []
    if isinstance(value, torch.Tensor) and not value.is_leaf:
        return value.detach().clone()  # deepcopy refuses these
    return value


def _remove_replaced_(hooks: dict[int, Any]) -> None:
    """Delete the entries of a hook table that were not copied."""
    for key in [key for key, hook in hooks.items() if hook is _NOT_COPIED]:
        del hooks[key]


def is_hook_of_opacus(hook: Any) -> bool:
    """Return whether a hook is defined or made by Opacus or this package."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    owner = getattr(hook, "__self__", None)
    return _in_packages(getattr(hook, "__module__", "")) or made_by_opacus(owner)


def _in_packages(module_name: str | None) -> bool:
    """Return whether a dotted module name lies in Opacus or in this package."""
    return (module_name or "").split(".")[0] in _PACKAGES


def _require_running_statistics(model: nn.Module) -> None:
    """Raise if a layer uses statistics of the batch even in evaluation mode."""
    for name, module in model.named_modules():
        if isinstance(module, BatchNormBase) and module.running_mean is None:
            shown = " ".join([type(module).__name__, *([repr(name)] if name else [])])
            raise ValueError(
                f"{shown} without running statistics normalises by the batch, so that "
                "the examples of a batch have no gradients of their own. Use "
                "track_running_stats=True or GroupNorm."
            )
