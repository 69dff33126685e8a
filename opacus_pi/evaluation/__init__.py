"""How well a model has forgotten, judged beside a model that never knew.

Each metric is a pure function of arrays or models; none knows an unlearning method.
"""

from opacus_pi.evaluation.accuracies import accuracy, unlearning_accuracy
from opacus_pi.evaluation.gus import GaussianPoison, gaussian_unlearning_score
from opacus_pi.evaluation.intervals import Interval, epsilon_interval, mean_interval
from opacus_pi.evaluation.likelihood_ratio import ULira, u_lira
from opacus_pi.evaluation.margins import klom
from opacus_pi.evaluation.membership import MembershipInference, membership_inference
from opacus_pi.evaluation.oracle import OracleCache
from opacus_pi.evaluation.summary import evaluate, summarise
from opacus_pi.evaluation.tow import tug_of_war
from opacus_pi.evaluation.trace import UnlearningTrace, time_to_unlearn
from opacus_pi.models.predictions import Predictions, predict
from opacus_pi.symmetries import (
    PermutationSpec,
    activation_matching,
    aligned,
    apply_permutation,
    loss_barrier,
    pairwise_barriers,
    path_losses,
    permutation_spec,
    weight_matching,
)

__all__ = [
    "GaussianPoison",
    "Interval",
    "MembershipInference",
    "OracleCache",
    "PermutationSpec",
    "Predictions",
    "ULira",
    "UnlearningTrace",
    "accuracy",
    "activation_matching",
    "aligned",
    "apply_permutation",
    "epsilon_interval",
    "evaluate",
    "gaussian_unlearning_score",
    "klom",
    "loss_barrier",
    "mean_interval",
    "membership_inference",
    "pairwise_barriers",
    "path_losses",
    "permutation_spec",
    "predict",
    "summarise",
    "time_to_unlearn",
    "tug_of_war",
    "u_lira",
    "unlearning_accuracy",
    "weight_matching",
]
