"""All figures by name: the paper's in its order, then those beyond the paper.

| file | figures |
|---|---|
| ``times_to_unlearn`` | 1 left and middle |
| ``loss_barriers`` | 1 right |
| ``difficulty_scores`` | 2 and 3 |
| ``bounds`` | 4, certified |
| ``other_settings`` | 5 to 8 |
| ``typicality`` | 9 |
| ``private_models``, ``rank_stability`` | private; ranks, literal |
| ``learning_rates``, ``methods``, ``predicted_times`` | rates; methods; predicted |
| ``attacks`` | attack |

Each file starts with claim, data, seeds and settings, and ends with its ``FIGURES``.
``figure`` says what a figure is, and ``verdicts`` decides about claims.
"""

from benchmarks.reproduce.figures import (
    attacks,
    bounds,
    difficulty_scores,
    learning_rates,
    loss_barriers,
    methods,
    other_settings,
    predicted_times,
    private_models,
    rank_stability,
    times_to_unlearn,
    typicality,
)
from benchmarks.reproduce.figures.figure import Figure

_MODULES = (
    times_to_unlearn,
    loss_barriers,
    difficulty_scores,
    typicality,
    bounds,
    other_settings,
    private_models,
    rank_stability,
    learning_rates,
    methods,
    predicted_times,
    attacks,
)
_FOUND = [figure for module in _MODULES for figure in module.FIGURES]
_PAPER = sorted((f for f in _FOUND if f.name[:3] == "fig"), key=lambda f: f.name)
FIGURES: dict[str, Figure] = {
    figure.name: figure for figure in [*_PAPER, *(f for f in _FOUND if f not in _PAPER)]
}
