"""The README's Python runs as it stands, and its commands name what exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run(capsys):
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "guarantee for Langevin" in out
    assert "not met" not in out  # nothing but what the user declares is missing


def test_there_is_one_line_for_the_main_job_and_one_for_the_tests():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    installs = [line for line in lines if line.startswith("python3 -m venv")]
    assert [line.rsplit(" -m ", 1)[-1].split()[0] for line in installs] == [
        "benchmarks.main_job",
        "pytest",
    ]


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
