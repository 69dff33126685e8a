"""Per-example gradient norms without per-example gradients, and Gram matrices.

A norm sweep, one pass over a data set that measures norms, runs a copy of the model
(``norm_engine``). *Taps* intercept the gradient at each layer's output (``taps``,
``norm_taps``, ``tapped_layers``), or of an operation outside of layers
(``parameters_outside_layers``, ``shared_values``). The *rule* of the layer or operation
turns it into each example's gradient (``layers``, ``operations``,
``example_gradients``). Parameters without a rule are differentiated example by example
(``fallback``). ``clipping`` uses the same rules while a model is trained.
"""

from opacus_pi._promised import promise
from opacus_pi.gradients.coverage_of_rules import rule_coverage
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
    "rule_coverage",
    "sweep",
]

promise(__name__, "clipping", "layers")
