"""Tap the layers that have a rule."""

from functools import partial
from typing import Any

from torch import nn

from opacus_pi._torch_compat import own_parameters, replace_own_parameters_
from opacus_pi.gradients.registry import NormRule, norm_rule
from opacus_pi.gradients.taps import Taps


def tap_layers(taps: Taps, model: nn.Module) -> set[nn.Parameter]:
    """Replace ``forward`` of each layer that has a rule.

    Args:
        taps: Where the layers report.
        model: An evaluation copy.

    Returns:
        The parameters of these layers.
    """
    tapped: set[nn.Parameter] = set()
    for module in model.modules():
        if (rule := norm_rule(module)) is not None:
            tapped.update(module.parameters(recurse=False))
            _TappedLayer(taps, module, rule)
    return tapped


class _TappedLayer:
    """One layer: frozen while it runs, its output tapped."""

    def __init__(self, taps: Taps, module: nn.Module, rule: NormRule) -> None:
        self._taps, self._module, self._rule = taps, module, partial(rule, module)
        self._live = own_parameters(module)
        self._frozen = {
            k: p if p is None else p.detach() for k, p in self._live.items()
        }
        self._measured: dict[str, nn.Parameter] = {}
        self._num_leftover = -1  # when the line above was true
        self._plain_forward = module.forward
        module.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, tapped if its one input and its output are batches."""
        taps = self._taps
        if not taps.is_listening or len(args) + len(kwargs) != 1:
            return self._plain_forward(*args, **kwargs)
        parameters = self._parameters()
        x = taps.spread(*args, *kwargs.values()) if parameters else None
        if not taps.wants(x):
            return self._plain_forward(*args, **kwargs)
        replace_own_parameters_(self._module, self._frozen)
        try:
            output = self._plain_forward(x)
        finally:
            replace_own_parameters_(self._module, self._live)
        if taps.wants(output):
            return taps.tap(output, x, parameters, self._rule)
        taps.miss(parameters)
        return output

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The layer's own parameters that are still to be measured here."""
        num_leftover = len(self._taps.leftover)
        if num_leftover != self._num_leftover:  # it only grows
            live = self._live.items()
            self._measured = {
                k: p for k, p in live if p is not None and self._taps.is_live(p)
            }
            self._num_leftover = num_leftover
        return self._measured
