"""The documents say what is true: every example runs, every name they owe is there."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from headloom.cli import main
from headloom.compiler.checking import codes as compiler_codes
from headloom.compiler.checking import inheritance, models
from headloom.compiler.checking.check import check
from headloom.compiler.checking.library import standard
from headloom.compiler.checking.names import MEANINGS, METHODS
from headloom.grammar import from_yaml
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.expr import evaluate
from headloom.grammar.functions import (
    FUNCTIONS,
    HOLES,
    MAP_FUNCTIONS,
    MIXER_FUNCTIONS,
    STATISTICS,
    VECTOR_FUNCTIONS,
)
from headloom.grammar.parse import parse, parse_expression
from headloom.grammar.syntax import (
    DEFINITION_KINDS,
    Block,
    Call,
    Definition,
    Expr,
    File,
    Name,
)
from headloom.known import codes as known_codes
from headloom.ops import OPS, UNNAMED
from headloom.search import codes as search_codes
from headloom.search import plan
from headloom.search.calls import known_of
from headloom.search.objectives import METRICS, STATIC
from headloom.search.plan import read_plan
from headloom.search.space import alternatives, has_holes, search_of
from headloom.search.tasks import TASKS
from headloom.search.training import Training

ROOT = Path(__file__).parent.parent
TEXTS = {
    name: (ROOT / "docs" / name).read_text(encoding="utf-8")
    for name in (
        "language.md",
        "python.md",
        "models.md",
        "known.md",
        "zoo.md",
        "export.md",
        "architecture.md",
    )
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"\b[LW]\d{3}\b")
LANGUAGE = TEXTS["language.md"]
CODES = compiler_codes.CODES | search_codes.CODES | known_codes.CODES


def blocks(*kinds: str) -> list[Any]:
    """Every fenced block of these kinds, as parameters named after document and line."""
    return [
        pytest.param(name, match[1], match[2], id=f"{name}:{text.count(chr(10), 0, match.start())}")
        for name, text in TEXTS.items()
        for match in BLOCK.finditer(text)
        if match[1] in kinds
    ]


def prose(text: str) -> str:
    """A document without its fenced blocks."""
    return BLOCK.sub("", text)


def spans(text: str) -> list[str]:
    """What stands in backticks outside of fenced blocks; `\\|` is the bar of a table."""
    return [each.replace("\\|", "|") for each in re.findall(r"`([^`\n]+)`", prose(text))]


def words(text: str) -> set[str]:
    return {word for each in spans(text) for word in re.findall(r"[A-Za-z_]\w*", each)}


def section(title: str) -> str:
    return LANGUAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of every table of a section, headers included."""
    return [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in section(title).splitlines()
        if line.startswith("|")
    ]


def understood(form: str, text: str) -> set[str]:
    """The codes of all that a complete text is told, of its alternatives and its search too."""
    try:
        file = from_yaml.parse_yaml(text) if form == "yaml" else parse(text)
        found = {
            each.code
            for plain in (alternatives(file) if has_holes(file) else [file])
            for each in check(plain).warnings
        }
        if search_of(file) is not None:
            read_plan(file)
    except LoomError as problem:
        return {each.code for each in problem.diagnostics}
    return found


# ── examples ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("document", "form", "text"), blocks("loom", "yaml"))
def test_description(document: str, form: str, text: str) -> None:
    marked = re.match(r"# (?:error|warning): (\w+)\n", text)
    assert understood(form, text) == ({marked[1]} if marked else set()), document


def write_specs(document: str, folder: Path) -> None:
    """Write the document's descriptions that have a file's name in their first line."""
    for param in blocks("loom", "yaml"):
        of, form, text = param.values
        if of == document and (name := re.match(rf"# (\S+\.{form})\n", text)):
            (folder / name[1]).write_text(text, encoding="utf-8")


def commands() -> list[Any]:
    return [
        pytest.param(document, line.removeprefix("$ ").partition("  #")[0].strip(), id=line)
        for document, _, text in (each.values for each in blocks("console"))
        for line in text.splitlines()
    ]


