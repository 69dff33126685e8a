"""Per-example gradient norms from Opacus's per-example gradients.

Opacus stores the gradients of a batch in the attribute ``grad_sample`` of each
parameter, one row for each example. The norm of an example's gradient over all
parameters is the norm of its norms over each of them.

>>> import torch
>>> from torch import nn
>>> model = GradSampleModule(nn.Linear(2, 1, bias=False))
>>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
>>> model(x).mean().backward()
>>> model.per_sample_gradient_norms
tensor([5., 1.])
"""

from collections.abc import Iterable, Sequence

import opacus
import torch
from torch import Tensor

__all__ = ["GradSampleModule"]


def grad_sample_norms(grad_samples: Iterable[Tensor]) -> Tensor:
    """Return the L2 norm of each example's gradient over several parameters.

    Args:
        grad_samples: One tensor ``(b, *shape)`` per parameter, on any devices.

    Returns:
        float ``(b,)``, in single precision or better, on the first tensor's device.
    """
    return joint_norms([row_norms(g) for g in grad_samples])


def row_norms(grad_sample: Tensor) -> Tensor:
    """Return the L2 norm of each example's gradient by one parameter.

    Args:
        grad_sample: Per-example gradients ``(b, *shape)``; half precision is widened
            to single first, because squares of small gradients would underflow.

    Returns:
        float ``(b,)``.
    """
    rows = grad_sample.detach() if grad_sample.requires_grad else grad_sample
    if rows.ndim != 2:
        rows = rows.flatten(1) if rows.ndim > 1 else rows.unsqueeze(1)
    if rows.dtype.itemsize < 4:
        rows = rows.float()
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def joint_norms(norms: Sequence[Tensor]) -> Tensor:
    """Return norms over several parameters, from the norms over each of them.

    For gradients in single or double precision the result is what Opacus computes, bit
    for bit: it takes the same norms in the same order.

    Args:
        norms: One tensor ``(b,)`` per parameter, on any devices.

    Returns:
        float ``(b,)``, on the first tensor's device.
    """
    device = norms[0].device
    if any([n.device != device for n in norms]):
        norms = [n.to(device) for n in norms]
    stacked = torch.stack(list(norms), dim=1)
    joint: Tensor = torch.linalg.vector_norm(stacked, dim=1)
    return joint


class GradSampleModule(opacus.GradSampleModule):
    """Opacus's ``GradSampleModule`` with the norms of the gradients that it computed.

    It is meant for pipelines built by hand. ``make_private`` returns Opacus's own
    class, because Opacus compares the exact type when a model is prepared twice.
    """

    @property
    def per_sample_gradient_norms(self) -> Tensor:
        r"""Norms of the last backward pass, :math:`\lVert\nabla\ell(w, x_j)\rVert_2`.

        They are norms of the gradient of each example's own loss, if ``loss_reduction``
        is the one of the criterion; before clipping, and over the trainable parameters.
        If the loss was scaled (by accumulation or mixed precision), so are the norms:
        Opacus clips the scaled gradients.

        Returns:
            float ``(b,)``.

        Raises:
            RuntimeError: If there are no per-example gradients: before the first
                backward pass and after ``zero_grad``.
        """
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        stored = [getattr(p, "grad_sample", None) for p in parameters]
        # After several backward passes Opacus keeps a list with one tensor for each.
        latest = [g[-1] if isinstance(g, list) else g for g in stored if g is not None]
        if not latest:
            raise RuntimeError(
                "There are no per-example gradients. Read the norms after "
                "loss.backward() and before zero_grad()."
            )
        return grad_sample_norms(latest)
