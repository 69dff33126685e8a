"""Cases by seeds: results kept after every seed, and written as a table.

A script names its cases and their settings, and says how one seed of a case is
measured. Seeds that the file holds under the same settings are not run again.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common.report import environment, write_json

Facts = dict[str, Any]


def arguments(doc: str, cases: Iterable[str], out: Path) -> argparse.ArgumentParser:
    """The options that such scripts share."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(cases)
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=out)
    return parser


def run_missing(
    out: Path,
    settings: Mapping[str, Facts],
    num_seeds: int,
    measure: Callable[[str, int], Facts],
) -> dict[str, Facts]:
    """Measure what the file lacks, and write it after every seed.

    Args:
        out: JSON with ``environment`` and ``cases``.
        settings: What determines each case but its seed, JSON-able, by name.
        num_seeds: Seeds 0 to one less than this.
        measure: Results of a case, by name, and a seed; JSON-able.

    Returns:
        ``settings`` and ``seeds`` of every case in the file, by name.
    """
    cases = json.loads(out.read_text())["cases"] if out.exists() else {}
    for name, facts in json.loads(json.dumps(settings)).items():
        if cases.get(name, {}).get("settings") != facts:
            cases[name] = {"settings": facts, "seeds": {}}
        done = cases[name]["seeds"]
        missing = [seed for seed in range(num_seeds) if str(seed) not in done]
        for seed in tqdm(missing, desc=name, unit="seed", disable=not missing):
            done[str(seed)] = measure(name, seed)
            write_json(out, {"environment": environment(), "cases": cases})
    return cases


def publish(out: Path, text: str) -> None:
    """Print the table, and write it beside the JSON."""
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def over_seeds(values: Iterable[float], form: str = ".3g") -> str:
    """Mean and spread."""
    found = list(values)
    shown = (f"{value:{form}}" for value in (np.mean(found), min(found), max(found)))
    return "{} [{}, {}]".format(*shown)
