"""Models Opacus can train; the code is in ``opacus_pi.integration.compatible``."""

from opacus_pi.integration.compatible import *  # noqa: F403
from opacus_pi.integration.compatible import __all__  # noqa: F401
