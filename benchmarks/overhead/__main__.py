"""Print the table of overheads: ours and every peer that is installed.

    python -m benchmarks.overhead                     # measure everything: an hour
    python -m benchmarks.overhead --only norms fused  # some sections
    python -m benchmarks.overhead --resume            # what is not in the files yet
    python -m benchmarks.overhead --show              # what is in the files
    python -m benchmarks.overhead --device cuda --folder DIR    # sweeps and steps

One thread; its CPU time decides, or the GPU's events (without TF32); ranges are over
rounds. Every case is written
to its section's file, ``overhead_<section>.json``, as soon as it is measured, and the
table to ``overhead.md``.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.report import write_json
from benchmarks.overhead import (
    accounts,
    fused,
    memory,
    norms,
    precision,
    steps,
    tracking,
)
from benchmarks.overhead.table import Row, markdown
from benchmarks.overhead.timing import surroundings

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Section:
    """Cases that are measured alike, and the table's lines that they make."""

    cases: list[str]
    measure: Callable[..., dict[str, Any]]
    rows: Callable[[dict[str, Any]], Iterator[Row]]
    on_gpu: bool = False  # whether ``measure`` takes a device


SECTIONS = {
    "norms": Section(list(norms.BARS), norms.measure, norms.rows, True),
    "memory": Section(list(memory.NAMES), memory.measure, memory.rows, True),
    "precision": Section(list(precision.NAMES), precision.measure, precision.rows),
    "tracking": Section(tracking.CASES, tracking.measure, tracking.rows),
    "step": Section(steps.CASES, steps.measure, steps.rows, True),
    "accountant": Section(accounts.CASES, accounts.measure, accounts.rows),
    "fused": Section(["small-cnn"], fused.measure, fused.rows),
}


def run(name: str, path: Path, *, resume: bool, device: str = "cpu") -> None:
    """Measure a section's cases and write each as soon as it is there."""
    section = SECTIONS[name]
    if device != "cpu" and not section.on_gpu:
        return
    where = {"device": device} if section.on_gpu else {}
    held = _load(path) if resume else {}
    for case in section.cases:
        if case not in held:
            found = section.measure(case, **where)
            held[case] = {"found": found, "surroundings": surroundings()}
            write_json(path, held)
            print(markdown(section.rows({case: found})).split("\n", 2)[2], flush=True)


def _load(path: Path) -> dict[str, Any]:
    """What a section's file holds."""
    return json.loads(path.read_text()) if path.exists() else {}


def table(folder: Path) -> str:
    """All lines that the files have numbers for."""
    found: list[Row] = []
    for name, section in SECTIONS.items():
        held = _load(folder / f"overhead_{name}.json")
        found += section.rows({case: one["found"] for case, one in held.items()})
    return markdown(found)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS)
    )
    parser.add_argument("--resume", action="store_true", help="keep what files hold")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cpu")
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