@pytest.mark.parametrize(("document", "line"), commands())
def test_command(document: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_specs(document, tmp_path)
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(line)
    assert program == "headloom"
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(("document", "form", "text"), blocks("python"))
def test_python(
    document: str, form: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_specs(document, tmp_path)
    script = tmp_path / f"script.{form[:2]}"
    script.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # for what an example writes and imports
    runpy.run_path(str(script))


# ── names ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("document", TEXTS)
def test_codes_exist(document: str) -> None:
    assert set(CODE.findall(TEXTS[document])) <= set(CODES)


@pytest.mark.parametrize("document", TEXTS)
def test_paths_exist(document: str) -> None:
    ours = re.compile(r"(?:[\w.]+/)+(?:[\w.]+)?|[\w]+\.py")
    paths = [each for each in spans(TEXTS[document]) if ours.fullmatch(each)]
    assert [each for each in paths if not (ROOT / each).exists()] == []
    assert len(paths) > 30 or document != "architecture.md"


def test_every_model_has_a_row() -> None:
    shown = re.findall(r"^\| `(examples/models/\w+\.loom)` \|", TEXTS["models.md"], re.M)
    there = (each.relative_to(ROOT).as_posix() for each in ROOT.glob("examples/models/*.loom"))
    assert sorted(shown) == sorted(there)


def test_links_lead_somewhere() -> None:
    titles = {each.lower().replace(" ", "-") for each in re.findall(r"^## (.+)$", LANGUAGE, re.M)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", LANGUAGE)) == titles


@pytest.mark.parametrize(
    "owed",
    [inheritance.SETTINGS, models.SETTINGS, plan.SETTINGS, plan.SAMPLERS, OPS.keys() - UNNAMED,
     FUNCTIONS, VECTOR_FUNCTIONS, MAP_FUNCTIONS, STATISTICS, METHODS, HOLES,
     STATIC, METRICS, TASKS, MEANINGS, from_yaml.GROUPS,
     from_yaml.meant("block"), DEFINITION_KINDS, {each.name for each in fields(Training)}],
    ids=["block settings", "model settings", "search settings", "samplers", "stages", "functions",
         "functions of vectors", "functions of the map", "numbers of rows", "methods", "holes",
         "static goals", "metrics", "tasks", "meanings",
         "yaml groups", "yaml keys", "kinds", "training"],
)  # fmt: skip
def test_language_mentions(owed: Iterable[str]) -> None:
    assert set(owed) - words(LANGUAGE) == set()


def test_the_standard_library_is_shown_as_it_is() -> None:
    shown: dict[tuple[str, str], Definition | Block] = {}
    for _, form, text in (each.values for each in blocks("loom")):
        file: File = parse(text) if form == "loom" and "# error: L1" not in text else File(())
        for item in file.items:
            if isinstance(item, Definition | Block):
                shown.setdefault((item.kind, item.name), item)
    assert [each for each in standard() if shown.get((each.kind, each.name)) != each] == []


# ── tables ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("title", "settings"), [("Blocks", inheritance.SETTINGS), ("Models", models.SETTINGS)]
)
def test_defaults_of_settings(title: str, settings: dict[str, str]) -> None:
    shown = {
        name: default.strip("`")
        for names, _, default in rows(title)
        for name in re.findall(r"`(\w+)`", names)
    }
    assert set(shown) == set(settings)
    wrong = {
        name: (shown[name], text)
        for name, text in settings.items()
        if text and parse_expression(shown[name]) != parse_expression(text)
    }
    assert wrong == {}


def signature(text: str) -> tuple[str, dict[str, object]]:
    """`linear(features, bias = false)` as its name and what stands for each argument."""
    call = parse_expression(text)
    if isinstance(call, Name):
        return call.id, {}
    assert isinstance(call, Call)
    plain = {each.id: None for each in call.args if isinstance(each, Name)}
    return call.function, plain | {each.name: plainly(each.value) for each in call.keywords}


def plainly(expr: Expr) -> object:
    is_word = isinstance(expr, Name) and expr.id not in ("true", "false")
    return expr.id if is_word and isinstance(expr, Name) else evaluate(expr, {})


def test_stages_take_these_arguments() -> None:
    cells = [row[0] for row in rows("Streams and stages") if len(row) == 3]
    shown = dict(signature(each) for cell in cells for each in re.findall(r"`([^`]+)`", cell))
    for name, op in OPS.items():
        if name not in UNNAMED:
            assert shown[name] == {each.name: each.default for each in op.options}, name


def test_functions_take_as_many_arguments() -> None:
    calls = [each for each in spans(section("Expressions")) if re.match(r"(?!f\()\w+\(", each)]
    arities = {name: function.arity for name, function in FUNCTIONS.items()} | VECTOR_FUNCTIONS
    shown = dict(map(signature, calls))
    assert {name: len(arguments) for name, arguments in shown.items()} == arities


def test_functions_of_mixers_take_as_many_arguments() -> None:
    calls = [
        each for row in rows("Recurrent mixers") for each in re.findall(r"`(\w+\([^`]*\))`", row[0])
    ]
    arities = {name: len(arguments) for name, arguments in map(signature, calls)}
    assert arities == VECTOR_FUNCTIONS | MIXER_FUNCTIONS


@pytest.mark.parametrize(
    ("title", "functions"), [("The whole map", MAP_FUNCTIONS), ("Rows and columns", STATISTICS)]
)
def test_functions_of_the_map_take_as_many_arguments(title: str, functions: dict[str, int]) -> None:
    calls = [each for row in rows(title) for each in re.findall(r"`(\w+\([^`…]*\))`", row[0])]
    arities = {name: len(arguments) for name, arguments in map(signature, calls)}
    assert arities == functions


def options(text: str) -> dict[str, object]:
    """`lr = 1e-3` in backticks, wherever it stands, as names and values."""
    found = {}
    for each in spans(text):
        name, equals, value = each.partition(" = ")
        if equals and name.isidentifier():
            found[name] = plainly(parse_expression(value))
    return found


def test_options_of_training() -> None:
    (line,) = [each for each in section("Search").splitlines() if each.startswith("Options of")]
    known = known_of(Training, leave=["seed"])
    assert options(line) == known


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_arguments_of_tasks(task: Callable[..., Any]) -> None:
    (text,) = [each for each in spans(section("Search")) if each.startswith(f"{task.__name__}(")]
    _, shown = signature(text)
    known = known_of(task)
    assert shown.keys() == known.keys()
    assert all(shown[name] in (None, known[name]) for name in known)
