"""Time and memory of everything that grows with the number of examples.

    python -m benchmarks.scale                        # about ten minutes on one core
    python -m benchmarks.scale --only epsilons --sizes 10000 50000

Every task runs in a process of its own at two or three sizes. Each step's wall and
processor time is the least of the rounds, its memory the most that the process held
beyond what it held before the step, result included. The bars are
for the last size and one idle core. On a machine that does other work compare them with
the processor time; the table has the load. It says how the processor time grows: the
exponent b of time ~ size^b between the last two sizes.
"""

import argparse
import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

from benchmarks.common.command_line import parser_of
from benchmarks.common.report import environment, markdown, write_json
from benchmarks.scale.measuring import Measured, measured
from benchmarks.scale.tasks import TASKS, Task

HERE = Path(__file__).parent.parent / "results"


def best(rounds: list[Measured]) -> Measured:
    """Return the least of each number over the rounds."""
    return {
        step: {key: min(one[step][key] for one in rounds) for key in values}
        for step, values in rounds[0].items()
    }


def in_fresh_processes(name: str, size: int, rounds: int) -> Measured:
    """Return what ``measured`` finds in processes that did nothing else."""
    context = multiprocessing.get_context("spawn")
    found = []
    for _ in range(rounds):
        with context.Pool(1) as pool:
            found.append(pool.apply(measured, (name, size)))
    return best(found)


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        ["what", "size", "step", "bar", "time", "processor", "memory", "load", "growth"]
    ]
    for name, by_size in results.items():
        task = TASKS[name]
        sizes = sorted(by_size, key=int)
        for step in by_size[sizes[0]]:
            for size in sizes:
                is_last = size == sizes[-1] and int(size) == task.sizes[-1]
                one = by_size[size][step]
                lines.append(
                    [
                        task.what if size == sizes[0] else "",
                        f"{int(size):,} {task.unit}",
                        step,
                        _bar(task, step) if is_last else "",
                        f"{one['seconds']:.2g} s",
                        f"{one['processor_seconds']:.2g} s",
                        f"{one['mebibytes']:.0f} MiB",
                        f"{one['load']:.0f}",
                        _growth(by_size, sizes, step) if size == sizes[-1] else "",
                    ]
                )
    return markdown(lines)


def _bar(task: Task, step: str) -> str:
    """Describe the bar of a step."""
    limit = task.seconds[step]
    parts = [f"{limit:g} s"] if math.isfinite(limit) else []
    memory = task.mebibytes
    if isinstance(memory, dict):
        memory = memory[step]
    parts += [f"{memory:.0f} MiB"] if memory else []
    return ", ".join(parts)


def _growth(by_size: dict[str, Any], sizes: list[str], step: str) -> str:
    """Return the exponent of the processor time between the last two sizes."""
    if len(sizes) < 2:
        return ""
    small, large = sizes[-2:]
    times = [max(by_size[s][step]["processor_seconds"], 1e-4) for s in (small, large)]
    return f"{math.log(times[1] / times[0]) / math.log(int(large) / int(small)):.2f}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the JSON file and the table."""
    parser: argparse.ArgumentParser = parser_of("benchmarks.scale", __doc__)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--sizes", nargs="+", type=int, help="default: each task's own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args(arguments)
    path = args.out / "scale.json"
    old = json.loads(path.read_text())["results"] if path.exists() else {}
    results: dict[str, Any] = dict(old)
    for name in args.only:
        results.setdefault(name, {})
        for size in args.sizes or TASKS[name].sizes:
            results[name][str(size)] = in_fresh_processes(name, size, args.rounds)
            print(name, size, json.dumps(results[name][str(size)]), flush=True)
            ordered = {key: results[key] for key in TASKS if key in results}
            write_json(path, {"environment": environment(), "results": ordered})
    text = table({key: results[key] for key in TASKS if key in results})
    (args.out / "scale.md").write_text(
        f"# Scale\n\n`python -m benchmarks.scale`\n\n{text}\n"
    )
    print(text)


if __name__ == "__main__":
    main()
