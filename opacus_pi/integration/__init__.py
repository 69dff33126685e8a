"""Everything that knows Opacus: the engine, its parts, and the accountants.

``engine`` has the drop-in ``PrivacyEngine``; ``mixin`` makes any engine of Opacus
record, and ``recorded_engine`` has what a user may ask it. A private run is prepared in
``runs``, ``probes`` watches its model, its optimizer reports each update
(``optimizers``, ``update``, ``filtering``), ``checks`` and ``schedules`` say when no
numbers can be given, and ``readings`` answers. ``checkpoints`` saves and resumes.
``fast`` clips without per-example gradients, ``monitor`` trains without clipping, and
``audit`` compares what is recorded for a batch with the gradients of its examples
alone. ``opacus_compat`` lists the private names of Opacus that are used.

Importing this package registers the accountants ``"per_instance"`` and ``"group"``, so
that Opacus's own ``PrivacyEngine(accountant="per_instance")`` finds them.
"""

from opacus.accountants import register_accountant

from opacus_pi._promised import promise
from opacus_pi.integration.accountants import PerInstanceAccountant
from opacus_pi.integration.checkpoints import ledger_in_checkpoint
from opacus_pi.integration.engine import PrivacyEngine
from opacus_pi.integration.grad_sample import GradSampleModule
from opacus_pi.integration.group_accountant import GroupAccountant
from opacus_pi.integration.mixin import PerInstanceMixin

__all__ = [
    "GradSampleModule",
    "GroupAccountant",
    "PerInstanceAccountant",
    "PerInstanceMixin",
    "PrivacyEngine",
    "ledger_in_checkpoint",
]

# force: a module that is reloaded registers its new class under the same name.
register_accountant("per_instance", PerInstanceAccountant, force=True)
register_accountant("group", GroupAccountant, force=True)

promise(__name__, "audit", "fast", "hugging_face", "lightning", "monitor")
