"""One module for each figure; ``FIGURES`` names them all."""

from benchmarks.reproduce.figures import (
    bounds,
    fig1,
    fig1_right,
    methods,
    more_times,
    pictures,
    predicted,
    private_models,
    ranks,
    rates,
    scores,
)
from benchmarks.reproduce.figures.figure import Figure

_MODULES = (
    fig1,
    fig1_right,
    scores,
    pictures,
    bounds,
    more_times,
    private_models,
    ranks,
    rates,
    methods,
    predicted,
)
FIGURES: dict[str, Figure] = {
    figure.name: figure for module in _MODULES for figure in module.FIGURES
}
