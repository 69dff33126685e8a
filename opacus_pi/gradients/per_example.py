"""The gradient norm of each example of one batch."""

from typing import Any

from torch import Tensor, nn

from opacus_pi.gradients.engine import NormEngine
from opacus_pi.models.losses import Criterion
from opacus_pi.models.no_trace import isolated


def per_example_grad_norms(
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any,
) -> Tensor:
    r"""Return the L2 norm of the gradient of each example's own loss.

    :math:`\|\nabla_\theta \ell(f_\theta(x_i), y_i)\|_2` over all trainable parameters
    together, the model in evaluation mode (dropout off, running BatchNorm statistics).
    Not divided by the batch size, not clipped. The model is left untouched.

    Args:
        model: A plain module, or one wrapped by Opacus or for distributed training.
        criterion: ``criterion(outputs, targets)`` with one loss per example; a torch
            loss module may have any reduction (it is copied).
        x: Inputs: a tensor ``(b, ...)``, or a tuple or dict of them, handed over as
            ``model(*x)`` or ``model(**x)``. On the model's device.
        y: Targets, length ``b``, on the model's device.

    Returns:
        float64 ``(b,)``.

    Raises:
        ValueError: If the criterion does not give one loss per example, nothing is
            trainable, or examples share batch statistics.

    Example:
        >>> import torch
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0]])
        >>> per_example_grad_norms(model, lambda outputs, y: outputs[:, 0], x, [0])
        tensor([5.], dtype=torch.float64)
    """
    with isolated():
        squares, _ = NormEngine(model, criterion).squares(x, y)
    return squares.sqrt()
