"""Which layers have a formula for the squared gradient norms of their parameters.

A rule sees a layer's input and the gradient at its output, and never the parameters'
gradients:

>>> class Scale(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.factor = nn.Parameter(torch.ones(()))
...
...     def forward(self, x):
...         return self.factor * x
>>> @register_norm_rule(Scale)
... def scale_squares(module, x, grad, names):
...     return (x * grad).flatten(1).sum(1).square()
"""

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch  # noqa: F401 (for the example above)
from torch import Tensor, nn

NormRule = Callable[[Any, Tensor, Tensor, Collection[str]], Tensor | None]
_Rule = TypeVar("_Rule", bound=NormRule)

_RULES: dict[type[nn.Module], NormRule] = {}


def register_norm_rule(
    *module_types: type[nn.Module],
) -> Callable[[_Rule], _Rule]:
    r"""Decorate the rule of one or more layer types.

    ``rule(module, x, grad, names)`` gets the layer, its single input ``(b, ...)``, the
    gradient at its output ``(b, ...)`` and the names of those of its own parameters
    that count, and returns the sum over these of the squared norms of each example's
    gradient, ``(b,)``; or ``None`` for a case it does not cover, which is then done by
    differentiating the whole model. It serves subclasses that keep ``forward``. A layer
    called more than once, or sharing a parameter, is done without its rule.

    Args:
        *module_types: Layers with one tensor as input and one as output.

    Returns:
        The decorator; it returns the rule as it is.
    """

    def register(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(module_types, rule))
        return rule

    return register


def norm_rule(module: nn.Module) -> NormRule | None:
    """Return the rule for a layer, ``None`` if what it computes may differ.

    That is: no rule is registered, ``forward`` is overridden, or its parameters are
    computed (parametrizations; pre-hooks, as weight normalisation sets them).
    """
    cls = next((cls for cls in type(module).__mro__ if cls in _RULES), None)
    if cls is None or hasattr(module, "parametrizations") or module._forward_pre_hooks:
        return None
    same = all(
        getattr(type(module), method, None) is getattr(cls, method, None)
        for method in ("__call__", "forward", "_conv_forward")
    )
    return _RULES[cls] if same and "forward" not in vars(module) else None
