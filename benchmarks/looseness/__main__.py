"""How far are the bounds above the exact divergence? Print and save a table.

    python -m benchmarks.looseness          # half a minute on one core

Claim under test: no bound of the library's default convention is ever below the exact
divergence. If one is, the command fails. Published formulas are shown for comparison;
a formula whose smallest ratio is below 1 is not a bound.
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.common.command_line import parser_of
from benchmarks.common.report import environment, write_json
from benchmarks.looseness import FAMILIES, cases
from benchmarks.looseness.case import Case
from benchmarks.looseness.steps import ETA, LEARNED, SIGMA, TARGET, L, M, step_counts

ROOT = Path(__file__).parents[2]
_MEANINGFUL = 1e-12  # smaller exact values are rounding errors
_KINDS = {"ours": "this library", "published": "published"}


def summarise(found: list[Case]) -> list[dict]:
    """Return the ratios of bound to exact value, a row for each family and bound."""
    ratios: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for case in found:
        for kind, bounds in (("ours", case.ours), ("published", case.published)):
            for name, bound in bounds.items():
                if case.exact > _MEANINGFUL:
                    ratios[case.family, kind, name].append(bound / case.exact)
    return [
        {
            "family": family,
            "kind": kind,
            "bound": name,
            "cases": len(values),
            "smallest": float(np.min(values)),
            "median": float(np.median(values)),
            "largest": float(np.max(values)),
        }
        for (family, kind, name), values in ratios.items()
    ]


def markdown(rows: list[dict], steps: list[dict], seed: int) -> str:
    """Return the tables as a page of the documentation."""
    lines = [
        "# How loose the bounds are",
        "",
        "This page shows how far each bound lies above the exact divergence. Each "
        "number is a bound divided by the exact value: at 1 the bound is exact. "
        "*Published* formulas are evaluated as printed; a formula whose smallest ratio "
        "is below 1 is not a bound.",
        "",
        f"`python -m benchmarks.looseness` made the page from random cases (seed {seed}"
        "), whose exact divergence is computed without the library.",
        "",
        "| case | bound | from | cases | smallest | median | largest |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['family']} | {r['bound']} | {_KINDS[r['kind']]} | {r['cases']} | "
        f"{r['smallest']:.4g} | {r['median']:.4g} | {r['largest']:.4g} |"
        for r in rows
    ]
    lines += [
        "",
        "## Steps to unlearn on the same constants",
        "",
        f"Noisy gradient descent with η = {ETA}, σ = {SIGMA}, strong convexity {M}, "
        f"smoothness {L}, {LEARNED} learning steps, losses D_α proportional to α, "
        f"target D_α ≤ {TARGET}. The table has the unlearning steps k that each bound "
        "requires. Corollary 4.4 is evaluated in its best case (training at "
        "stationarity), with the rate of Chien et al. It compares with a model "
        "retrained for T steps; the other columns compare with a model retrained for "
        "T + k steps.",
        "",
        "| order | loss at the order | Corollary 4.4 | Chien et al.'s rate | "
        "this library, from the loss at that order only | this library |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {s['order']:g} | {s['loss']:g} | {s['corollary_4_4']} | "
        f"{s['chien_rate']} | {s['ours_loss_at_order_only']} | {s['ours']} |"
        for s in steps
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run all cases; return 1 if a bound of the library is below an exact value."""
    parser = parser_of("benchmarks.looseness", __doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the random cases")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        help="folder of looseness.json",
    )
    parser.add_argument(
        "--page",
        type=Path,
        default=ROOT / "docs" / "looseness.md",
        help="file of the tables",
    )
    args = parser.parse_args()
    found = [
        case
        for name, (_, number) in FAMILIES.items()
        for case in cases(name, number, args.seed)
    ]
    violated = [(case.family, case.violations()) for case in found if case.violations()]
    rows, steps = summarise(found), list(step_counts())
    page = markdown(rows, steps, args.seed)
    write_json(
        args.out / "looseness.json",
        {
            "seed": args.seed,
            "cases": len(found),
            "violations": violated,
            "table": rows,
            "steps": steps,
            "environment": environment(),
        },
    )
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page, encoding="utf-8")
    print(page)
    print(f"{len(found)} cases, {len(violated)} with a bound below the exact value.")
    for family, names in violated:
        print(f"VIOLATED: {family}: {', '.join(names)}")
    return int(bool(violated))


if __name__ == "__main__":
    sys.exit(main())
