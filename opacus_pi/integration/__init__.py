"""Everything that knows Opacus: the engine, its parts, and the accountants.

Importing this package registers the accountants ``"per_instance"`` and ``"group"``, so
that Opacus's own ``PrivacyEngine(accountant="per_instance")`` finds them.
"""

from opacus_pi.integration.accountants import PerInstanceAccountant
from opacus_pi.integration.group_accountant import GroupAccountant

__all__ = ["GroupAccountant", "PerInstanceAccountant"]
