"""What a run's record is: the mechanism, and each example's gradient norms."""

from opacus_pi.accounting.ledger.grad_norm_ledger import (
    GradNormLedger,
    columns_of,
    runs_of,
)
from opacus_pi.accounting.ledger.gram_ledger import GramLedger
from opacus_pi.accounting.ledger.mechanism import NoisySGD

__all__ = ["GradNormLedger", "GramLedger", "NoisySGD", "columns_of", "runs_of"]
