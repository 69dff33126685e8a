"""Simulate every judge: how often does it confirm a claim that is false, or true?

    python -m benchmarks.reproduce.judging          # about ten minutes

Writes benchmarks/results/reproduce/judges.json and judges.md.
"""

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common.command_line import parser_of
from benchmarks.common.report import markdown, write_json
from benchmarks.reproduce import judging
from benchmarks.reproduce.judging.scenario import KINDS, Scenario, counted
from benchmarks.reproduce.judging.simulated import SCENARIOS

OUT = Path(__file__).parents[2] / "results" / "reproduce"
DRAWS = 1_000
CHECKED = 200  # first draws of a scenario, which the tests simulate again


def main() -> None:
    """Simulate and write both files."""
    parser = parser_of("benchmarks.reproduce.judging", __doc__)
    parser.add_argument("--draws", type=int, default=DRAWS, help="per scenario")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows = [row_of(one, args.draws) for one in tqdm(SCENARIOS, unit="scenario")]
    content = {"draws": args.draws, "settings": settings(), "rows": rows}
    write_json(args.out / "judges.json", content)
    (args.out / "judges.md").write_text(table(content), encoding="utf-8")


def row_of(scenario: Scenario, draws: int) -> dict[str, Any]:
    """Return what a scenario is, and how often each verdict was given."""
    found = scenario.verdicts(draws)
    return {
        "judge": scenario.judge,
        "scenario": scenario.name,
        "effect": scenario.effect,
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
    """Return the simulated rates as a Markdown table."""
    lines = [["judge (figures)", "simulated", "claim is", *KINDS]]
    for row in content["rows"]:
        shares = [f"{100 * row['rates'][kind]:.1f} %" for kind in KINDS]
        truth = "true" if row["effect"] else "false"
        lines.append([row["judge"], row["scenario"], truth, *shares])
    return markdown(lines) + "\n"


def stored(out: Path = OUT) -> dict[str, Any]:
    """Return the committed rates."""
    return json.loads((out / "judges.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
