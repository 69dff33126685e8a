"""Rényi accounting: what each example of a training run costs, from gradient norms."""

from opacus_pi.accounting.conversion import rdp_to_delta, rdp_to_epsilon
from opacus_pi.accounting.epsilon import epsilons
from opacus_pi.accounting.fingerprint import fingerprint
from opacus_pi.accounting.ledger import GradNormLedger, fill_unobserved
from opacus_pi.accounting.mechanism import NoisySGD
from opacus_pi.accounting.moments import log_moment, renyi_divergence
from opacus_pi.accounting.privacy_loss import (
    per_step_losses,
    privacy_losses,
    trajectory_losses,
    worst_case_loss,
)

__all__ = [
    "GradNormLedger",
    "NoisySGD",
    "epsilons",
    "fill_unobserved",
    "fingerprint",
    "log_moment",
    "per_step_losses",
    "privacy_losses",
    "rdp_to_delta",
    "rdp_to_epsilon",
    "renyi_divergence",
    "trajectory_losses",
    "worst_case_loss",
]
