"""Warnings of slow ways to measure norms: which parameters, why, and the remedy.

A sweep that forms each example's gradients may take many times as long as one by rules,
with the same result. Without a word the user could not know that a small change of the
model would make it fast.
"""

import warnings
from collections.abc import Iterable, Mapping
from weakref import WeakSet

from torch import nn

_MOST = 6  # parameters that a warning names

_FALLBACK = (
    "{number} of the model have no exact rule, so their gradients are formed for each "
    "example {way}: the norms are right, but slower to compute, and need more memory. "
    "These are {named}. Use layers and operations that have a rule (the documentation "
    'lists them under "Which layers have a rule"), or register a rule for the layer '
    "(opacus_pi.gradients.register_layer_rule). opacus_pi.gradients.rule_coverage "
    "returns how each parameter is measured."
)
_WAYS = {
    "torch.func": "by torch.func.vmap",
    "one at a time": "by a backward pass of its own",
}
INFLUENCE = (
    "The gradient norms of a batch do not agree with those of its examples alone: the "
    "examples of a batch influence each other, or the model is random in evaluation "
    "mode. Each example is therefore differentiated alone: the norms are then right, "
    "but computing them is slow. Use layers that treat each example alone and draw no "
    "random numbers in evaluation mode."
)
NEEDS_ALL_GRADIENTS = (
    "The model cannot be run while some of its parameters are left out of the backward "
    "pass ({error}), as a function with a backward pass of its own may need all of "
    "them. Each example is therefore differentiated alone: the norms are then right, "
    "but computing them is slow. If the model saves memory by an autograd function of "
    "its own, use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
)

_warned: WeakSet[nn.Module] = WeakSet()  # models whose fallbacks were named


def warn_of_fallbacks(
    model: nn.Module | None, ways: Mapping[str, str], stacklevel: int
) -> None:
    """Warn, once for each model, of parameters that have no exact rule.

    Args:
        model: The unwrapped live model; ``None`` if it no longer exists.
        ways: How these parameters are measured, by name: the way, a colon, the cause.
        stacklevel: Of the warning, counted from the caller.
    """
    if not ways or model is None or model in _warned:
        return
    _warned.add(model)
    way = next(iter(ways.values())).split(":")[0]
    number = "1 parameter" if len(ways) == 1 else f"{len(ways)} parameters"
    message = _FALLBACK.format(number=number, way=_WAYS[way], named=_named(ways))
    if len(ways) == 1:
        message = message.replace("model have", "model has", 1)
        message = message.replace("their gradients are", "its gradients are", 1)
        message = message.replace("These are", "It is", 1)
    warnings.warn(message, stacklevel=stacklevel + 1)


def cause(module: nn.Module, operations: Iterable[str], is_misplaced: bool) -> str:
    """Return why a parameter has no exact rule.

    Args:
        module: The module that owns the parameter.
        operations: Names of operations without a rule that use it.
        is_misplaced: Whether it is applied to rows that are not the examples.
    """
    if is_misplaced:
        return "applied to as many rows as there are examples, which are not theirs"
    names = sorted(operations)
    if names:
        return f"used by {', '.join(names)}"
    return f"used by {type(module).__name__}"


def _named(ways: Mapping[str, str]) -> str:
    """Return the first parameters with their causes, as one phrase."""
    shown = [f"{name} ({way.split(': ', 1)[1]})" for name, way in ways.items()]
    rest = len(shown) - _MOST
    return ", ".join(shown[:_MOST]) + (f", and {rest} more" if rest > 0 else "")
