"""Imports point one way, from the commands down to the grammar; there are no cycles.

cli → {search, bench, export, known} → compiler → {ops, kernels} → grammar
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

from headloom.compiler.pieces import FILES

ROOT = Path(__file__).parent.parent
FOLDERS = ("grammar", "ops", "kernels", "compiler", "search", "bench", "export", "known")
MAY_IMPORT = {
    "grammar": {"grammar"},
    "ops": {"ops", "grammar"},
    "kernels": {"kernels", "grammar"},
    "compiler": {"compiler", "ops", "kernels", "grammar"},
    "search": {"search", "compiler", "ops", "grammar"},
    "bench": {"bench", "compiler", "grammar"},
    "export": {"export", "compiler", "grammar"},
    "known": {"known", "compiler", "grammar"},
}
ROOMS = (
    "algebra",
    "graph",
    "facts",
    "checking",
    "plan",
    "pieces",
    "text",
    "lowerings",
    "emit",
)  # fmt: skip  each after its needs
DOORS = ("meaning", "reports", "verify")  # and the modules of compiler/ itself: on top of these


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name within the package."""
    found = {path.stem: path for path in (ROOT / "cli.py",)}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def imports(name: str, path: Path) -> set[str]:
    """The modules of ours that a module imports, at its top or inside functions."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{target}.{alias.name}".strip(".")
                found.add(inner if inner in modules() else target)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
            assert not any(each.split(".")[0] == "headloom" for each in names), (
                f"{name} imports headloom by name; imports of ours are relative"
            )
    return found - {name, ""}


def test_arrows_point_one_way() -> None:
    for name, path in modules().items():
        folder = name.split(".")[0]
        if folder in MAY_IMPORT:
            wrong = {
                each for each in imports(name, path) if each.split(".")[0] not in MAY_IMPORT[folder]
            }
            assert not wrong, f"{name} must not import {wrong}"


def test_rooms_of_the_compiler_stand_in_order() -> None:
    for name, path in modules().items():
        folder, _, rest = name.partition(".")
        room = rest.partition(".")[0]
        if folder == "compiler" and room in ROOMS:
            allowed = {"model", *ROOMS[: ROOMS.index(room) + 1]}
            rooms = {
                each.split(".")[1] for each in imports(name, path) if each.startswith("compiler.")
            }
            assert rooms <= allowed, f"{name} must not import {rooms - allowed}"


def test_there_are_no_cycles() -> None:
    graph = nx.DiGraph(
        (name, each)
        for name, path in modules().items()
        for each in imports(name, path)
        if path.name != "__init__.py"
    )
    assert list(nx.simple_cycles(graph)) == []


def test_nothing_of_ours_hides_behind_type_checking() -> None:
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                hidden = [
                    each
                    for each in ast.walk(node)
                    if isinstance(each, ast.ImportFrom) and each.level
                ]
                assert not hidden, name


@pytest.mark.parametrize(
    "module",
    ["headloom", "headloom.cli", "headloom.compiler.checking.check", "headloom.compiler.facts.cost",
     "headloom.kernels.render", "headloom.search.space"],
)  # fmt: skip
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_piece_may_be_copied() -> None:
    found = {path.stem for path in (ROOT / "compiler" / "pieces").glob("*.py")} - {"__init__"}
    assert sorted(FILES) == sorted(found)


def test_the_project_speaks_of_itself_alone() -> None:
    """No machine paths in what is published."""
    for path in ROOT.rglob("*.py"):
        if any(part.startswith(".") or part in ("build", "runs") for part in path.parts):
            continue
        text = path.read_text()
        assert "/wo" + "rk/" not in text, path
        assert "/tm" + "p/" not in text, path
