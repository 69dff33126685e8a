"""Contraction of divergences by noisy fine-tuning (Corollaries 4.1 and 4.4).

``constants`` holds what the bounds need to know about objective and process, ``lsi``
tracks log-Sobolev constants, ``contraction`` has the three ways in which noise shrinks
a divergence, ``hockey_stick`` how it shrinks δ itself. ``unlearning`` answers how many
steps are enough; ``learning_phase`` and ``shifted`` bound what learning leaves behind.
"""

from opacus_pi._promised import promise
from opacus_pi.accounting.langevin.constants import (
    LangevinConstants,
    LossConstants,
    logistic_constants,
    public_logistic_constants,
    ridge_constants,
)
from opacus_pi.accounting.langevin.contraction import (
    dobrushin_bound,
    hypercontractive_bound,
    log_dobrushin_coefficient,
    source_bound,
)
from opacus_pi.accounting.langevin.hockey_stick import (
    contraction_noise_std,
    hockey_stick_contraction,
)
from opacus_pi.accounting.langevin.learning_phase import (
    contractive_divergence,
    halved_noise_divergence,
)
from opacus_pi.accounting.langevin.lsi import (
    bounded_support_lsi,
    gradient_map_lipschitz,
    log_growth,
    lsi_track,
)
from opacus_pi.accounting.langevin.shifted import (
    initial_distance_mu_squared,
    learn_unlearn_mu_squared,
    shifted_mu_squared,
)
from opacus_pi.accounting.langevin.unlearning import (
    UnlearningBound,
    steps_to_rewind,
    steps_to_unlearn,
    symmetric_bound,
    unlearning_divergence,
)

__all__ = [
    "LangevinConstants",
    "LossConstants",
    "UnlearningBound",
    "bounded_support_lsi",
    "contraction_noise_std",
    "contractive_divergence",
    "dobrushin_bound",
    "gradient_map_lipschitz",
    "halved_noise_divergence",
    "hockey_stick_contraction",
    "hypercontractive_bound",
    "initial_distance_mu_squared",
    "learn_unlearn_mu_squared",
    "log_dobrushin_coefficient",
    "log_growth",
    "logistic_constants",
    "lsi_track",
    "public_logistic_constants",
    "ridge_constants",
    "shifted_mu_squared",
    "source_bound",
    "steps_to_rewind",
    "steps_to_unlearn",
    "symmetric_bound",
    "unlearning_divergence",
]

promise(__name__, "shifted")
