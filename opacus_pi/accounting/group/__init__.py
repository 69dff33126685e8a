"""Privacy loss of several examples together: Theorem B.1, and tighter bounds.

A group's loss is not the sum of its members' losses: two equal gradients give four
times the divergence of one. ``group_divergence`` computes it from inner products of
the members' gradients, ``group_worst_case_loss`` bounds it for any group of a size.
"""

from opacus_pi._promised import promise
from opacus_pi.accounting.group.divergence import (
    group_divergence,
    theorem_b1_estimates,
)
from opacus_pi.accounting.group.worst_case import group_worst_case_loss

__all__ = ["group_divergence", "group_worst_case_loss", "theorem_b1_estimates"]

promise(__name__)
