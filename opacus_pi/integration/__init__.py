"""Everything that knows Opacus: the engine, its parts, and the accountants.

Importing this package registers the accountants ``"per_instance"`` and ``"group"``, so
that Opacus's own ``PrivacyEngine(accountant="per_instance")`` finds them.
"""

from opacus.accountants import register_accountant

from opacus_pi.integration.accountants import PerInstanceAccountant
from opacus_pi.integration.group_accountant import GroupAccountant

__all__ = ["GroupAccountant", "PerInstanceAccountant"]

# force: a module that is reloaded registers its new class under the same name.
register_accountant("per_instance", PerInstanceAccountant, force=True)
register_accountant("group", GroupAccountant, force=True)
