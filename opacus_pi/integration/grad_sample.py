"""Per-example gradient norms from Opacus's per-example gradients.

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
    """L2 norm of each example's gradient over several parameters.

    Args:
        grad_samples: One tensor ``(b, *shape)`` per parameter, on any devices.

    Returns:
        float ``(b,)``, in single precision or better, on the first tensor's device.
    """
    return joint_norms([row_norms(g) for g in grad_samples])


def row_norms(grad_sample: Tensor) -> Tensor:
    """L2 norm ``(b,)`` of each row of ``(b, *shape)``, not in half precision."""
    rows = grad_sample.detach()
    rows = rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)
    if rows.dtype.itemsize < 4:
        rows = rows.float()
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def joint_norms(norms: Sequence[Tensor]) -> Tensor:
    """Norms ``(b,)`` over several parameters, from those over each of them.

    Of gradients in single or double precision, to the bit what Opacus computes.
    """
    device = norms[0].device
    stacked = torch.stack([n.to(device) for n in norms], dim=1)
    joint: Tensor = torch.linalg.vector_norm(stacked, dim=1)
    return joint


class GradSampleModule(opacus.GradSampleModule):
    """Opacus's ``GradSampleModule`` that also tells the norms of what it computed.

    For pipelines built by hand; ``make_private`` returns Opacus's own class, because
    Opacus compares the type exactly when a model is prepared twice.
    """

    @property
    def per_sample_gradient_norms(self) -> Tensor:
        r"""Norms of the last backward pass, :math:`\lVert\nabla\ell(w, x_j)\rVert_2`.

        Of each example's own loss if ``loss_reduction`` is the loss's, before clipping
        and over the trainable parameters. A loss that was scaled (by accumulation or
        mixed precision) has scaled norms, and those are what Opacus clips.

        Returns:
            float ``(b,)``.

        Raises:
            RuntimeError: If there are no per-example gradients, before the first
                backward pass and after ``zero_grad``.
        """
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        held = [getattr(p, "grad_sample", None) for p in parameters]
        latest = [g[-1] if isinstance(g, list) else g for g in held if g is not None]
        if not latest:
            raise RuntimeError(
                "Per-example gradient norms need per-example gradients, but there are "
                "none. Ask after loss.backward() and before zero_grad()."
            )
        return grad_sample_norms(latest)
