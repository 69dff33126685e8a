"""Per-example gradient norms without per-example gradients."""

from opacus_pi.gradients.per_example import per_example_grad_norms
from opacus_pi.gradients.sweeps import Sweep, norm_sweep, sweep

__all__ = [
    "Sweep",
    "norm_sweep",
    "per_example_grad_norms",
    "sweep",
]
