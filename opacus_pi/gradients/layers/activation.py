r"""Activations with parameters: the slope of ``nn.PReLU``.

For :math:`y = \max(x, 0) + w \min(x, 0)` with output gradient g, the gradient of the
slope w is the sum of :math:`g \min(x, 0)` over the positions that share it.
"""

from collections.abc import Collection

from torch import Tensor, nn

from opacus_pi.gradients.layers.registry import register_layer_rule


@register_layer_rule(nn.PReLU)
def slope_gradients(
    module: nn.PReLU, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, Tensor] | None:
    """Gradients of the slope, one for all channels or one for each.

    Args:
        module: The layer.
        x: Its input, ``(b, channels, ...)``.
        grad: The gradient at its output.
        names: ``["weight"]``.

    Returns:
        By name; ``None`` for an input without channels.
    """
    if x.dim() < 2:
        return None
    slopes = (x.clamp(max=0.0) * grad).reshape(*x.shape[:2], -1).sum(2)
    return {"weight": slopes if module.num_parameters > 1 else slopes.sum(1, True)}
