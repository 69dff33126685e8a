"""Imports point one way, and neither files nor rooms import each other in a circle.

A room is a package or a top-level module of ``opacus_pi``, or of ``benchmarks``. The
checks read the syntax tree of every file; nothing is imported.
"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "opacus_pi"
BENCHMARKS = PACKAGE.parent / "benchmarks"

LAYER = {
    "_types": 0,
    "_validate": 0,
    "_printable": 0,
    "_quiet": 0,
    "_errors": 0,
    "_frames": 0,
    "_promised": 0,
    "_shown": 0,
    "_class_swap": 0,
    "_torch_compat": 0,
    "files": 0,
    "ledger": 0,
    "accounting": 0,
    "difficulty": 0,
    "forget_sets": 0,
    "models": 1,
    "gradients": 1,
    "recording": 2,
    "attribution": 2,
    "custody": 2,
    "integration": 3,
    "compatible": 3,
    "symmetries": 4,
    "evaluation": 4,
    "unlearning": 4,
    "plotting": 5,
    "report": 5,
    "cli": 5,
    "__main__": 5,
    "": 5,  # opacus_pi/__init__.py, which only gathers the public names
}
# the only room in which a third-party package may be imported
ONLY_ROOM = {"opacus": "integration", "lightning": "integration"}
# the lowest layer in which a third-party package may be imported
FLOOR = {
    "torch": 1,
    "pandas": 0,
    "torchvision": 5,
    "tqdm": 1,
    "sklearn": 4,
    "optuna": 4,
    "matplotlib": 5,
    "opacus": 3,
    "lightning": 3,
}
# files of a room that need a package from above the room's floor
ABOVE_THE_FLOOR = {
    "_torch_compat.py": {"torch"},
    "files/weights_file.py": {"torch"},
    "files/checksummed_state.py": {"torch"},
    "files/state_dict_file.py": {"torch"},
    "files/torch_file.py": {"torch"},
}
FILES = sorted(PACKAGE.rglob("*.py"))
BENCHMARK_FILES = sorted(BENCHMARKS.rglob("*.py"))


def room(path: Path) -> str:
    """The top-level module of the package that a file belongs to."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts[0] == "__init__" else parts[0]


def imported(path: Path):
    """Every module a file imports, as (dotted name, line)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module, node.lineno
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def dotted(path: Path, package: Path) -> str:
    """A file's module name within its package; the package's own is empty."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph(files, package=PACKAGE):
    """Which files of its package each file imports, by module name."""
    modules = {dotted(path, package) for path in files}
    edges = {}
    for path in files:
        names = {n.removeprefix(f"{package.name}.") for n, _ in imported(path)}
        mine = dotted(path, package)
        edges[mine] = (names & modules) - {mine}
    return edges


def circles(edges):
    """Sets of nodes that reach each other, in order of name (Tarjan's algorithm)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            members = stack[at:]
            del stack[at:]
            if len(members) > 1:
                found.append(sorted(members))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def between_rooms(edges):
    """The edges of files, as edges of the rooms that they are in."""
    rooms = defaultdict(set)
    for name, others in edges.items():
        mine = name.split(".")[0]
        rooms[mine] |= {o.split(".")[0] for o in others} - {mine}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    layer = LAYER[room(path)]
    allowed = ABOVE_THE_FLOOR.get(path.relative_to(PACKAGE).as_posix(), ())
    for name, line in imported(path):
        root, *rest = name.split(".")
        where = f"{path.name}:{line} imports {name}"
        if root == "opacus_pi" and rest and rest[0] in LAYER:
            assert LAYER[rest[0]] <= layer, where
        assert layer >= FLOOR.get(root, 0) or root in allowed, where
        assert room(path) == ONLY_ROOM.get(root, room(path)), where
        assert root not in {"benchmarks", "tests"}, where


def test_no_circle_of_files():
    edges = graph(FILES)
    assert len(edges) > 100 and sum(map(len, edges.values())) > 300
    assert circles(edges) == []


def test_no_circle_of_rooms():
    rooms = between_rooms(graph(FILES))
    assert set(rooms) == set(LAYER)
    assert circles(rooms) == []


def test_no_circle_of_benchmarks():
    edges = graph(BENCHMARK_FILES, BENCHMARKS)
    assert len(edges) > 50 and sum(map(len, edges.values())) > 100
    assert circles(edges) == []
    rooms = between_rooms(edges)
    assert {"common", "overhead", "reproduce", "main_job"} <= set(rooms)
    assert circles(rooms) == [] and not rooms["common"]


def test_only_files_knows_safetensors():
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in FILES
        for name, _ in imported(path)
        if name.split(".")[0] == "safetensors"
    }
    assert users == {"files"}


def test_the_checks_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import opacus.optimizers\nfrom opacus_pi import accounting\n")
    assert [n for n, _ in imported(bad)] == [
        "opacus.optimizers",
        "opacus_pi",
        "opacus_pi.accounting",
    ]
    acyclic_files = {"a.x": {"b.x"}, "b.x": set(), "b.y": {"a.y"}, "a.y": set()}
    assert circles(acyclic_files) == []
    assert circles(between_rooms(acyclic_files)) == [["a", "b"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def test_evaluation_and_unlearning_do_not_know_each_other():
    for path in (PACKAGE / "evaluation").glob("*.py"):
        assert not [n for n, _ in imported(path) if "opacus_pi.unlearning" in n]
    for path in (PACKAGE / "unlearning").rglob("*.py"):
        metrics = {n for n, _ in imported(path) if "opacus_pi.evaluation" in n}
        assert all(".trace" in n for n in metrics), path
