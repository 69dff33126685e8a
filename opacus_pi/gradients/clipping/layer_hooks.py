"""Hooks that tap the layers of a live model while it is trained.

A sweep runs a copy, whose layers it may replace; training runs the user's model, on
which only hooks may be put. A pre-hook freezes the layer's parameters, so that the
backward pass does not form their summed gradients, which clipping could not use. A
forward hook makes them live again and taps the output. A layer with a rule is
differentiated by this rule; a layer without a rule, and without layers inside, by
``torch.func``. The output of a recurrent layer is replaced by one that is computed step
by step (:mod:`~opacus_pi.gradients.layers.recurrent`).

The guarantee: parameters are live (they require gradients) again when the layer has
returned or failed (an interrupt in between is repaired at the model's next call), and
the parameters of an output that cannot be tapped are reported as missed, so that
clipping refuses or forms their gradients in another way.
"""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from opacus_pi._torch_compat import (
    forward_hooks,
    forward_pre_hooks,
    own_parameters,
)
from opacus_pi.gradients.clipping.copied_calls import require_copyable
from opacus_pi.gradients.example_gradients import ExampleGradients, ExplicitGradients
from opacus_pi.gradients.fallback import (
    MODEL_ERRORS,
    raise_if_out_of_memory,
    vmapped_gradients,
)
from opacus_pi.gradients.layers.recurrent import Unrolled, is_recurrent
from opacus_pi.gradients.layers.registry import (
    LayerRule,
    gradients_by_rule,
    layer_rule,
    takes_whole_calls,
)
from opacus_pi.gradients.taps import Call, Taps
from opacus_pi.models.copies import same_mode_copy

Found = Mapping[str, ExampleGradients] | None  # by parameter name; None: not known


def layer_hooks(taps: Taps, module: nn.Module) -> "LayerHooks | RecurrentHooks | None":
    """Return the hooks of a layer, or ``None`` where a module cannot be tapped.

    Not tapped are modules without parameters of their own, and modules without a rule
    that hold other layers or are mere containers of parameters. Such a module is not
    one operation with one output: its parameters are used outside of layers, where
    :class:`~opacus_pi.gradients.parameters_outside_layers.ParametersOutsideLayers`
    looks for them.

    Args:
        taps: The object to which the layer will report.
        module: Any module of the model.
    """
    if next(module.parameters(recurse=False), None) is None:
        return None
    if is_recurrent(module):
        return RecurrentHooks(Unrolled(taps, module))
    rule = layer_rule(module)
    is_container = isinstance(module, (nn.ParameterList, nn.ParameterDict))
    is_leaf = next(module.children(), None) is None and not is_container
    return LayerHooks(taps, rule) if rule is not None or is_leaf else None


