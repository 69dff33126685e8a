"""Rényi accounting: what each example of a training run costs, from gradient norms."""

from opacus_pi.accounting.fingerprint import fingerprint
from opacus_pi.accounting.ledger import GradNormLedger, fill_unobserved
from opacus_pi.accounting.mechanism import NoisySGD

__all__ = [
    "GradNormLedger",
    "NoisySGD",
    "fill_unobserved",
    "fingerprint",
]
