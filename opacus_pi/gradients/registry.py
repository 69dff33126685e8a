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

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch  # noqa: F401 (for the example above)
from torch import Tensor, nn

from opacus_pi._torch_compat import CONVOLUTION_METHOD, forward_pre_hooks
from opacus_pi.gradients.parameter_gradients import Gradients

NormRule = Callable[[Any, Tensor, Tensor, Collection[str]], Tensor | None]
GradientRule = Callable[
    [Any, Tensor, Tensor, Collection[str]], Mapping[str, Gradients] | None
]
_T = TypeVar("_T")
_Rule = TypeVar("_Rule", bound=NormRule)
_GradientRule = TypeVar("_GradientRule", bound=GradientRule)

_RULES: dict[type[nn.Module], NormRule] = {}
_GRADIENT_RULES: dict[type[nn.Module], GradientRule] = {}


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


def register_gradient_rule(
    *module_types: type[nn.Module],
) -> Callable[[_GradientRule], _GradientRule]:
    """Decorate the rule by which ``grad_sample_mode="fast"`` clips layers of a type.

    ``rule(module, x, grad, names)`` gets what a norm rule gets, and returns each
    parameter's gradients by name (``Formed`` or ``Implied``, of
    ``opacus_pi.gradients.parameter_gradients``); or ``None`` for a case it does not
    cover. A layer without a rule is differentiated by ``torch.func``.

    Args:
        *module_types: Layers with one tensor as input and one as output.

    Returns:
        The decorator; it returns the rule as it is.
    """

    def register(rule: _GradientRule) -> _GradientRule:
        _GRADIENT_RULES.update(dict.fromkeys(module_types, rule))
        return rule

    return register


def norm_rule(module: nn.Module) -> NormRule | None:
    """Return the norm rule for a layer, ``None`` if what it computes may differ.

    That is: no rule is registered, ``forward`` is overridden, or its parameters are
    computed (parametrizations; pre-hooks, as weight normalisation sets them).
    """
    return _matching(module, _RULES)


def gradient_rule(module: nn.Module) -> GradientRule | None:
    """Return the gradient rule for a layer, ``None`` as ``norm_rule`` does."""
    return _matching(module, _GRADIENT_RULES)


def _matching(module: nn.Module, rules: Mapping[type[nn.Module], _T]) -> _T | None:
    """What is registered for the class whose computation a layer inherits."""
    cls = next((cls for cls in type(module).__mro__ if cls in rules), None)
    if cls is None or hasattr(module, "parametrizations") or forward_pre_hooks(module):
        return None
    same = all(
        getattr(type(module), method, None) is getattr(cls, method, None)
        for method in ("__call__", "forward", CONVOLUTION_METHOD)
    )
    return rules[cls] if same and "forward" not in vars(module) else None
