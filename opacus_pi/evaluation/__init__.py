"""How well a model has forgotten, judged beside a model that never knew.

Each metric is a pure function of arrays or models; none knows an unlearning method.
"""

from opacus_pi.evaluation.accuracies import accuracy, unlearning_accuracy
from opacus_pi.evaluation.activations import activation_matching
from opacus_pi.evaluation.barriers import loss_barrier, path_losses
from opacus_pi.evaluation.gus import GaussianPoison, gaussian_unlearning_score
from opacus_pi.evaluation.matching import weight_matching
from opacus_pi.evaluation.membership import MembershipInference, membership_inference
from opacus_pi.evaluation.oracle import OracleCache
from opacus_pi.evaluation.permutations import (
    PermutationSpec,
    apply_permutation,
    permutation_spec,
)
from opacus_pi.evaluation.predictions import Predictions, predict
from opacus_pi.evaluation.summary import evaluate, summarise
from opacus_pi.evaluation.trace import UnlearningTrace, time_to_unlearn

__all__ = [
    "GaussianPoison",
    "MembershipInference",
    "OracleCache",
    "PermutationSpec",
    "Predictions",
    "UnlearningTrace",
    "accuracy",
    "activation_matching",
    "apply_permutation",
    "evaluate",
    "gaussian_unlearning_score",
    "loss_barrier",
    "membership_inference",
    "path_losses",
    "permutation_spec",
    "predict",
    "summarise",
    "time_to_unlearn",
    "unlearning_accuracy",
    "weight_matching",
]
