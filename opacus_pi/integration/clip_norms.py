"""The norm to which an optimizer clips what an example adds to the sum.

Opacus's per-layer optimizers have two settings: ``max_grad_norms`` clips the gradient
of each parameter, and ``max_grad_norm``, which is their joint norm when the optimizer
is made, scales the noise. Schedulers of the clip norm change only the latter, and a
program may write to the former. The joint norm is therefore taken anew where gradients
are clipped.
"""

import math
from typing import Any

from opacus.optimizers import DPOptimizer, DPPerLayerOptimizer

from opacus_pi.integration.missing_values import number_in

__all__ = ["clip_norm_of"]

_ROUNDING = 1e-6  # relative: Opacus computes the joint norm in single precision


def clip_norm_of(optimizer: DPOptimizer) -> float:
    """Return the norm to which an example's gradient is clipped now.

    Args:
        optimizer: One of Opacus's, except those of ghost clipping, whose model clips.

    Returns:
        ``max_grad_norm``; with per-layer clipping the joint norm of ``max_grad_norms``,
        which is ``max_grad_norm`` unless one of them was changed.

    Raises:
        TypeError: If ``max_grad_norm`` is no number.
    """
    given = number_in(optimizer, "max_grad_norm")
    if not isinstance(optimizer, DPPerLayerOptimizer):
        return given
    by_parameter: Any = optimizer.max_grad_norms
    joint = math.hypot(*map(float, by_parameter))
    return given if math.isclose(joint, given, rel_tol=_ROUNDING) else joint
