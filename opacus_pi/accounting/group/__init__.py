"""The privacy loss of several examples together (Theorem B.1, and tighter)."""

from opacus_pi.accounting.group.divergence import (
    group_divergence,
    theorem_b1_estimates,
)
from opacus_pi.accounting.group.worst_case import group_worst_case_loss

__all__ = ["group_divergence", "group_worst_case_loss", "theorem_b1_estimates"]
