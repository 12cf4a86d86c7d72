"""Imports of the package point one way, it is quick to import, and it keeps a few promises that no run can show."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "dysigma"

# The house, from the ground up. A room is a file or a folder of the package. It imports from its own row and from rows
# below it (which stand above it here), never from a higher one.
FLOORS = (
    ("checks", "randomness", "devices", "parallel", "intervals", "images", "downloads", "pareto"),
    ("schedule", "bins", "models", "runs", "data"),
    ("objective", "weightings", "samplers", "exact", "floors", "distances", "foreign"),
    ("testing", "gradients", "sampling", "evaluation", "auditing"),
    ("training",),
    ("plots",),
    ("lab", "convergence"),
    ("course",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ROOMS = sorted(
    path.stem
    for path in PACKAGE.iterdir()
    if path.suffix == ".py" or (path / "__init__.py").exists()
)
SLOW_IMPORTS = {
    "PIL",
    "accelerate",
    "diffusers",
    "matplotlib",
    "pandas",
    "safetensors",
    "scipy",
    "seaborn",
    "tqdm",
    "torchjd",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def nodes_of(name: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(MODULES[name].read_text("utf-8"))))


def imported(
    name: str, nodes: Iterable[ast.AST], is_package: bool, known: set[str]
) -> Iterator[tuple[str, int]]:
    """(module, line) of every import of a known module, those inside functions too."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*base, *filter(None, [node.module])])
            # `from a import b` imports the module a.b where there is one, else a.
            named = [f"{whole}.{alias.name}" for alias in node.names]
            targets = [target if target in known else whole for target in named]
        else:
            continue
        for target in targets:
            if target in known:
                yield target, node.lineno


@functools.cache
def imports_of(name: str) -> list[tuple[str, int]]:
    found = imported(name, nodes_of(name), MODULES[name].name == "__init__.py", set(MODULES))
    return [(module, line) for module, line in found if module != name]


def test_the_reader_of_imports_sees_every_form():
    source = """
from . import a, __version__
from .b import x
from ..c.d import y
import p.e
def f():
    from p import g
"""
    known = {"p", "p.q.a", "p.q.b", "p.c.d", "p.e", "p.g"}
    found = imported("p.q.me", ast.walk(ast.parse(source)), False, known)
    assert {module for module, _ in found} == known - {"p"}


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".")])
def test_imports_point_one_way(name):
    room = name.split(".")[1]
    if room == "__main__":
        room = "cli"
    assert room in FLOOR_OF, f"give the room {room} a place in FLOORS"
    wrong = [
        f"{MODULES[name].relative_to(PACKAGE.parent)}:{line} imports {module}"
        for module, line in imports_of(name)
        if module.count(".") and FLOOR_OF[module.split(".")[1]] > FLOOR_OF[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_a_way_round():
    edges = {name: {module for module, _ in imports_of(name)} for name in MODULES}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_every_floor_names_rooms_that_exist():
    assert not set(FLOOR_OF) - set(ROOMS)


def calls(name: str) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every call; `x.y.item()` ends in ".item"."""
    for node in nodes_of(name):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


STEP = [name for name in MODULES if name.startswith(("dysigma.weightings.", "dysigma.objective"))]


@pytest.mark.parametrize("name", STEP)
def test_no_host_sync_in_a_training_step(name):
    found = [f"{name}:{line} {call}" for call, line in calls(name) if call.endswith(".item")]
    assert not found, found


@pytest.mark.parametrize("name", MODULES)
def test_no_number_is_repaired_in_silence_and_nothing_is_unpickled_freely(name):
    forbidden = ("nan_to_num", "nan_to_num_", "pickle.load", "pickle.loads", "torch.load")
    found = [f"{name}:{line} {call}" for call, line in calls(name) if call.endswith(forbidden)]
    assert not found, found


def test_importing_every_module_loads_nothing_slow():
    names = ", ".join(name for name in MODULES if not name.endswith("__main__"))
    code = f"""
import sys, torch
before = set(sys.modules)
import {names}
print(*set(sys.modules) - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert "dysigma" in loaded
    assert not loaded & SLOW_IMPORTS
