"""What a run's record is: the mechanism, and each example's gradient norms."""

from opacus_pi.ledger.grad_norm_ledger import (
    GradNormLedger,
    columns_of,
    runs_of,
)
from opacus_pi.ledger.gram_ledger import GramLedger
from opacus_pi.ledger.mechanism import NoisySGD

__all__ = ["GradNormLedger", "GramLedger", "NoisySGD", "columns_of", "runs_of"]
