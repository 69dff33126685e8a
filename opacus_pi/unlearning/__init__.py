"""Make a trained model forget: methods, the loop that runs them, what they prove."""

from opacus_pi.unlearning.methods import FineTune, L1Sparse, Langevin, Method, Task
from opacus_pi.unlearning.plan import Plan
from opacus_pi.unlearning.rivals import (
    SCRUB,
    SSD,
    NegGradPlus,
    RandomLabels,
    SalUn,
)
from opacus_pi.unlearning.stopping import StopWhen
from opacus_pi.unlearning.unlearner import Unlearner, UnlearningResult

__all__ = [
    "SCRUB",
    "SSD",
    "FineTune",
    "L1Sparse",
    "Langevin",
    "Method",
    "NegGradPlus",
    "Plan",
    "RandomLabels",
    "SalUn",
    "StopWhen",
    "Task",
    "Unlearner",
    "UnlearningResult",
]
