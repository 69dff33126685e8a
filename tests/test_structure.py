"""Functions stay small, and no function's body is there twice."""

import ast
import io
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("opacus_pi", "benchmarks", "tests")
LONGEST_FUNCTION = 50  # lines of code
FILES = {room: sorted((ROOT / room).rglob("*.py")) for room in ROOMS}
SHORTEST_COPY = 3  # lines from which two equal bodies are a copy

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(node):
    """All functions under a node, nested ones too."""
    return [n for n in ast.walk(node) if isinstance(n, Function)]


def lines_of_code(text):
    """Numbers of the lines that hold more than a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT}
    layout |= {tokenize.DEDENT, tokenize.ENDMARKER}
    code = [token for token in tokens if token.type not in layout]
    return {n for t in code for n in range(t.start[0], t.end[0] + 1)}


def body_of(function):
    """The statements after the docstring."""
    has_docstring = ast.get_docstring(function, clean=False) is not None
    return function.body[1:] if has_docstring else function.body


def own_lines(function, code):
    """Number of a function's own lines of code.

    Its docstring, functions inside it, comments and blank lines do not count.
    """
    lines = set(range(function.lineno, function.end_lineno + 1)) & code
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        lines -= set(range(docstring.lineno, docstring.end_lineno + 1))
    for inner in functions(function):
        if inner is not function:
            lines -= set(range(inner.lineno, inner.end_lineno + 1))
    return len(lines)


def too_long(text, limit):
    """The functions of one file that exceed the limit, with their sizes."""
    code = lines_of_code(text)
    sizes = {f.name: own_lines(f, code) for f in functions(ast.parse(text))}
    return {name: n for name, n in sizes.items() if n > limit}


def copies(texts):
    """Places of functions whose bodies are equal up to comments and layout."""
    places = defaultdict(list)
    for name, text in texts.items():
        for function in functions(ast.parse(text)):
            code = "\n".join(ast.unparse(part) for part in body_of(function))
            if code.count("\n") + 1 >= SHORTEST_COPY:
                places[code].append(f"{name}: {function.name}")
    return [found for found in places.values() if len(found) > 1]


def texts(room):
    return {str(p.relative_to(ROOT)): p.read_text("utf-8") for p in FILES[room]}


@pytest.mark.parametrize("room", ROOMS)
def test_functions_are_small(room):
    sources = texts(room).items()
    found = {name: too_long(text, LONGEST_FUNCTION) for name, text in sources}
    assert {name: sizes for name, sizes in found.items() if sizes} == {}


@pytest.mark.parametrize("room", ROOMS)
def test_no_body_is_there_twice(room):
    assert copies(texts(room)) == []


def test_the_checks_can_fail():
    body = "\n".join(f"    x = {i}" for i in range(9))
    one = f'def f(x):\n    """Sum."""\n{body}\n    return x\n'
    other = f"def g(x):\n    # a comment\n{body}\n\n    return x\n"
    assert too_long(one, 10) == {"f": 11}
    assert too_long(one, 11) == {}
    commented = one.replace("    x = 4", "    # why\n\n    x = 4")
    assert too_long(commented, 10) == {"f": 11}
    assert copies({"a": one, "b": other}) == [["a: f", "b: g"]]
    assert copies({"a": one, "b": one.replace("8", "9")}) == []
