"""Every promised name is documented: what it is, and each argument.

A name is promised if a package's ``__all__`` has it. The docstrings of functions, of
classes and of their public methods must explain each parameter.
"""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "opacus_pi"
ROOMS = sorted(
    ".".join(path.parent.relative_to(PACKAGE.parent).parts)
    for path in PACKAGE.rglob("__init__.py")
)


def promised(room):
    """Names and values that a package promises."""
    module = importlib.import_module(room)
    return {name: getattr(module, name) for name in module.__all__}


def parameters(value):
    """Names of the parameters that a caller gives."""
    names = inspect.signature(value).parameters
    return [name for name in names if name not in ("self", "cls")]


def unnamed(value, docstring):
    """Parameters that the Args section does not explain."""
    section = re.search(r"^Args:\n(.*?)(?=^\w+:|\Z)", docstring, re.M | re.S)
    heads = re.findall(r"^ {4}([\w*, ]+):", section[1] if section else "", re.M)
    explained = {name for head in heads for name in re.findall(r"\w+", head)}
    return [name for name in parameters(value) if name not in explained]


def problems(place, value):
    """What a reader of one promised name would miss."""
    own = inspect.getdoc(value) if inspect.isclass(value) is False else value.__doc__
    docstring = inspect.cleandoc(own or "")
    if not docstring or docstring.startswith(f"{getattr(value, '__name__', '')}("):
        yield f"{place} has no docstring"
    elif inspect.isclass(value):
        yield from _problems_of_class(place, value, docstring)
    elif inspect.isfunction(value) and not hasattr(value, "__wrapped__"):
        yield from (f"{place}: {name}" for name in unnamed(value, docstring))


def _problems_of_class(place, value, docstring):
    init = vars(value).get("__init__")
    fields = dataclasses.is_dataclass(value) or issubclass(value, tuple)
    if inspect.isfunction(init) and not fields and not issubclass(value, BaseException):
        missing = unnamed(init, docstring)
        yield from (f"{place}: {name}" for name in missing)
    elif dataclasses.is_dataclass(value):
        named = {f.name for f in dataclasses.fields(value) if f.init}
        text = docstring
        yield from (
            f"{place}: {name}"
            for name in sorted(named)
            if not name.startswith("_") and not re.search(rf"\b{name}\b", text)
        )
    for name, method in _methods_of_ours(value).items():
        function = getattr(method, "__func__", method)
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        if hasattr(function, "__wrapped__"):
            continue
        if not function.__doc__ and not inspect.getdoc(getattr(value, name)):
            yield f"{place}.{name} has no docstring"
        elif function.__doc__ and not _is_explained_by_a_base(value, name):
            text = inspect.cleandoc(function.__doc__)
            yield from (f"{place}.{name}: {n}" for n in unnamed(function, text))


def _methods_of_ours(value):
    """The attributes of a class by name, with those of the bases that are ours."""
    ours = [b for b in value.__mro__ if b.__module__.startswith("opacus_pi")]
    return {n: found for b in reversed(ours) for n, found in vars(b).items()}


def _is_explained_by_a_base(value, name):
    """Whether a method overrides one of our own that explains every argument."""
    ours = [b for b in value.__mro__[1:] if b.__module__.startswith("opacus_pi")]
    methods = [
        getattr(vars(b)[name], "__func__", vars(b)[name])
        for b in ours
        if name in vars(b)
    ]
    docstrings = [inspect.cleandoc(method.__doc__ or "") for method in methods]
    return any(
        not unnamed(method, docstring)
        for method, docstring in zip(methods, docstrings, strict=True)
    )


@pytest.mark.parametrize("room", ROOMS)
def test_promised_names_are_documented(room):
    names = promised(room)
    assert len(names) == len(importlib.import_module(room).__all__)
    found = [p for name, value in names.items() for p in problems(name, value)]
    assert found == []


@pytest.mark.parametrize("room", ROOMS)
def test_packages_say_what_they_are_for(room):
    assert importlib.import_module(room).__doc__


def test_the_check_can_fail():
    def undocumented(x):
        return x

    def half(x, y):
        """Return the sum.

        Args:
            x: A summand.

        Returns:
            The sum.
        """
        return x + y

    assert list(problems("undocumented", undocumented)) == [
        "undocumented has no docstring"
    ]
    assert list(problems("half", half)) == ["half: y"]
