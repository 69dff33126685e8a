"""Metrics that compare an unlearned model with models retrained without the forget set.

Each metric is a pure function of arrays or models. No metric depends on an unlearning
method. Loss barriers and permutations are defined in ``opacus_pi.symmetries``,
``predict`` in ``opacus_pi.models``.

| question | function |
|---|---|
| does the model still predict the forget set well? | ``evaluate`` |
| does it still know the noise that it was trained on? | ``gaussian_unlearning_score`` |
| when did it begin to behave like a retrained model? | ``time_to_unlearn`` |
| did it stay there, how far had it to go, what remained on the way? | ``gap_summary`` |
| can an attacker distinguish it from retrained models? | ``u_lira``, ``klom`` |
| are its weights in the same basin as theirs? | ``loss_barrier`` |

The first two need one model and can be computed after every epoch. The attacks need
many models of both kinds. No metric proves that a set was forgotten: a guarantee does.
"""

from opacus_pi._promised import promise
from opacus_pi.evaluation.gap import GapSummary, gap_path, gap_summary
from opacus_pi.evaluation.gus import GaussianPoison, gaussian_unlearning_score
from opacus_pi.evaluation.intervals import (
    ConfidenceInterval,
    epsilon_interval,
    mean_interval,
)
from opacus_pi.evaluation.membership import MembershipInference, membership_inference
from opacus_pi.evaluation.metrics import (
    accuracy,
    evaluate,
    summarise,
    tug_of_war,
    unlearning_accuracy,
)
from opacus_pi.evaluation.oracle import OracleCache
from opacus_pi.evaluation.shadow_models import ULira, klom, u_lira
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
    "ConfidenceInterval",
    "GapSummary",
    "GaussianPoison",
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
    "gap_path",
    "gap_summary",
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

promise(__name__)
