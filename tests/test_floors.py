"""The floors of the house: a module imports only what lies below it, imports inside functions and for typing included.

import-linter has such contracts, but knows packages only, not scripts at the root; so the same check stands here.
"""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

from base.files import ROOT

# From the ground up. Modules and rooms of one line do not import each other, but for the files inside a room.
FLOORS = [
    {"base"},
    {"configurator", "tokenizer"},
    {"model", "corpus", "report"},
    {"data", "optim"},
    {"engine"},
    {"variants"},
    {"kernels"},
    {"safety", "forecast"},
    {"sample"},
    {"evaluate"},
    {"train", "prepare_data", "export"},
    {"measure"},
    {"bench"},
]
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}
WITHOUT_TORCH = {"base", "configurator", "tokenizer", "corpus", "report", "prepare_data"}


def modules() -> dict[str, Path]:
    """{"engine.run": its file, …} of the product."""
    rooms = [p.parent for p in ROOT.glob("*/__init__.py") if p.parent.name not in ("config", "tests")]
    files = [*ROOT.glob("*.py"), *(p for room in rooms for p in room.rglob("*.py"))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """What a module imports: modules of ours by their full name, others by their first word."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively: name the room"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {i if i in known else node.module for i in inner}
    return {i if i in known else i.partition(".")[0] for i in found}


MODULES = modules()
IMPORTS = {name: imports(name, path, MODULES) for name, path in MODULES.items()}


def test_every_module_has_a_floor():
    assert {name.partition(".")[0] for name in MODULES} == HEIGHT.keys()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_lies_below_it(name):
    room = name.partition(".")[0]
    above = [
        i for i in IMPORTS[name] if (there := i.partition(".")[0]) in HEIGHT and there != room and HEIGHT[there] >= HEIGHT[room]
    ]
    assert not above


def test_there_is_no_circle():
    graphlib.TopologicalSorter({name: found & MODULES.keys() for name, found in IMPORTS.items()}).prepare()


def test_the_ground_floor_needs_the_standard_library_alone():
    """And filelock, which torch brings along, for the one lock."""
    outside = {i for name, found in IMPORTS.items() if name.startswith("base") for i in found if not i.startswith("base")}
    assert outside - sys.stdlib_module_names == {"filelock"}


def test_what_prepares_data_and_reports_never_imports_torch():
    """It takes seconds, and 200 MB for each core's worker. By no way: what they import of ours does not either."""
    reached = {name for name in MODULES if name.partition(".")[0] in WITHOUT_TORCH}
    while further := {i for name in reached for i in IMPORTS[name] & MODULES.keys()} - reached:
        reached |= further
    assert [name for name in reached if "torch" in IMPORTS[name]] == []


def test_the_root_stays_readable():
    """At most twelve scripts of together 2,700 lines; no file above 520 lines, no function above 70."""
    scripts = [path for name, path in MODULES.items() if path.parent == ROOT]
    assert len(scripts) <= 12
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in scripts) <= 2700
    for path in MODULES.values():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 520, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 70, f"{path}: {node.name}"
