"""Difficulty of examples: proxy scores, their agreement, and forget sets by rank.

``proxies`` computes cheap scores from a ledger, ``agreement`` compares scores with each
other, and ``forget_sets`` chooses examples by rank, at random or by class. A higher
score always means a harder example.
"""

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
