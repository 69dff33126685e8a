"""Rényi accounting: the privacy loss of each example, from recorded gradient norms.

NumPy arrays in, NumPy arrays out, float64; no model and no Opacus. The way from a
ledger to a number goes through ``moments`` (one update), ``composition`` (all updates),
``losses`` (a ledger) and ``epsilon`` or ``statement`` (for the person concerned).
``group`` and ``langevin`` bound groups and noisy unlearning, ``budgets`` limits each
example's loss during training, and ``published`` has formulas of other papers.
"""

from opacus_pi._promised import promise
from opacus_pi.accounting.budgets import RenyiFilter
from opacus_pi.accounting.conversion import rdp_to_delta, rdp_to_epsilon
from opacus_pi.accounting.epsilon import epsilons
from opacus_pi.accounting.filtered_rewind import (
    DeletionPolicy,
    restart_update,
    restart_updates,
)
from opacus_pi.accounting.group.divergence import group_divergence, theorem_b1_estimates
from opacus_pi.accounting.group.worst_case import group_worst_case_loss
from opacus_pi.accounting.langevin.constants import (
    LangevinConstants,
    logistic_constants,
    public_logistic_constants,
    ridge_constants,
)
from opacus_pi.accounting.langevin.hockey_stick import (
    contraction_noise_std,
    hockey_stick_contraction,
)
from opacus_pi.accounting.langevin.learning_phase import contractive_divergence
from opacus_pi.accounting.langevin.lsi import lsi_track
from opacus_pi.accounting.langevin.shifted import (
    learn_unlearn_mu_squared,
    shifted_mu_squared,
)
from opacus_pi.accounting.langevin.unlearning import (
    UnlearningBound,
    steps_to_rewind,
    steps_to_unlearn,
    symmetric_bound,
    unlearning_divergence,
)
from opacus_pi.accounting.losses import (
    per_step_losses,
    privacy_losses,
    worst_case_loss,
)
from opacus_pi.accounting.moments import log_moment, renyi_divergence
from opacus_pi.accounting.statement import PrivacyStatement, privacy_statement
from opacus_pi.accounting.tightest import choose_hoelder_p, tightest_losses
from opacus_pi.accounting.trajectory import (
    exceedance_limit,
    trajectory_limits,
    trajectory_losses,
)
from opacus_pi.accounting.uncertainty import (
    epsilon_limits,
    loss_limits,
    standard_errors,
)
from opacus_pi.ledger.fingerprint import fingerprint
from opacus_pi.ledger.gap_filling import fill_unobserved
from opacus_pi.ledger.grad_norm_ledger import GradNormLedger, filled_by_rank
from opacus_pi.ledger.gram_ledger import GramLedger
from opacus_pi.ledger.mechanism import NoisySGD

__all__ = [
    "DeletionPolicy",
    "GradNormLedger",
    "GramLedger",
    "LangevinConstants",
    "NoisySGD",
    "PrivacyStatement",
    "RenyiFilter",
    "UnlearningBound",
    "choose_hoelder_p",
    "contraction_noise_std",
    "contractive_divergence",
    "epsilon_limits",
    "epsilons",
    "exceedance_limit",
    "fill_unobserved",
    "filled_by_rank",
    "fingerprint",
    "group_divergence",
    "group_worst_case_loss",
    "hockey_stick_contraction",
    "learn_unlearn_mu_squared",
    "log_moment",
    "logistic_constants",
    "loss_limits",
    "lsi_track",
    "per_step_losses",
    "privacy_losses",
    "privacy_statement",
    "public_logistic_constants",
    "rdp_to_delta",
    "rdp_to_epsilon",
    "renyi_divergence",
    "restart_update",
    "restart_updates",
    "ridge_constants",
    "shifted_mu_squared",
    "standard_errors",
    "steps_to_rewind",
    "steps_to_unlearn",
    "symmetric_bound",
    "theorem_b1_estimates",
    "tightest_losses",
    "trajectory_limits",
    "trajectory_losses",
    "unlearning_divergence",
    "worst_case_loss",
]

promise(__name__, "conversion", "group", "guarantee", "langevin", "published")