class LayerHooks:
    """The hooks of one layer: frozen while it runs, its output tapped.

    Copies of the object do nothing, so that a copied model is not tapped.

    Args:
        taps: The object to which the layer reports; ``None`` for a copy.
        rule: The layer's rule; ``None``: differentiated by ``torch.func``.
    """

    def __init__(self, taps: Taps | None = None, rule: LayerRule | None = None) -> None:
        self._taps, self._rule = taps, rule
        self._forward: Any = None  # a method that the user put into the layer
        self._is_copied = False  # whether copies of the layer are known to be complete
        self._is_whole = False  # whether the user's hooks run inside these
        self._frozen: dict[str, nn.Parameter] = {}
        self._call: Call = ((), {})

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerHooks, ()

    def attach(self, module: nn.Module) -> list[Any]:
        """Register the hooks.

        A rule is for the layer alone, so these hooks are next to its ``forward``. Where
        ``torch.func`` repeats the call, the user's hooks are repeated, too: there these
        hooks are the outermost.

        Args:
            module: The layer that these hooks were made for.

        Returns:
            The handles that remove them.
        """
        self._is_whole = is_whole = self._rule is None
        self._forward = vars(module).get("forward")
        return [
            module.register_forward_pre_hook(
                self._before, with_kwargs=True, prepend=is_whole
            ),
            module.register_forward_hook(
                self._after, with_kwargs=True, always_call=True, prepend=not is_whole
            ),
        ]

    def unfreeze(self) -> dict[str, nn.Parameter]:
        """Make the parameters live again.

        Called by the forward hook, and at the end of the model's call for a layer whose
        hook was skipped by an interrupt.

        Returns:
            The parameters that were frozen, by name; none if the layer was not tapped.
        """
        frozen, self._frozen = self._frozen, {}
        for parameter in frozen.values():
            parameter.requires_grad_(True)
        return frozen

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Freeze the layer if it is given a batch.

        A layer that is given something else, such as one row for the whole batch, stays
        live. Autograd then has its gradient, and a hook on the parameter reports it.
        """
        inputs = (*args, *kwargs.values())
        if self._taps is None or not any(self._taps.wants(x) for x in inputs):
            return
        if vars(module).get("forward") is not self._forward:  # replaced since
            self._forward = vars(module).get("forward")
            self._rule, self._is_copied = layer_rule(module), False
        if self._rule is not None and not takes_whole_calls(self._rule):
            if len(inputs) > 1:
                return  # a rule is for a single input; the layer stays live
        if not self._taps.shared_uses.isdisjoint(module.parameters(recurse=False)):
            return  # the operations of the layer are followed
        self._call = args, kwargs
        for name, parameter in own_parameters(module).items():
            if self._taps.is_live(parameter):
                self._frozen[name] = cast(nn.Parameter, parameter)
                self._frozen[name].requires_grad_(False)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Unfreeze the layer and tap its output.

        Torch calls this also while an error of ``forward`` is being raised, with
        ``None`` as output.
        """
        parameters, taps = self.unfreeze(), self._taps
        given, self._call = self._call, ((), {})
        if output is None or not parameters or taps is None:
            return None  # the layer has failed, or is not tapped in this call
        if not (taps.wants(output) and output.is_floating_point()):
            taps.miss(parameters)
            return None
        if self._rule is None:
            # The tap changes its tensor in place, which must not reach a tensor that
            # the output is a view of (a layer may return its input).
            output = output.clone()

        def gradients(call: Call, grad: Tensor) -> Found:
            return self._gradients(module, call, grad, parameters)

        return taps.tap(output, given, parameters, gradients)

    def _gradients(
        self,
        module: nn.Module,
        call: Call,
        grad: Tensor,
        parameters: Mapping[str, nn.Parameter],
    ) -> Found:
        """Return the examples' gradients, ``None`` if they cannot be computed.

        Args:
            module: The layer.
            call: Its arguments, detached.
            grad: The gradient at its output, ``(b, ...)``.
            parameters: The frozen parameters, by name.

        Raises:
            ValueError: If a copy of the layer computes with the layer's parameters.
        """
        if self._rule is not None:
            return gradients_by_rule(self._rule, module, call, grad, list(parameters))
        if not self._is_copied:
            require_copyable(module, call, len(grad))
            self._is_copied = True
        try:
            copied = same_mode_copy(module)
            if not self._is_whole:  # the user's hooks have run, or will
                forward_pre_hooks(copied).clear()
                forward_hooks(copied).clear()
            found = vmapped_gradients(copied, parameters, call, {0: grad})
        except MODEL_ERRORS as error:
            raise_if_out_of_memory(error)
            return None
        return {name: ExplicitGradients(values) for name, values in found.items()}


class RecurrentHooks:
    """The hook of a recurrent layer: its output is computed once more, step by step.

    Torch's kernel returns no gradients at the gates. What it has computed is dropped,
    with its graph, so that autograd computes nothing for the layer's parameters.

    Copies of the object do nothing, so that a copied model is not tapped.

    Args:
        unrolled: Computes the layer; ``None`` for a copy.
    """

    def __init__(self, unrolled: Unrolled | None = None) -> None:
        self._unrolled = unrolled

    def __reduce__(self) -> tuple[Any, ...]:
        return RecurrentHooks, ()

    def attach(self, module: nn.Module) -> list[Any]:
        """Register the hook, before those of the user, which may change the output.

        Args:
            module: The layer that this hook was made for.

        Returns:
            The handle that removes it.
        """
        return [
            module.register_forward_hook(self._after, with_kwargs=True, prepend=True)
        ]

    def unfreeze(self) -> dict[str, nn.Parameter]:
        """Return nothing: the layer is never frozen."""
        return {}

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Return the outputs and the state to be used in place of the layer's own.

        ``None``: its own are used, and autograd sums up the gradients.
        """
        return None if self._unrolled is None else self._unrolled.run(*args, **kwargs)
