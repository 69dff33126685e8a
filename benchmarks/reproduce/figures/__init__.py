"""One module for each figure; ``FIGURES`` names them all."""

from benchmarks.reproduce.figures import fig1, methods
from benchmarks.reproduce.figures.figure import Figure

FIGURES: dict[str, Figure] = {
    figure.name: figure for module in (fig1, methods) for figure in module.FIGURES
}
