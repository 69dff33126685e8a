"""Simulate every judge: how often does it confirm a claim that is false, or true?

    python -m benchmarks.reproduce.judging          # about a minute

Writes benchmarks/results/reproduce/judges.json and judges.md.
"""

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common.command_line import parser_of
from benchmarks.common.report import markdown, write_json
from benchmarks.reproduce.judging.simulated import KINDS, SCENARIOS, rates

OUT = Path(__file__).parents[2] / "results" / "reproduce"
DRAWS = 1_000


def main() -> None:
    """Simulate and write both files."""
    parser = parser_of("benchmarks.reproduce.judging", __doc__)
    parser.add_argument("--draws", type=int, default=DRAWS, help="per scenario")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows = [
        {
            "judge": one.judge,
            "scenario": one.name,
            "effect": one.effect,
            "rates": rates(one, args.draws),
        }
        for one in tqdm(SCENARIOS, unit="scenario")
    ]
    content = {"draws": args.draws, "rows": rows}
    write_json(args.out / "judges.json", content)
    (args.out / "judges.md").write_text(table(content), encoding="utf-8")


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
