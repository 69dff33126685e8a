"""Judge the numbers of a figure, and write its JSON, picture and table."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.common.report import write_json
from benchmarks.reproduce.figures import Figure
from benchmarks.reproduce.judging.verdicts import COMPUTED, NOT_TESTABLE, Verdict

FEWEST_SEEDS = 3  # with fewer seeds there is no verdict
Content = dict[str, Any]


def publish(
    figure: Figure,
    result: Any,
    scale: dict[str, Any],
    environment: dict[str, Any],
    out: Path,
) -> Content:
    """Write ``NAME.json``, ``NAME.png`` and, for some figures, ``NAME.md``.

    Args:
        figure: The figure.
        result: Its numbers.
        scale: The sizes at which they were computed, as JSON.
        environment: Versions and machine with which they were computed.
        out: The folder.

    Returns:
        The content of ``NAME.json``.
    """
    content = {
        "figure": figure.name,
        "claim": figure.claim,
        **verdict_on(figure, result, scale).to_json(),
        "environment": environment,
        "scale": scale,
        "result": result,
    }
    write_json(out / f"{figure.name}.json", content)
    picture = figure.draw(result)
    picture.savefig(out / f"{figure.name}.png", dpi=120)
    plt.close(picture)
    if figure.table:
        text = figure.table(result)
        (out / f"{figure.name}.md").write_text(text, encoding="utf-8")
    return content


def verdict_on(figure: Figure, result: Any, scale: dict[str, Any]) -> Verdict:
    """Return the verdict on a figure's claim.

    A few seeds cannot confirm anything, nor can numbers that are not finite: every
    comparison with NaN is false, so a guard or a count would pass over it.
    """
    bad = list(_not_finite(result))
    if bad:
        return Verdict(NOT_TESTABLE, f"{len(bad)} values are NaN or infinite: {bad[0]}")
    found = figure.judge(result)
    if found.verdict in COMPUTED:
        return found
    if scale["sgd"]["num_seeds"] < FEWEST_SEEDS:
        few = f"fewer than {FEWEST_SEEDS} seeds; {found.reason}".removesuffix("; ")
        return replace(found, verdict=NOT_TESTABLE, reason=few)
    return found


def _not_finite(content: Any, path: str = "result") -> Iterator[str]:
    """Yield where a number of a result is NaN or infinite; None stands for never."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _not_finite(value, f"{path}, {key}")
    elif isinstance(content, list | tuple | np.ndarray):
        for place, value in enumerate(content):
            yield from _not_finite(value, f"{path}, {place}")
    elif isinstance(content, float) and not np.isfinite(content):
        yield path


def text_of(content: Content) -> str:
    """Return claim, verdict and numbers of a figure as text for the terminal."""
    verdict = Verdict.from_json(content)
    lines = [f"{content['figure']}: {verdict.verdict}", f"claim: {content['claim']}"]
    if verdict.text:
        lines.append(f"found: {verdict.text}")
    return "\n    ".join([*lines, *verdict.lines()])
