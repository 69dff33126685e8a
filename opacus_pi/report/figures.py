"""The figures of a report, as pictures that stand inside the page."""

import base64
import io
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from opacus_pi._types import ArrayLike
from opacus_pi.evaluation.trace import UnlearningTrace
from opacus_pi.plotting import plot_curves, plot_distribution
from opacus_pi.report.run import MEANING
from opacus_pi.report.scores import Scores

_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
_SIZE = (4.6, 3.0)  # inches: still readable on a telephone


def distribution_figures(scores: Scores, forget_loss: float | None) -> dict[str, str]:
    """Histograms of loss and, where there is one, ε.

    Args:
        scores: The per-example numbers.
        forget_loss: Mean loss of the forget set, drawn as a line, or None.

    Returns:
        Pictures by what they show; none where no number is finite.
    """
    drawn = {}
    if np.isfinite(scores.losses).any():
        marks = {} if forget_loss is None else {"forget set, mean": forget_loss}
        if not scores.ranking_only:
            marks["bound for anybody"] = scores.worst_case_loss
        name = f"privacy loss at order {scores.order:g}"
        drawn["Privacy losses of all examples, a histogram."] = _histogram(
            scores.losses, name, marks
        )
    if scores.epsilons is not None and np.isfinite(scores.epsilons).any():
        marks = {"bound for anybody": scores.worst_case_epsilon}
        name = f"ε at δ = {scores.delta:g}"
        drawn["Estimated ε of all examples, a histogram."] = _histogram(
            scores.epsilons, name, marks
        )
    return drawn


def trace_figures(
    trace: UnlearningTrace, oracle: Mapping[str, ArrayLike]
) -> dict[str, str]:
    """One figure for each metric of a run, retrained models dashed.

    Args:
        trace: The run.
        oracle: The metrics of retrained models by name.

    Returns:
        Pictures by what they show.
    """
    drawn = {}
    for metric, values in trace.metrics.items():
        if not np.isfinite(values).all() or not values:
            continue
        beside = {"unlearned": oracle[metric]} if metric in oracle else {}
        title = metric.replace("_", " ")
        figure, ax = _canvas()
        plot_curves(
            trace.times,
            {"unlearned": values},
            beside,
            metric=_literal(title),
            unit=_literal(trace.unit),
            ax=ax,
        )
        meaning = f" ({MEANING[metric]})" if metric in MEANING else ""
        compared = ", beside retrained models" if beside else ""
        caption = f"{title.capitalize()}{meaning} over {trace.unit}{compared}."
        drawn[caption] = _picture(figure)
    return drawn


def _histogram(values: NDArray[np.float64], name: str, marks: dict[str, float]) -> str:
    """One histogram as a picture."""
    figure, ax = _canvas()
    plot_distribution(values, name=name, marks=marks, ax=ax)
    return _picture(figure)


def _canvas() -> tuple[Figure, Axes]:
    """A figure that pyplot does not keep, and its Axes."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.add_subplot()


def _literal(words: str) -> str:
    """Words of a file, that are not to be read as a formula."""
    return words.replace("$", r"\$")


def _picture(figure: Figure) -> str:
    """The figure as a data address of an SVG file."""
    with plt.rc_context({"svg.hashsalt": "opacus_pi", "svg.fonttype": "path"}):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    code = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/svg+xml;base64,{code}"
