"""Tap the layers of a copy that have a rule, by replacing their ``forward``.

A tapped layer runs with frozen parameters, and its output is tapped. It runs unchanged
where its rule does not apply: if it is called with several arguments, with an input
that has no row for each example, or outside a tapped pass. Its parameters then keep
``requires_grad``, so that autograd shows that they were used
(:mod:`~opacus_pi.gradients.norm_taps`).

The model is a copy that only the sweep runs, so its methods may be replaced. The user's
own model, while it is trained, gets hooks instead
(:mod:`~opacus_pi.gradients.clipping.layer_hooks`).

The guarantee: a layer's outputs are those of the plain layer, to the bit. What breaks
it: a layer whose code asks whether a weight is an ``nn.Parameter`` or requires a
gradient; in a tapped call it sees detached tensors of the same values.
"""

from typing import Any

from torch import Tensor, nn

from opacus_pi._torch_compat import own_parameters, replace_own_parameters_
from opacus_pi.gradients.example_gradients import ExampleGradients
from opacus_pi.gradients.layers.registry import (
    LayerRule,
    gradients_by_rule,
    layer_rule,
    takes_whole_calls,
)
from opacus_pi.gradients.norm_taps import NormTaps
from opacus_pi.gradients.taps import Call


def tap_layers(taps: NormTaps, model: nn.Module) -> set[nn.Parameter]:
    """Replace ``forward`` of each layer that has a rule.

    Args:
        taps: The object to which the layers report.
        model: An evaluation copy.

    Returns:
        The parameters of these layers.
    """
    tapped: set[nn.Parameter] = set()
    for module in model.modules():
        if (rule := layer_rule(module)) is not None:
            tapped.update(module.parameters(recurse=False))
            _TappedLayer(taps, module, rule)
    return tapped


class _TappedLayer:
    """One layer: frozen while it runs, its output tapped.

    A weight is frozen by exchanging the layer's table of parameters for one with
    detached tensors, which is one assignment however many weights there are.

    Args:
        taps: The object to which the layer reports.
        module: The layer; its ``forward`` is replaced.
        rule: The layer's rule.
    """

    def __init__(self, taps: NormTaps, module: nn.Module, rule: LayerRule) -> None:
        self._taps, self._module, self._rule = taps, module, rule
        self._live = own_parameters(module)
        self._frozen = {
            k: p if p is None else p.detach() for k, p in self._live.items()
        }
        self._measured: dict[str, nn.Parameter] = {}
        self._num_leftover = -1  # for which ``_measured`` was computed
        self._plain_forward = module.forward
        module.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, tapped if its one input and its output are batches.

        Args:
            *args: What the model calls the layer with.
            **kwargs: The same.

        Returns:
            The layer's output.
        """
        taps = self._taps
        call = self._batched(args, kwargs) if taps.is_intercepting else None
        if call is None:
            return self._plain_forward(*args, **kwargs)
        parameters = self._parameters()
        replace_own_parameters_(self._module, self._frozen)
        try:
            output = self._plain_forward(*call[0], **call[1])
        finally:
            replace_own_parameters_(self._module, self._live)
        if not taps.wants(output):
            # Too late to run the layer live. The taps leave these parameters over, and
            # the whole pass is repeated without them.
            taps.miss(parameters)
            return output

        def gradients(call: Call, grad: Tensor) -> dict[str, ExampleGradients] | None:
            return gradients_by_rule(
                self._rule, self._module, call, grad, list(parameters)
            )

        return taps.tap(output, call, parameters, gradients)

    def _batched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Return the arguments to run the layer with, ``None`` if it is not tapped.

        Args:
            args: What the model calls the layer with.
            kwargs: The same.
        """
        parameters, shared = self._parameters(), self._taps.shared_uses
        if not parameters or (shared and not shared.isdisjoint(parameters.values())):
            return None
        if len(args) + len(kwargs) == 1:
            x = self._taps.expand_shared(*args, *kwargs.values())
            return ((x,), {}) if self._taps.wants(x) else None
        inputs = (*args, *kwargs.values())
        known = takes_whole_calls(self._rule) and any(map(self._taps.wants, inputs))
        return (args, kwargs) if known else None

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The layer's own parameters that taps still measure, by name.

        The result changes only when parameters become ``leftover``, so it is cached:
        this runs at every call of every layer.
        """
        num_leftover = len(self._taps.leftover)
        if num_leftover != self._num_leftover:
            live = self._live.items()
            self._measured = {
                k: p for k, p in live if p is not None and self._taps.is_live(p)
            }
            self._num_leftover = num_leftover
        return self._measured
