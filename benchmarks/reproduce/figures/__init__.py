"""``FIGURES`` names every figure: the paper's in its order, then the others."""

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
_FOUND = [figure for module in _MODULES for figure in module.FIGURES]
_PAPER = sorted((f for f in _FOUND if f.name[:3] == "fig"), key=lambda f: f.name)
FIGURES: dict[str, Figure] = {
    figure.name: figure for figure in [*_PAPER, *(f for f in _FOUND if f not in _PAPER)]
}
