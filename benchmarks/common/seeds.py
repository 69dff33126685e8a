"""Run named cases over several seeds; store every seed's result, write a table.

A script provides the settings of its cases and a function that measures one seed of a
case. Seeds that are stored with the same settings are not run again.
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


def add_options(
    parser: argparse.ArgumentParser, cases: Iterable[str], out: Path
) -> None:
    """Add the options that such scripts share."""
    names = list(cases)
    parser.add_argument(
        "--cases", nargs="+", choices=names, default=names, help="default: all"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--out", type=Path, default=out, help="the file of the results")


def run_missing(
    out: Path,
    settings: Mapping[str, Facts],
    num_seeds: int,
    measure: Callable[[str, int], Facts],
) -> dict[str, Facts]:
    """Measure the seeds that the file lacks, and write the file after every seed.

    Args:
        out: JSON with ``environment`` and ``cases``.
        settings: By name of the case, everything but the seed that determines it.
        num_seeds: The seeds are 0 to ``num_seeds - 1``.
        measure: Returns the result of a case (by name) and a seed, JSON-able.

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
    """Print the table and write it beside the JSON."""
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def over_seeds(values: Iterable[float], form: str = ".3g") -> str:
    """Return mean, least and largest value as text."""
    found = list(values)
    shown = (f"{value:{form}}" for value in (np.mean(found), min(found), max(found)))
    return "{} [{}, {}]".format(*shown)
