"""Forget sets by difficulty; the code is in ``opacus_pi.difficulty.forget_sets``."""

from opacus_pi.difficulty.forget_sets import *  # noqa: F403
from opacus_pi.difficulty.forget_sets import __all__  # noqa: F401
