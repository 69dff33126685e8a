"""Measure time, memory and precision; compare with targets and other libraries.

    python -m benchmarks.overhead                     # measure everything: an hour
    python -m benchmarks.overhead --only norms fused  # some sections
    python -m benchmarks.overhead --resume            # only what has no result yet
    python -m benchmarks.overhead --show              # print stored results
    python -m benchmarks.overhead --device cuda --folder DIR    # sweeps and steps

Everything runs on one thread. CPU time decides whether a target is met; on a GPU it is
the time between events of its stream (TF32 is off). Ranges are over rounds. Every case
is written to the file of its section, overhead_SECTION.json, as soon as it is measured.
The table is written to overhead.md.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.command_line import parser_of
from benchmarks.common.report import write_json
from benchmarks.overhead import (
    accountant,
    fast_step,
    fused,
    memory,
    norms,
    precision,
    tracking,
)
from benchmarks.overhead.table import Row, markdown
from benchmarks.overhead.timing import surroundings

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Section:
    """Cases that are measured in the same way.

    Attributes:
        cases: Their names.
        measure: Returns the numbers of a case, as JSON.
        rows: Yields the rows of the table from the numbers of several cases.
        on_gpu: Whether ``measure`` takes a device.
    """

    cases: list[str]
    measure: Callable[..., dict[str, Any]]
    rows: Callable[[dict[str, Any]], Iterator[Row]]
    on_gpu: bool = False


SECTIONS = {
    "norms": Section(list(norms.TARGETS), norms.measure, norms.rows, True),
    "memory": Section(list(norms.TARGETS), memory.measure, memory.rows, True),
    "precision": Section(list(precision.NAMES), precision.measure, precision.rows),
    "tracking": Section(tracking.CASES, tracking.measure, tracking.rows),
    "step": Section(fast_step.CASES, fast_step.measure, fast_step.rows, True),
    "accountant": Section(accountant.CASES, accountant.measure, accountant.rows),
    "fused": Section(fused.CASES, fused.measure, fused.rows),
}


def run(name: str, path: Path, *, resume: bool, device: str = "cpu") -> None:
    """Measure the cases of a section, and write each as soon as it is measured.

    Args:
        name: A key of ``SECTIONS``.
        path: The section's file.
        resume: Keep the cases that the file already contains.
        device: A section that cannot use another device than the CPU is skipped there.
    """
    section = SECTIONS[name]
    if device != "cpu" and not section.on_gpu:
        return
    where = {"device": device} if section.on_gpu else {}
    stored = _load(path) if resume else {}
    for case in section.cases:
        if case not in stored:
            found = section.measure(case, **where)
            stored[case] = {"found": found, "surroundings": surroundings()}
            write_json(path, stored)
            print(markdown(section.rows({case: found})).split("\n", 2)[2], flush=True)


def _load(path: Path) -> dict[str, Any]:
    """Return the stored cases of a section."""
    return json.loads(path.read_text()) if path.exists() else {}


def table(folder: Path) -> str:
    """Return the table of all stored results."""
    found: list[Row] = []
    for name, section in SECTIONS.items():
        stored = _load(folder / f"overhead_{name}.json")
        found += section.rows({case: one["found"] for case, one in stored.items()})
    return markdown(found)


def main() -> None:
    """Parse the command line, measure, and print and write the table."""
    parser = parser_of("benchmarks.overhead", __doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(SECTIONS),
        choices=list(SECTIONS),
        metavar="SECTION",
        help=f"sections to measure: {', '.join(SECTIONS)}; default: all",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the stored results of cases"
    )
    parser.add_argument(
        "--show", action="store_true", help="measure nothing; print stored results"
    )
    parser.add_argument(
        "--folder", type=Path, default=RESULTS, help=f"of the results; {RESULTS}"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1, ...")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    for name in [] if args.show else args.only:
        path = args.folder / f"overhead_{name}.json"
        run(name, path, resume=args.resume, device=args.device)
    shown = table(args.folder)
    print(shown)
    (args.folder / "overhead.md").write_text(shown + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
