"""Execute the notebooks. ``python -m tests.notebook_runs [NAME ...]`` stores outputs.

With names (``2`` or ``2_forget_a_set``) only those; each takes less than 90 seconds.
"""

import argparse
import ast
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
TIMEOUT = 900  # seconds a cell, and for the kernel to start, on a busy machine


def read(path: Path) -> NotebookNode:
    """A notebook as stored."""
    return nbformat.read(path, as_version=4)


def executed(notebook: NotebookNode) -> NotebookNode:
    """The notebook run from its first cell in a fresh kernel and an empty folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("MPLBACKEND", None)  # figures belong into the notebook
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as settings,
    ):
        environment["MPLCONFIGDIR"] = settings
        _list_fonts(environment)
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            startup_timeout=TIMEOUT,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
        )
        client.execute(env=environment)
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3"},
        "language_info": {"name": "python"},
        "opacus_pi": {"code_sha256": code_hash(notebook)},
    }
    return notebook


def _list_fonts(environment: dict[str, str]) -> None:
    """Let matplotlib look for its fonts once, before the notebook draws with them.

    The list in the user's own folder may name files of an installation that was deleted
    since: matplotlib then warns of every font that it misses.
    """
    command = [sys.executable, "-c", "import matplotlib.font_manager"]
    subprocess.run(command, env=environment, check=True, capture_output=True)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells that are executed."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_hash(notebook: NotebookNode) -> str:
    """What the outputs were made from: a hash of all code."""
    sources = [cell.source for cell in code_cells(notebook)]
    return hashlib.sha256(repr(sources).encode()).hexdigest()


def imported(notebook: NotebookNode) -> set[str]:
    """Every module that the code imports from, and the names taken from it, dotted."""
    code = "\n".join(cell.source for cell in code_cells(notebook))
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def main() -> None:
    """Execute and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="what a file name begins with")
    names = tuple(parser.parse_args().names) or ("",)
    for path in (path for path in PATHS if path.name.startswith(names)):
        clock, before = time.perf_counter(), _cpu_seconds()
        nbformat.write(executed(read(path)), path)
        spent = time.perf_counter() - clock, _cpu_seconds() - before
        print(f"{path.name}: {spent[0]:.0f} s, {spent[1]:.0f} s of CPU")


def _cpu_seconds() -> float:
    """Processor time of all kernels that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
