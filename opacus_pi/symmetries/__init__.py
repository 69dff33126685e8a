"""Permutation symmetries of networks: tracing, matching, and loss barriers."""

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
