"""Simulate every judge: how often does it confirm a claim that is false, or true?

    python -m benchmarks.reproduce.judging --jobs 2    # five minutes of one core

Writes benchmarks/results/reproduce/judges.json and judges.md.
"""

import importlib
import json
import pkgutil
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common.command_line import parser_of
from benchmarks.common.report import markdown, write_json
from benchmarks.reproduce import judging
from benchmarks.reproduce.judging.scenario import KINDS, Scenario, counted
from benchmarks.reproduce.judging.simulated import SCENARIOS

OUT = Path(__file__).parents[2] / "results" / "reproduce"
CHECKED = 40  # first draws of a scenario, which the tests simulate again


def main() -> None:
    """Simulate and write both files."""
    parser = parser_of("benchmarks.reproduce.judging", __doc__)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    numbers = range(len(SCENARIOS))
    with ProcessPoolExecutor(args.jobs) as pool:
        found = pool.map(_row, numbers)
        rows = list(tqdm(found, total=len(numbers), unit="scenario"))
    content = {"settings": settings(), "rows": rows}
    write_json(args.out / "judges.json", content)
    (args.out / "judges.md").write_text(table(content), encoding="utf-8")


def _row(number: int) -> dict[str, Any]:
    return row_of(SCENARIOS[number])


def row_of(scenario: Scenario) -> dict[str, Any]:
    """Return what a scenario is, and how often each verdict was given."""
    draws = scenario.draws
    found = scenario.verdicts(draws)
    return {
        "judge": scenario.judge,
        "scenario": scenario.name,
        "effect": scenario.effect,
        "fools": scenario.fools,
        "draws": draws,
        "rates": {kind: number / draws for kind, number in counted(found).items()},
        "checked": counted(found[:CHECKED]),
    }


def settings() -> dict[str, float | str]:
    """Return every constant of the judges, such as levels and smallest numbers."""
    found = {}
    for module in pkgutil.iter_modules(judging.__path__):
        if module.name == "__main__":
            continue
        named = vars(importlib.import_module(f"{judging.__name__}.{module.name}"))
        for name, value in named.items():
            if name.lstrip("_").isupper() and isinstance(value, int | float):
                found[f"{module.name}.{name}"] = value
    return dict(sorted(found.items()))


def table(content: dict[str, Any]) -> str:
    """Return the simulated rates as Markdown, a section for each judge.

    Cases that are known to fool a judge have a table of their own.
    """
    of_judges = defaultdict(list)
    for row in content["rows"]:
        of_judges[row["judge"]].append(row)
    sections = []
    for judge, rows in of_judges.items():
        draws = f"{rows[0]['draws']} studies of each case."
        sections += [f"### {judge[0].upper()}{judge[1:]}", draws]
        rest, fools = ([r for r in rows if r["fools"] == kind] for kind in (0, 1))
        sections.append(_table(rest))
        if fools:
            sections += ["Known to fool this judge:", _table(fools)]
    return "\n\n".join(sections) + "\n"


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [["simulated", "claim is", *KINDS]]
    for row in rows:
        shares = [f"{100 * row['rates'][kind]:.1f} %" for kind in KINDS]
        lines.append([row["scenario"], "true" if row["effect"] else "false", *shares])
    return markdown(lines)


def stored(out: Path = OUT) -> dict[str, Any]:
    """Return the committed rates."""
    return json.loads((out / "judges.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
