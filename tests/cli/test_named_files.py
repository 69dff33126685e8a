"""No command writes over a file that it reads, or over its own output."""

import shutil

import pytest

from opacus_pi.unlearning.deletion_log import DeletionLog
from tests.cli.conftest import DATA, LOG, MODEL

FORGET = ("--forget", "3,17")


@pytest.fixture
def files(project, tmp_path):
    """Copies of the project's files, which a wrong command could destroy."""
    for name in ("ledger.safetensors", "model.safetensors", "retrained.pt"):
        shutil.copy(project / name, tmp_path)
    (tmp_path / "alias").symlink_to(tmp_path / "new.json")
    DeletionLog(tmp_path / "log.db")
    return tmp_path


def contents(directory):
    return {path: path.read_bytes() for path in directory.iterdir() if path.exists()}


@pytest.mark.parametrize(
    ("out", "csv"),
    [("new", "new"), ("new", "./new"), ("alias", "new.json")],
)
def test_two_outputs_are_two_files(run, files, out, csv):
    before = contents(files)
    words = ("--out", f"{files}/{out}", "--csv", f"{files}/{csv}")
    code, _, err = run("score", "ledger.safetensors", *words)
    assert code == 2 and "named twice" in err and contents(files) == before


def test_the_json_beside_a_page_is_an_output_too(run, files):
    shutil.copy("ledger.safetensors", files / "page.json")
    before = contents(files)
    words = ("--ledger", files / "page.json", "--out", files / "page.html")
    code, _, err = run("report", *words)
    assert code == 2 and "page.json is named twice" in err
    assert contents(files) == before


@pytest.mark.parametrize("name", ["record", "guarantee", "trace"])
def test_a_report_does_not_replace_a_file_of_its_run(run, files, name):
    directory = files / "run"
    words = ("unlearn", *MODEL, *DATA, *FORGET, "--epochs", 1, "--out", directory)
    assert run(*words)[0] == 0
    before = contents(directory)
    report = ("report", directory, "--ledger", "ledger.safetensors", "--out")
    code, _, err = run(*report, directory / f"{name}.html")
    assert code == 2 and f"{name}.json is named twice" in err
    assert contents(directory) == before
    for _ in range(2):  # a report may replace an earlier one
        assert run(*report, directory / "report.html")[0] == 0


@pytest.mark.parametrize(
    "name", ["ledger.safetensors", "model.safetensors", "retrained.pt", "log.db"]
)
def test_what_is_no_answer_is_not_written_over(run, files, name):
    before = contents(files)
    code, _, err = run("score", "ledger.safetensors", "--out", files / name)
    assert code == 2 and "neither a text nor an answer" in err
    assert contents(files) == before
    for text in ("", "notes\n", '{"a": 1}\n'):
        (files / "text").write_text(text)
        assert run("score", "ledger.safetensors", "--out", files / "text")[0] == 0


def test_a_log_is_not_put_into_the_directory_of_a_result(run, files):
    (files / "run").mkdir()
    words = (*LOG, files / "run" / "log.db", "--out", files / "run")
    code, _, err = run("unlearn", *MODEL, *DATA, *FORGET, *words)
    assert code == 2 and "--log" in err and not list((files / "run").iterdir())


@pytest.mark.parametrize("name", ["n" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_found_before_anything_is_run(run, files, name):
    before = contents(files)
    log = (*LOG, files / "new.db", "--out", name)
    code, _, err = run("unlearn", *MODEL, *DATA, *FORGET, *log)
    assert code == 2 and "argument --out" in err and "cannot be written" in err
    code, _, err = run("score", "ledger.safetensors", "--out", name)
    assert code == 2 and "argument --out" in err and "cannot be written" in err
    assert contents(files) == before
