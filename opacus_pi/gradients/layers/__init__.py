"""Rules: each example's gradient from a layer's input and output gradient.

There is one file for each kind of layer and one rule for each layer type. From this one
rule follow both the norms of a sweep and the clipped sums of
``grad_sample_mode="fast"``.

To add a layer, write each example's gradient by each parameter in terms of the layer's
input and the gradient at its output, and register it:

>>> import torch
>>> from torch import nn
>>> class Scale(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.factor = nn.Parameter(torch.ones(()))
...
...     def forward(self, x):
...         return self.factor * x
>>> @register_layer_rule(Scale)
... def scale_gradients(module, x, grad, names):
...     return {"factor": (x * grad).flatten(1).sum(1)}

The first batch of a sweep compares the norms with plain autograd, and gives up the
rules if they disagree. Where the gradients would be large, return ``ExampleGradients``
that compute norms and weighted sums without them; ``linear.py`` is the shortest
example. A new file of this package is imported below, and gets an entry in
``tests/gradients/test_layer_rules.py``.
"""

from opacus_pi._promised import promise
from opacus_pi.gradients.example_gradients import ExampleGradients, ExplicitGradients
from opacus_pi.gradients.layers import (
    activation,
    conv,
    conv_transpose,
    embedding,
    embedding_bag,
    linear,
    normalisation,
)
from opacus_pi.gradients.layers.registry import layer_rule, register_layer_rule

__all__ = [
    "ExampleGradients",
    "ExplicitGradients",
    "activation",
    "conv",
    "conv_transpose",
    "embedding",
    "embedding_bag",
    "layer_rule",
    "linear",
    "normalisation",
    "register_layer_rule",
]

promise(__name__)
