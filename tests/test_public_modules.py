"""Public modules say which names are theirs, and ``help`` shows what can be read."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import opacus_pi

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "opacus_pi"
LONGEST = 850  # characters of a signature as help shows it
SPELT_OUT = ("numpy._typing", "_NestedSequence")  # what an array-like is made of


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def pages():
    named = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    for path in [*named, *ROOT.glob("notebooks/*.ipynb")]:
        yield path.read_text(encoding="utf-8")


def imports(text):
    """Module and name of each import of a page."""
    for module, names in re.findall(r"from (opacus_pi[\w.]*) import ([\w, ]+)", text):
        for name in names.split(","):
            yield module, name.split()[0]


def public_modules():
    """All rooms and sub-packages, and what the pages import from or document."""
    modules = {dotted(path): path for path in PACKAGE.rglob("*.py")}
    found = {
        name
        for name, path in modules.items()
        if name.count(".") < 2 or path.name == "__init__.py"
    }
    for text in pages():
        found |= {m for m, _ in imports(text)}
        found |= {f"{m}.{n}" for m, n in imports(text)} & set(modules)
        places = re.findall(r"^::: (\S+)", text, re.MULTILINE)
        found |= {p if p in modules else p.rpartition(".")[0] for p in places}
    return sorted(n for n in found if not any(p[:1] == "_" for p in n.split(".")))


MODULES = public_modules()


def test_the_modules_are_found():
    expected = {"opacus_pi", "opacus_pi.cli", "opacus_pi.compatible"}
    assert expected | {"opacus_pi.unlearning.search"} <= set(MODULES)
    assert not [name for name in MODULES if "_types" in name or "__main__" in name]


@pytest.mark.parametrize("name", MODULES)
def test_a_public_module_says_which_names_are_public(name):
    module = importlib.import_module(name)
    names = module.__all__
    assert len(set(names)) == len(names)
    assert not [n for n in names if n.startswith("_") or not hasattr(module, n)]


def test_what_the_pages_import_is_public():
    imported = {found for text in pages() for found in imports(text)}
    assert ("opacus_pi", "PrivacyEngine") in imported and len(imported) > 20
    for module, name in imported:
        home = importlib.import_module(module)
        public = name in home.__all__ or f"{module}.{name}" in MODULES
        assert public, (module, name)


def callables():
    """Public functions, classes and methods, by name."""
    for place in MODULES:
        module = importlib.import_module(place)
        for name in module.__all__:
            value = getattr(module, name)
            yield f"{place}.{name}", value
            if inspect.isclass(value):
                for key, method in vars(value).items():
                    if inspect.isfunction(method) and not key.startswith("_"):
                        yield f"{place}.{name}.{key}", method


def signature(value):
    if hasattr(value, "__wrapped__"):  # Opacus's own, shown for what it is
        return ""
    try:
        return str(inspect.signature(value))
    except (TypeError, ValueError):
        return ""


def test_signatures_can_be_read():
    signatures = {name: signature(value) for name, value in callables()}
    assert sum(bool(text) for text in signatures.values()) > 150
    assert {n: len(s) for n, s in signatures.items() if len(s) > LONGEST} == {}
    assert [n for n, s in signatures.items() if any(w in s for w in SPELT_OUT)] == []
    plan = signature(opacus_pi.Unlearner.plan)
    assert "forget_indices: ArrayLike" in plan
