"""Make a trained model forget: methods, the loop that runs them, what they prove."""

from opacus_pi.unlearning.methods import FineTune, L1Sparse, Langevin, Method, Task
from opacus_pi.unlearning.plan import Plan
from opacus_pi.unlearning.unlearner import Unlearner, UnlearningResult

__all__ = [
    "FineTune",
    "L1Sparse",
    "Langevin",
    "Method",
    "Plan",
    "Task",
    "Unlearner",
    "UnlearningResult",
]
