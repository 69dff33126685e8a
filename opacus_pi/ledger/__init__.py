"""Ledgers, the records that training runs leave behind; needs NumPy only.

A ledger is the saved record of one training run. Every loss, bound and ranking is
computed from it, so a new question needs no new training. Importing this package does
not import torch.
"""

from opacus_pi._promised import promise
from opacus_pi.ledger.fingerprint import fingerprint
from opacus_pi.ledger.gap_filling import fill_unobserved
from opacus_pi.ledger.grad_norm_ledger import (
    GradNormLedger,
    columns_of,
    filled_by_rank,
    runs_of,
)
from opacus_pi.ledger.gram_ledger import GramLedger
from opacus_pi.ledger.mechanism import NoisySGD
from opacus_pi.ledger.participation_record import ParticipationRecord

__all__ = [
    "GradNormLedger",
    "GramLedger",
    "NoisySGD",
    "ParticipationRecord",
    "columns_of",
    "fill_unobserved",
    "filled_by_rank",
    "fingerprint",
    "runs_of",
]

promise(__name__, "custody", "fingerprint")
