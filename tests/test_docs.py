"""Every Python block of every page runs; every public name has a place in the API."""

import re
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import pytest
import torch

import opacus_pi

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NEEDS = (
    (".to_frame(", "pandas"),
    ("import Accel", "accelerate"),
    ("from transformers import", "transformers"),
    ("from datasets import", "datasets"),
    ("import PrivacyCallback", "accelerate"),
)
API = {page: page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md")}


def named(page):
    return page.relative_to(DOCS).as_posix()


def blocks(page):
    """The blocks with the line they start on."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text[: found.start()].count("\n") + 1, found[1]


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p))], ids=named)
def test_python_blocks_run_one_after_another(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")  # so that classes of the page can be pickled
    monkeypatch.setitem(sys.modules, "page", module)
    text = page.read_text(encoding="utf-8")
    for mark, package in NEEDS:
        if mark in text:
            pytest.importorskip(package)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for line, code in blocks(page):
            exec(compile("\n" * line + code, str(page), "exec"), vars(module))
    plt.close("all")
    if "accelerate" in sys.modules:  # what a page sets up holds for the whole process
        states = sys.modules["accelerate.state"]
        states.AcceleratorState._reset_state(reset_partial_state=True)


def test_the_blocks_are_found():
    assert sum(len(list(blocks(page))) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_code_fits_a_window_of_1280_pixels(page):
    """docs/extra.css makes room for 88 characters, and wraps what commands print."""
    long, in_fence, is_printed = [], False, False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            in_fence, is_printed = not in_fence, "console" in line
        elif in_fence and not is_printed and len(line) > 88:
            long.append(line)
    assert not long


@pytest.mark.parametrize("what", ["data", "metric", "method", "model"])
def test_what_is_your_own_needs_a_short_page(what):
    page = DOCS / "how-to" / f"own-{what}.md"
    assert len(page.read_text(encoding="utf-8").splitlines()) < 40
    assert len(list(blocks(page))) == 1


def test_each_snippet_of_the_decision_page_has_fewer_than_ten_lines():
    found = [code for _, code in blocks(DOCS / "how-to" / "which-certificate.md")]
    lines = [
        sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in lines)
        for lines in (code.splitlines() for code in found)
    ]
    assert len(lines) >= 9 and 0 < min(lines) and max(lines) < 10


def documented(text):
    """Names of modules that a page of the API documents."""
    return re.findall(r"^::: (\S+)", text, re.MULTILINE)


@pytest.mark.parametrize(
    "module",
    [
        "opacus_pi",
        "opacus_pi.accounting",
        "opacus_pi.attribution",
        "opacus_pi.evaluation",
        "opacus_pi.gradients",
        "opacus_pi.plotting",
        "opacus_pi.unlearning",
    ],
)
def test_every_public_name_is_on_a_page(module):
    names = import_module(module).__all__
    places = {place for text in API.values() for place in documented(text)}
    missing = []
    for name in names:
        value = getattr(import_module(module), name)
        home = getattr(value, "__module__", module)
        if not {f"{module}.{name}", f"{home}.{name}", module, home} & places:
            missing.append(name)
    assert not missing


def test_pages_are_in_the_navigation():
    navigation = (ROOT / ".mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert named(page) in navigation, page


def test_no_text_installs_the_package_from_an_index():
    """It is on none; somebody else could take its name there."""
    texts = [*ROOT.glob("*.md"), *DOCS.rglob("*.*"), *ROOT.rglob("opacus_pi/**/*.py")]
    texts = [*texts, *ROOT.glob("notebooks/*.ipynb")]
    found = re.compile(rb"pip install[^\n]*\bopacus[-_]pi\b(?!/)")
    assert not [p for p in texts if p.is_file() and found.search(p.read_bytes())]


def test_the_citation_has_the_version():
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {opacus_pi.__version__}" in lines
