"""The small results of a study in one file, so that another machine can go on.

A store has one file for each job, and the weights of every model. The journal has the
results of the jobs only, a line of JSON each, and can be committed. ``restore`` puts
them into an empty store. Models are not in it: a job that needs a model which is not in
the store trains it again.
"""

import json
from pathlib import Path

from benchmarks.common.report import write_json
from opacus_pi.files.atomic_file import replace_file


def restore(journal: Path, store: Path) -> int:
    """Write the results of a journal into a store that lacks them.

    Args:
        journal: The journal; a missing file is empty.
        store: The store.

    Returns:
        How many results were written.
    """
    if not journal.exists():
        return 0
    written = 0
    for line in journal.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        path = store / entry.pop("path")
        if not path.exists():
            write_json(path, entry)
            written += 1
    return written


def record(store: Path, journal: Path) -> int:
    """Write all results of a store into a journal, in a fixed order.

    Args:
        store: The store.
        journal: The journal, replaced in one step.

    Returns:
        How many results the journal has.
    """
    lines = []
    for path in sorted(store.glob("*/*.json")):
        entry = {"path": path.relative_to(store).as_posix()}
        entry |= json.loads(path.read_text(encoding="utf-8"))
        lines.append(json.dumps(entry, separators=(",", ":")))
    journal.parent.mkdir(parents=True, exist_ok=True)
    replace_file(journal, "".join(f"{line}\n" for line in lines).encode())
    return len(lines)
