"""Every notebook runs as stored, and its stored outputs belong to its code."""

import re

import pytest

from tests.notebook_runs import PATHS, code_cells, code_hash, executed, imported, read

LONGEST_CELL = 25
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|usr|var|opt|Users)/")
every = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def kinds(notebook):
    """For each code cell what kinds of output it has."""
    return [
        {
            kind
            for output in cell.outputs
            for kind in output.get("data", {output.get("name"): None})
        }
        for cell in code_cells(notebook)
    ]


def texts(notebook):
    """Everything that a notebook says, in source and outputs, without pictures."""
    for cell in notebook.cells:
        yield cell.source
        for output in cell.get("outputs", []):
            yield output.get("text", "")
            yield output.get("data", {}).get("text/plain", "")


def test_there_are_five():
    assert [path.name[:2] for path in PATHS] == ["1_", "2_", "3_", "4_", "5_"]


@every
def test_runs_without_an_error_or_a_warning(path):
    found = kinds(executed(read(path)))
    assert found == kinds(read(path))
    assert not any("stderr" in kind for kind in found)


@every
def test_stored_outputs_are_those_of_the_stored_code(path):
    notebook = read(path)
    assert notebook.metadata["opacus_pi"]["code_sha256"] == code_hash(notebook), (
        f"the code was changed: python -m tests.notebook_runs {path.stem}"
    )
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert sum("image/png" in kind for kind in kinds(notebook)) >= 3
    outputs = [out.output_type for cell in code_cells(notebook) for out in cell.outputs]
    assert "error" not in outputs


@every
def test_cells_are_short_and_name_no_machine(path):
    notebook = read(path)
    for cell in code_cells(notebook):
        assert len(cell.source.splitlines()) <= LONGEST_CELL, cell.source
    assert not any(MACHINE_PATH.search(text) for text in texts(notebook))
    assert notebook.cells[0].cell_type == notebook.cells[-1].cell_type == "markdown"


@every
def test_only_what_an_installation_has_is_imported(path):
    names = imported(read(path))
    assert any(name.startswith("opacus_pi.") for name in names)
    for name in names:
        parts = name.split(".")
        assert parts[0] not in {"benchmarks", "tests"}, name
        assert not any(part.startswith("_") for part in parts), name


def test_changed_code_is_noticed():
    notebook = read(PATHS[0])
    before = code_hash(notebook)
    notebook.cells[0].source += " More prose."
    assert code_hash(notebook) == before
    code_cells(notebook)[0].source += "\n1 + 1"
    assert code_hash(notebook) != before
