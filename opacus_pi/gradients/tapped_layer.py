"""Tap the layers that have a rule."""

from functools import partial
from typing import Any

from torch import Tensor, nn

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
        self._live = module._parameters
        self._frozen = {
            k: p if p is None else p.detach() for k, p in self._live.items()
        }
        self._plain_forward = module.forward
        module.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, tapped if its one input and its output are batches."""
        parameters = self._parameters() if len(args) + len(kwargs) == 1 else {}
        x = self._taps.spread(*args, *kwargs.values()) if parameters else None
        if not self._taps.wants(x):
            return self._plain_forward(*args, **kwargs)
        self._module.__dict__["_parameters"] = self._frozen
        try:
            output = self._plain_forward(x)
        finally:
            self._module.__dict__["_parameters"] = self._live
        if isinstance(output, Tensor) and self._taps.wants(output):
            return self._taps.tap(output, x, parameters, self._rule)
        self._taps.miss(parameters)
        return output

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The layer's own parameters that are still to be measured here."""
        live = self._live.items()
        return {k: p for k, p in live if p is not None and self._taps.is_live(p)}
