r"""Normalisation layers: what is learned is a scale and a shift of normalised inputs.

:math:`y = w \hat x + b`, so that :math:`\nabla w = \sum g \hat x` and
:math:`\nabla b = \sum g` over the positions that share an entry.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_pi._torch_compat import BatchNormBase, InstanceNormBase
from opacus_pi.gradients.parameter_gradients import Formed, Gradients
from opacus_pi.gradients.products import squared_lengths
from opacus_pi.gradients.registry import register_gradient_rule, register_norm_rule

_Rule = Callable[[Any, Tensor, Tensor, Collection[str]], dict[str, Tensor]]


def _affine(*module_types: type[nn.Module]) -> Callable[[_Rule], _Rule]:
    """Register the norm rule and the gradient rule that follow from gradients."""

    def register(rule: _Rule) -> _Rule:
        @register_norm_rule(*module_types)
        def squares(
            module: nn.Module, x: Tensor, grad: Tensor, names: Collection[str]
        ) -> Tensor:
            found = rule(module, x, grad, names).values()
            return sum((squared_lengths(g) for g in found), torch.zeros(()))

        @register_gradient_rule(*module_types)
        def gradients(
            module: nn.Module, x: Tensor, grad: Tensor, names: Collection[str]
        ) -> dict[str, Gradients] | None:
            if module.training and getattr(module, "running_mean", None) is not None:
                return None  # statistics of the batch
            found = rule(module, x, grad, names)
            return {name: Formed(values) for name, values in found.items()}

        return rule

    return register


@_affine(nn.GroupNorm)
def group_norm_gradients(
    module: nn.GroupNorm, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, Tensor]:
    """Gradients of scale and shift, one entry per channel: ``(b, c, ...)``."""
    normalised = F.group_norm(x, module.num_groups, None, None, module.eps)
    return _channel_gradients(normalised, grad, names)


@_affine(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batch_norm_gradients(
    module: BatchNormBase, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, Tensor]:
    """The same with running statistics: ``(b, c)`` or ``(b, c, ...)``."""
    normalised = F.batch_norm(
        x, module.running_mean, module.running_var, training=False, eps=module.eps
    )
    return _channel_gradients(normalised, grad, names)


@_affine(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm_gradients(
    module: InstanceNormBase, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, Tensor]:
    """The same with statistics of each example and channel, or running ones."""
    normalised = F.instance_norm(
        x,
        module.running_mean,
        module.running_var,
        use_input_stats=module.running_mean is None,
        eps=module.eps,
    )
    return _channel_gradients(normalised, grad, names)


@_affine(nn.LayerNorm)
def layer_norm_gradients(
    module: nn.LayerNorm, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, Tensor]:
    """Gradients of scale and shift, one entry per feature: ``(b, ..., features)``."""
    normalised = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    return _affine_gradients(
        _tokens(normalised, module), _tokens(grad, module), names, shared=1
    )


@_affine(nn.RMSNorm)
def rms_norm_gradients(
    module: nn.RMSNorm, x: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, Tensor]:
    """Gradients of the scale, one entry per feature: ``(b, ..., features)``."""
    normalised = F.rms_norm(x, module.normalized_shape, eps=module.eps)
    return _affine_gradients(
        _tokens(normalised, module), _tokens(grad, module), names, shared=1
    )


def _channel_gradients(
    normalised: Tensor, grad: Tensor, names: Collection[str]
) -> dict[str, Tensor]:
    """Gradients where positions after ``(b, c)`` share an entry."""
    shape = (*grad.shape[:2], -1)
    return _affine_gradients(
        normalised.reshape(shape), grad.reshape(shape), names, shared=2
    )


def _tokens(values: Tensor, module: nn.LayerNorm | nn.RMSNorm) -> Tensor:
    """``(b, ..., *features)`` as ``(b, t, features)``."""
    return values.flatten(-len(module.normalized_shape)).reshape(
        len(values), -1, module.weight.numel()
    )


def _affine_gradients(
    normalised: Tensor, grad: Tensor, names: Collection[str], shared: int
) -> dict[str, Tensor]:
    """Gradients of scale and shift; dimension ``shared`` holds what shares an entry."""
    found = {}
    if "bias" in names:
        found["bias"] = grad.sum(shared)
    if "weight" in names:
        found["weight"] = normalised.mul_(grad).sum(shared)
    return found
