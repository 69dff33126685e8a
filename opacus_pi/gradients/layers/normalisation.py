r"""Normalisation layers, which learn a scale and a shift of normalised inputs.

:math:`y = w \hat x + b`, so that :math:`\nabla w = \sum g \hat x` and
:math:`\nabla b = \sum g` over the positions that share an entry. The gradients are no
larger than the parameters, and are formed.

A layer that normalises by statistics of the batch mixes its examples and is not
covered: BatchNorm and InstanceNorm with running statistics, in training mode.

Each rule normalises the saved input once more, without scale and shift, by torch's own
function; the normalised input itself is not kept by the layer. All rules have the
arguments of :func:`~opacus_pi.gradients.layers.register_layer_rule`.
"""

from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor, nn

from opacus_pi._torch_compat import BatchNormBase, InstanceNormBase
from opacus_pi.gradients.layers.registry import register_layer_rule


@register_layer_rule(nn.GroupNorm)
def group_norm_gradients(
    module: nn.GroupNorm, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, Tensor]:
    """Gradients of scale and shift, one entry per channel; inputs ``(b, c, ...)``."""
    normalised = F.group_norm(x, module.num_groups, None, None, module.eps)
    return _channel_gradients(normalised, grad, names)


@register_layer_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batch_norm_gradients(
    module: BatchNormBase, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, Tensor] | None:
    """Gradients of scale and shift with running statistics, one entry per channel.

    Returns:
        By name, ``(b, c)``; ``None`` where the batch's own statistics are used.
    """
    if _uses_the_batch(module):
        return None
    normalised = F.batch_norm(
        x, module.running_mean, module.running_var, training=False, eps=module.eps
    )
    return _channel_gradients(normalised, grad, names)


@register_layer_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm_gradients(
    module: InstanceNormBase, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, Tensor] | None:
    """Gradients with statistics of each example and channel, or running ones.

    Returns:
        By name, ``(b, c)``; ``None`` where running statistics follow the batch.
    """
    if _uses_the_batch(module):
        return None
    normalised = F.instance_norm(
        x,
        module.running_mean,
        module.running_var,
        use_input_stats=module.running_mean is None,
        eps=module.eps,
    )
    return _channel_gradients(normalised, grad, names)


@register_layer_rule(nn.LayerNorm)
def layer_norm_gradients(
    module: nn.LayerNorm, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, Tensor]:
    """Gradients of scale and shift, one entry per feature; the last axes are features.

    The number of these axes is that of ``module.normalized_shape``.
    """
    normalised = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    return _affine_gradients(
        _tokens(normalised, module), _tokens(grad, module), names, shared=1
    )


@register_layer_rule(nn.RMSNorm)
def rms_norm_gradients(
    module: nn.RMSNorm, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, Tensor]:
    """Gradients of the scale, one entry per feature; the last axes are features."""
    normalised = F.rms_norm(x, module.normalized_shape, eps=module.eps)
    return _affine_gradients(
        _tokens(normalised, module), _tokens(grad, module), names, shared=1
    )


def _uses_the_batch(module: BatchNormBase | InstanceNormBase) -> bool:
    """Return whether running statistics follow the batch, as they do in training mode.

    An example's output then depends on the others of its batch, now or later, so it has
    no gradient of its own.
    """
    return module.training and module.running_mean is not None


def _channel_gradients(
    normalised: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, Tensor]:
    """Return the gradients where the positions after ``(b, c)`` share an entry."""
    shape = (*grad.shape[:2], -1)
    return _affine_gradients(
        normalised.reshape(shape), grad.reshape(shape), names, shared=2
    )


def _tokens(values: Tensor, module: nn.LayerNorm | nn.RMSNorm) -> Tensor:
    """Return ``(b, ..., *features)`` as ``(b, t, features)``.

    Args:
        values: Inputs or output gradients of the layer.
        module: The layer; ``normalized_shape`` lists the axes of the features.
    """
    return values.flatten(-len(module.normalized_shape)).reshape(
        len(values), -1, module.weight.numel()
    )


def _affine_gradients(
    normalised: Tensor, grad: Tensor, names: Collection[str], shared: int
) -> dict[str, Tensor]:
    """Sum the gradients of scale and shift over the positions that share an entry.

    Args:
        normalised: Normalised inputs, overwritten.
        grad: Output gradients, of the same shape.
        names: Which of ``"weight"``, ``"bias"`` are wanted.
        shared: The dimension of the positions.
    """
    found = {}
    if "bias" in names:
        found["bias"] = grad.sum(shared)
    if "weight" in names:
        found["weight"] = normalised.mul_(grad).sum(shared)
    return found
