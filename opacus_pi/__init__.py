"""Per-instance privacy accounting and unlearning for Opacus.

Train with this engine in place of Opacus's. It records the gradient norm of every
example; from this ledger follow each example's privacy loss and what it takes to make
the model forget it.

    from opacus_pi import Langevin, PrivacyEngine, Unlearner

    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(...)  # as with Opacus
    ...                                                  # your training loop
    engine.epsilons(delta=1e-5)                          # one for each example
    engine.ledger.save("ledger.safetensors")
    unlearner = Unlearner(engine, criterion=criterion, method=Langevin(0.02))
    result = unlearner.unlearn(train_set, [3, 17])       # .model .guarantee .trace

train      PrivacyEngine, Recorder, audit; by hand: GradSampleModule,
           PerInstanceAccountant, GroupAccountant
read       GradNormLedger, GramLedger, NoisySGD; AccountingError if a run has no number
forget     Unlearner with FineTune, Langevin or L1Sparse; Guarantee

accounting  losses, ε, groups, budgets      unlearning   methods, requests, log, heads
difficulty  forget sets, proxies            evaluation   metrics, retrained models
plotting    figures                         symmetries   loss barriers, permutations
report      one HTML page about a run       compatible   models that Opacus can train
gradients   norms of single examples        integration  code that needs Opacus

help(opacus_pi.Unlearner) explains one name, help(opacus_pi.accounting) one part;
"opacus-pi --help" in a shell lists the commands.

Names are imported when they are first used, so that the ledger can be read without
PyTorch. Using PrivacyEngine or an accountant, or "import opacus_pi.integration",
registers the accountants "per_instance" and "group" with Opacus.
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
    "cli",
    "compatible",
    "custody",
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
