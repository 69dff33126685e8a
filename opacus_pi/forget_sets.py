"""Forget sets by difficulty: an alias of ``opacus_pi.difficulty.forget_sets``.

This module stays importable under its documented name.
"""

from opacus_pi.difficulty.forget_sets import *  # noqa: F403
from opacus_pi.difficulty.forget_sets import __all__  # noqa: F401
