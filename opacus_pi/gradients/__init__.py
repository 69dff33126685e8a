"""Per-example gradient norms without per-example gradients; Gram matrices."""

from opacus_pi.gradients.gram import gradient_gram, minibatch_gram
from opacus_pi.gradients.layers import register_layer_rule
from opacus_pi.gradients.sweeps import (
    Sweep,
    norm_sweep,
    per_example_grad_norms,
    sweep,
)

__all__ = [
    "Sweep",
    "gradient_gram",
    "minibatch_gram",
    "norm_sweep",
    "per_example_grad_norms",
    "register_layer_rule",
    "sweep",
]
