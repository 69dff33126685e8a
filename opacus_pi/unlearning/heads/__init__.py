"""Linear heads on frozen features that forget with a certificate.

| question | file |
|---|---|
| how do I get features, and how are they scaled? | ``features`` |
| what does every head do? | ``noisy_head`` |
| ridge: exact certificates | ``ridge``, ``ridge_laws``, ``gaussian_pairs`` |
| ridge: all examples at once | ``compression`` |
| softmax: certified bounds | ``softmax`` |
"""

from opacus_pi._promised import promise
from opacus_pi.unlearning.heads.features import extract_features, unit_rows
from opacus_pi.unlearning.heads.noisy_head import ForgettingCost
from opacus_pi.unlearning.heads.ridge import RidgeHead
from opacus_pi.unlearning.heads.softmax import SoftmaxHead

__all__ = [
    "ForgettingCost",
    "RidgeHead",
    "SoftmaxHead",
    "extract_features",
    "unit_rows",
]

promise(__name__)
