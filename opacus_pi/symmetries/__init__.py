"""Permutation symmetries of networks: tracing, matching, and loss barriers.

Two networks trained with different seeds list their hidden units in different orders.
To compare their weights, the orders must first be made to agree:

1. ``permutation_spec`` finds out which dimensions may be permuted together (``tracing``
   runs the model, ``operation_rules`` and ``axes`` draw the conclusions).
2. ``weight_matching`` or ``activation_matching`` finds the permutation of one network
   that is closest to another one, and ``apply_permutation`` applies it.
3. ``loss_barrier`` measures how far the loss rises on the line between the two.

``aligned`` and ``pairwise_barriers`` are the shortcuts for steps 2 and 3.
"""

from opacus_pi._promised import promise
from opacus_pi.symmetries.barriers import (
    aligned,
    loss_barrier,
    pairwise_barriers,
    path_losses,
)
from opacus_pi.symmetries.matching import activation_matching, weight_matching
from opacus_pi.symmetries.permutations import (
    PermutationSpec,
    apply_permutation,
    permutation_spec,
)

__all__ = [
    "PermutationSpec",
    "activation_matching",
    "aligned",
    "apply_permutation",
    "loss_barrier",
    "pairwise_barriers",
    "path_losses",
    "permutation_spec",
    "weight_matching",
]

promise(__name__)
