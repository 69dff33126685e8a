"""Layers that are listened to while they train: with a rule, or as black boxes."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from opacus_pi._torch_compat import own_parameters
from opacus_pi.gradients.clipping.batch import Call
from opacus_pi.gradients.fallback import vmapped_gradients
from opacus_pi.gradients.parameter_gradients import Formed, Gradients
from opacus_pi.gradients.registry import GradientRule, gradient_rule
from opacus_pi.models.copies import same_mode_copy

if TYPE_CHECKING:
    from opacus_pi.gradients.clipping.book import Book

Found = Mapping[str, Gradients] | None
LayerRule = Callable[[nn.Module, Call, Tensor, Mapping[str, nn.Parameter]], Found]


def layer_rule(module: nn.Module) -> LayerRule | None:
    """Return how to get at the gradients of a layer's own parameters.

    By the rule of its type; by ``torch.func`` for one without a rule and without
    layers inside; ``None`` if it is neither.
    """
    if next(module.parameters(recurse=False), None) is None:
        return None
    rule = gradient_rule(module)
    if rule is not None:
        return _ByRule(rule)
    is_store = isinstance(module, (nn.ParameterList, nn.ParameterDict))
    is_leaf = next(module.children(), None) is None
    return _vmapped if is_leaf and not is_store else None


class _ByRule:
    """A registered rule."""

    def __init__(self, rule: GradientRule) -> None:
        self._rule = rule

    def __call__(
        self,
        module: nn.Module,
        call: Call,
        grad: Tensor,
        parameters: Mapping[str, nn.Parameter],
    ) -> Found:
        args, kwargs = call
        (x,) = (*args, *kwargs.values())
        return self._rule(module, x, grad, parameters)


def _vmapped(
    module: nn.Module,
    call: Call,
    grad: Tensor,
    parameters: Mapping[str, nn.Parameter],
) -> Found:
    """Form the gradients of a layer without a rule; ``None`` if it cannot be done."""
    try:
        found = vmapped_gradients(same_mode_copy(module), parameters, call, {0: grad})
    except Exception:  # vmap refuses a layer in one of many ways
        return None
    return {name: Formed(values) for name, values in found.items()}


class LayerListener:
    """One layer: frozen while it runs, its output tapped. Copies are inert.

    Args:
        book: Where it reports; ``None``: nowhere.
        rule: How its gradients are got at.
    """

    def __init__(
        self, book: "Book | None" = None, rule: LayerRule | None = None
    ) -> None:
        self._book, self._rule = book, rule
        self._frozen: dict[str, nn.Parameter] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerListener, ()

    def attach(self, module: nn.Module) -> list[Any]:
        """Listen to a layer; returns the handles that end it."""
        return [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(
                self._after, with_kwargs=True, always_call=True
            ),
        ]

    def thaw(self) -> dict[str, nn.Parameter]:
        """Make the parameters live again; returns them."""
        frozen, self._frozen = self._frozen, {}
        for parameter in frozen.values():
            parameter.requires_grad_(True)
        return frozen

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Freeze the layer if it is given a batch."""
        inputs = (*args, *kwargs.values())
        if self._book is None or not any(self._book.wants(x) for x in inputs):
            return
        if isinstance(self._rule, _ByRule) and len(inputs) > 1:
            return
        for name, parameter in own_parameters(module).items():
            if self._book.is_live(parameter):
                self._frozen[name] = cast(nn.Parameter, parameter)
                self._frozen[name].requires_grad_(False)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Thaw the layer and tap its output."""
        parameters, book, rule = self.thaw(), self._book, self._rule
        if output is None or not parameters or book is None or rule is None:
            return None  # the layer has failed, or is none of this pass
        if not (book.wants(output) and output.is_floating_point()):
            book.miss(parameters)
            return None
        if not isinstance(rule, _ByRule):
            output = output.clone()  # it may be a view of something

        def gradients(call: Call, grad: Tensor) -> Found:
            return rule(module, call, grad, parameters)

        return book.tap(output, (args, kwargs), parameters, gradients)
