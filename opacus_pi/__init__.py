"""Per-instance privacy accounting and unlearning for Opacus.

``opacus_pi`` records the gradient norm of every training example while a model trains,
and computes from this record what each example costs in privacy and what it takes to
make the model forget it.

Names are imported when they are first used, so that ``import opacus_pi`` is fast and
the ledger can be read without PyTorch. Using ``PrivacyEngine`` or an accountant, or
``import opacus_pi.integration``, registers the accountants ``"per_instance"`` and
``"group"`` with Opacus.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opacus_pi._errors import AccountingError
    from opacus_pi.accounting.guarantee import Guarantee
    from opacus_pi.integration.accountants import PerInstanceAccountant
    from opacus_pi.integration.engine import PrivacyEngine, audit
    from opacus_pi.integration.grad_sample import GradSampleModule
    from opacus_pi.integration.group_accountant import GroupAccountant
    from opacus_pi.ledger.grad_norm_ledger import GradNormLedger
    from opacus_pi.ledger.gram_ledger import GramLedger
    from opacus_pi.ledger.mechanism import NoisySGD
    from opacus_pi.recording.recorder import Recorder
    from opacus_pi.unlearning.methods import FineTune, L1Sparse, Langevin
    from opacus_pi.unlearning.unlearner import Unlearner

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
    "audit",
]

__version__ = "0.1.0"

# Where each promised name is defined. The imports above say the same to type checkers.
_HOMES = {
    "AccountingError": "_errors",
    "FineTune": "unlearning.methods",
    "GradNormLedger": "ledger.grad_norm_ledger",
    "GradSampleModule": "integration.grad_sample",
    "GramLedger": "ledger.gram_ledger",
    "GroupAccountant": "integration.group_accountant",
    "Guarantee": "accounting.guarantee",
    "L1Sparse": "unlearning.methods",
    "Langevin": "unlearning.methods",
    "NoisySGD": "ledger.mechanism",
    "PerInstanceAccountant": "integration.accountants",
    "PrivacyEngine": "integration.engine",
    "Recorder": "recording.recorder",
    "Unlearner": "unlearning.unlearner",
    "audit": "integration.engine",
}
# Sub-packages that can be reached as attributes after ``import opacus_pi``.
_ROOMS = {
    "accounting",
    "attribution",
    "compatible",
    "difficulty",
    "evaluation",
    "forget_sets",
    "gradients",
    "integration",
    "ledger",
    "models",
    "plotting",
    "recording",
    "report",
    "symmetries",
    "unlearning",
}


def __getattr__(name: str) -> Any:
    """Import a promised name or a sub-package when it is first used (PEP 562)."""
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])
