"""The figures of a report, as SVG pictures that are part of the page.

Each figure is encoded as a data address, so the page needs no second file. Equal facts
give equal bytes: the SVG contains no date, and its identifiers come from a fixed salt.
"""

import base64
import io
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from opacus_pi._printable import printable
from opacus_pi._types import ArrayLike
from opacus_pi.evaluation.trace import UnlearningTrace
from opacus_pi.plotting import plot_curves, plot_distribution
from opacus_pi.report.run import MEANING
from opacus_pi.report.scores import Scores

_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
_SIZE = (4.6, 3.0)  # inches: still readable on a telephone


def distribution_pictures(scores: Scores, forget_loss: float | None) -> dict[str, str]:
    """Draw histograms of the loss and, unless there is only a ranking, of ε.

    Args:
        scores: The per-example numbers.
        forget_loss: Mean loss of the forget set, drawn as a line; None draws none.

    Returns:
        Addresses of the pictures by caption. A number that is finite for no example
        has no picture.
    """
    pictures = {}
    if np.isfinite(scores.losses).any():
        marks = {} if forget_loss is None else {"mean of the forget set": forget_loss}
        if not scores.ranking_only:
            marks["worst case"] = scores.worst_case_loss
        name = f"privacy loss at order {scores.order:g}"
        pictures["Histogram of the privacy losses of all examples."] = _histogram(
            scores.losses, name, marks
        )
    if scores.epsilons is not None and np.isfinite(scores.epsilons).any():
        marks = {"worst case, converted": scores.worst_case_epsilon}
        name = f"ε at δ = {scores.delta:g}"
        pictures["Histogram of the estimated ε of all examples."] = _histogram(
            scores.epsilons, name, marks
        )
    return pictures


def trace_pictures(
    trace: UnlearningTrace, oracle: Mapping[str, ArrayLike]
) -> dict[str, str]:
    """Draw every metric of an unlearning run, with retrained models as dashed lines.

    Args:
        trace: The metrics over time. A metric with a value that is not finite is left
            out.
        oracle: The metrics of retrained models by name.

    Returns:
        Addresses of the pictures by caption.
    """
    pictures = {}
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
        pictures[caption] = _address(figure)
    return pictures


def _histogram(values: NDArray[np.float64], name: str, marks: dict[str, float]) -> str:
    """Draw one histogram and return its address.

    Args:
        values: One number per example, at least one finite.
        name: Meaning of the numbers, for the axis.
        marks: Numbers at which to draw a line, by name.
    """
    figure, ax = _canvas()
    plot_distribution(values, name=name, marks=marks, ax=ax)
    return _address(figure)


def _canvas() -> tuple[Figure, Axes]:
    """Return a new figure that pyplot does not manage, and its Axes.

    Pyplot would keep every figure until it is closed, and might try to open a window.
    """
    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.add_subplot()


def _literal(words: str) -> str:
    """Escape dollar signs, so that matplotlib does not read a formula.

    Metrics and units are named by the user. Text between two dollar signs would be set
    as mathematics, and an invalid formula raises an error.
    """
    return printable(words).replace("$", r"\$")


def _address(figure: Figure) -> str:
    """Return the figure as the data address of an SVG file.

    A data address contains the whole picture, so the page needs no second file, and its
    content security policy can forbid loading anything.
    """
    # Letters become paths, so the picture looks alike without the font.
    with plt.rc_context({"svg.hashsalt": "opacus_pi", "svg.fonttype": "path"}):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    code = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/svg+xml;base64,{code}"
