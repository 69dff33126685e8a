r"""Normalisation layers: what is learned is a scale and a shift of normalised inputs.

:math:`y = w \hat x + b`, so that :math:`\nabla w = \sum g \hat x` and
:math:`\nabla b = \sum g` over the positions that share an entry.
"""

from collections.abc import Collection
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from opacus_pi.gradients.products import squared_lengths
from opacus_pi.gradients.registry import register_norm_rule


@register_norm_rule(nn.GroupNorm)
def group_norm_squares(
    module: nn.GroupNorm, x: Tensor, grad: Tensor, names: Collection[str]
) -> Tensor:
    """Squares of scale and shift, one entry per channel: ``(b, c, ...)``."""
    normalised = F.group_norm(x, module.num_groups, None, None, module.eps)
    return _channel_squares(normalised, grad, names)


@register_norm_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batch_norm_squares(
    module: _BatchNorm, x: Tensor, grad: Tensor, names: Collection[str]
) -> Tensor:
    """The same with running statistics: ``(b, c)`` or ``(b, c, ...)``."""
    normalised = F.batch_norm(
        x, module.running_mean, module.running_var, training=False, eps=module.eps
    )
    return _channel_squares(normalised, grad, names)


@register_norm_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm_squares(
    module: _InstanceNorm, x: Tensor, grad: Tensor, names: Collection[str]
) -> Tensor:
    """The same with statistics of each example and channel, or running ones."""
    normalised = F.instance_norm(
        x,
        module.running_mean,
        module.running_var,
        use_input_stats=module.running_mean is None,
        eps=module.eps,
    )
    return _channel_squares(normalised, grad, names)


@register_norm_rule(nn.LayerNorm)
def layer_norm_squares(
    module: nn.LayerNorm, x: Tensor, grad: Tensor, names: Collection[str]
) -> Tensor:
    """Squares of scale and shift, one entry per feature: ``(b, ..., features)``."""
    normalised = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    return _affine_squares(
        _tokens(normalised, module), _tokens(grad, module), names, shared=1
    )


@register_norm_rule(nn.RMSNorm)
def rms_norm_squares(
    module: nn.RMSNorm, x: Tensor, grad: Tensor, names: Collection[str]
) -> Tensor:
    """Squares of the scale, one entry per feature: ``(b, ..., features)``."""
    normalised = F.rms_norm(x, module.normalized_shape, eps=module.eps)
    return _affine_squares(
        _tokens(normalised, module), _tokens(grad, module), names, shared=1
    )


def _channel_squares(
    normalised: Tensor, grad: Tensor, names: Collection[str]
) -> Tensor:
    """Squares where positions after ``(b, c)`` share an entry."""
    shape = (*grad.shape[:2], -1)
    return _affine_squares(
        normalised.reshape(shape), grad.reshape(shape), names, shared=2
    )


def _tokens(values: Tensor, module: nn.LayerNorm | nn.RMSNorm) -> Tensor:
    """``(b, ..., *features)`` as ``(b, t, features)``."""
    return values.flatten(-len(module.normalized_shape)).reshape(
        len(values), -1, module.weight.numel()
    )


def _affine_squares(
    normalised: Tensor, grad: Tensor, names: Collection[str], shared: int
) -> Tensor:
    """Squares of scale and shift; dimension ``shared`` holds what shares an entry."""
    squares: Tensor | float = 0.0
    if "bias" in names:
        squares = squared_lengths(grad.sum(shared))
    if "weight" in names:
        squares = squares + squared_lengths(normalised.mul_(grad).sum(shared))
    return cast(Tensor, squares)
