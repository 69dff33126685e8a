"""The table of layer types that have a rule, and a check that a layer fits its type.

Rules are kept in one table by layer type. Norm sweeps
(:mod:`~opacus_pi.gradients.tapped_layers`) and training
(:mod:`~opacus_pi.gradients.clipping.layer_hooks`) both look a layer up here, so that a
rule which is registered once serves both.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from opacus_pi._torch_compat import CONVOLUTION_METHOD, forward_pre_hooks
from opacus_pi.gradients.example_gradients import ExampleGradients, ExplicitGradients
from opacus_pi.gradients.taps import Call

LayerRule = Callable[
    [Any, Any, Tensor, Collection[str]],
    Mapping[str, ExampleGradients | Tensor] | None,
]
_Rule = TypeVar("_Rule", bound=LayerRule)

_RULES: dict[type[nn.Module], LayerRule] = {}
_OF_WHOLE_CALLS: set[LayerRule] = set()


def register_layer_rule(
    *module_types: type[nn.Module],
    whole_call: bool = False,
) -> Callable[[_Rule], _Rule]:
    """Register a function that computes per-example gradients of layer types.

    ``rule(module, x, grad, names)`` receives the layer, its single input ``(b, ...)``,
    the gradient at its output ``(b, ...)``, and the names of the layer's own parameters
    whose gradients are needed. It returns, for each name, each example's
    gradient: a tensor ``(b, *parameter.shape)``, flattened after b if you like, or
    ``ExampleGradients`` that compute norms and sums without forming that tensor. It
    returns ``None`` for a case that it does not cover, such as an unusual input.

    Norm sweeps and ``grad_sample_mode="fast"`` both use the rule. It also serves
    subclasses that keep ``forward``. A layer without a rule is differentiated by
    ``torch.func``, which is slower and takes more memory.

    Args:
        *module_types: Layers with one tensor as input and one as output, whose output
            for an example depends on the input of this example only.
        whole_call: Whether the layer may have several inputs. The rule then receives
            ``call``, the pair of positional and keyword arguments, in place of ``x``.

    Returns:
        The decorator; it returns the rule unchanged.
    """

    def register(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(module_types, rule))
        if whole_call:
            _OF_WHOLE_CALLS.add(rule)
        return rule

    return register


def layer_rule(module: nn.Module) -> LayerRule | None:
    """Return the rule of a layer, if the layer computes what the rule assumes.

    A subclass inherits the rule of its base class, but may compute something else under
    the same name. A rule that does not fit would give wrong norms without any error, so
    a layer is trusted only where nothing has been changed.

    Args:
        module: Any module.

    Returns:
        The rule; ``None`` if no rule is registered for a class of the layer, if
        ``forward`` is overridden (in the class or on the object), or if the parameters
        are computed (parametrizations, and pre-hooks as weight normalisation sets
        them).
    """
    cls = next((cls for cls in type(module).__mro__ if cls in _RULES), None)
    return _RULES[cls] if cls is not None and computes_as(cls, module) else None


def computes_as(cls: type[nn.Module], module: nn.Module) -> bool:
    """Return whether a layer is of a class and computes what that class computes.

    Args:
        cls: The class.
        module: Any module.

    Returns:
        False also if ``forward`` is overridden, in a subclass or on the object, or if
        parameters are computed (parametrizations, and pre-hooks as weight normalisation
        sets them).
    """
    return (
        isinstance(module, cls)
        and all(
            getattr(type(module), method, None) is getattr(cls, method, None)
            for method in ("__call__", "forward", CONVOLUTION_METHOD)
        )
        and "forward" not in vars(module)
        and not hasattr(module, "parametrizations")
        and not forward_pre_hooks(module)
    )


def takes_whole_calls(rule: LayerRule) -> bool:
    """Return whether a rule covers calls with several inputs.

    Args:
        rule: A layer's rule.
    """
    return rule in _OF_WHOLE_CALLS


def gradients_by_rule(
    rule: LayerRule, module: nn.Module, call: Call, grad: Tensor, names: Collection[str]
) -> dict[str, ExampleGradients] | None:
    """Return the examples' gradients by name, tensors wrapped as explicit gradients.

    Args:
        rule: A layer's rule.
        module: The layer.
        call: Its arguments; a single input, unless the rule takes whole calls.
        grad: The gradient at its output.
        names: Which of its parameters are wanted.
    """
    args, kwargs = call
    x: Any = call
    if not takes_whole_calls(rule):
        (x,) = (*args, *kwargs.values())
    found = rule(module, x, grad, names)
    if found is None:
        return None
    return {
        name: ExplicitGradients(g) if isinstance(g, Tensor) else g
        for name, g in found.items()
    }
