"""Per-instance privacy accounting and unlearning for Opacus.

What each training example costs in privacy, and what it takes to forget it.
"""

from opacus_pi._errors import AccountingError
from opacus_pi.accounting import GradNormLedger, GramLedger, NoisySGD
from opacus_pi.accounting.guarantee import Guarantee
from opacus_pi.integration.accountants import PerInstanceAccountant
from opacus_pi.integration.grad_sample import GradSampleModule
from opacus_pi.integration.group_accountant import GroupAccountant
from opacus_pi.integration.privacy_engine import PrivacyEngine
from opacus_pi.recording import Recorder
from opacus_pi.unlearning import FineTune, L1Sparse, Langevin, Unlearner

__all__ = [
    "AccountingError",
    "FineTune",
    "GradNormLedger",
    "GradSampleModule",
    "GramLedger",
    "GroupAccountant",
    "Guarantee",
    "L1Sparse",
    "Langevin",
    "NoisySGD",
    "PerInstanceAccountant",
    "PrivacyEngine",
    "Recorder",
    "Unlearner",
]
