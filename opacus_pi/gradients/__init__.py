"""Per-example gradient norms without per-example gradients; Gram matrices."""

from opacus_pi.gradients.gram import gradient_gram, minibatch_gram
from opacus_pi.gradients.layers import conv, embedding, linear, normalisation  # noqa: F401
from opacus_pi.gradients.per_example import per_example_grad_norms
from opacus_pi.gradients.registry import register_norm_rule
from opacus_pi.gradients.sweeps import Sweep, norm_sweep, sweep

__all__ = [
    "Sweep",
    "gradient_gram",
    "minibatch_gram",
    "norm_sweep",
    "per_example_grad_norms",
    "register_norm_rule",
    "sweep",
]
