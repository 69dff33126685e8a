"""Difficulty of examples: proxy scores, their agreement, and forget sets by rank.

``proxies`` computes cheap scores from a ledger, ``agreement`` compares scores with each
other, and ``forget_sets`` chooses examples by rank, at random or by class. A higher
score always means a harder example.

The privacy loss (``opacus_pi.accounting``) is the score with a theorem behind it. The
proxies serve to find out whether something simpler gives the same ranking.

>>> losses, norms = [0.1, 0.3, 0.2, 0.9], [1.0, 4.0, 2.0, 9.0]
>>> found = rank_correlations({"privacy loss": losses, "gradient norm": norms})
>>> float(found.between("privacy loss", "gradient norm")[0])
1.0
>>> top_k(losses, size=2)
array([1, 3])
"""

from opacus_pi._promised import promise
from opacus_pi.difficulty.agreement import (
    BinnedMeans,
    RankCorrelations,
    binned_means,
    rank_correlations,
    rank_stability,
)
from opacus_pi.difficulty.forget_sets import (
    by_class,
    difficulty_strata,
    num_at_top,
    random_forget_set,
    ranking,
    retain_indices,
    ties,
    top_k,
)
from opacus_pi.difficulty.proxies import (
    c_proxy,
    el2n,
    forgetting_events,
    grad_norm_end,
    grad_norm_mean,
    grad_norm_mid,
)

__all__ = [
    "BinnedMeans",
    "RankCorrelations",
    "binned_means",
    "by_class",
    "c_proxy",
    "difficulty_strata",
    "el2n",
    "forgetting_events",
    "grad_norm_end",
    "grad_norm_mean",
    "grad_norm_mid",
    "num_at_top",
    "random_forget_set",
    "rank_correlations",
    "rank_stability",
    "ranking",
    "retain_indices",
    "ties",
    "top_k",
]

promise(__name__, "agreement", "forget_sets", "proxies")
