"""The emitted files as texts: goldens, and what holds of each of them."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from headloom.compiler.checking.check import check, find
from headloom.compiler.model import Block
from headloom.compiler.pieces import FILES
from headloom.compiler.pipeline import generate
from headloom.compiler.plan.plan import Target
from headloom.compiler.text.lines import WIDTH, wrap
from headloom.compiler.text.text import class_name, ident, names_read, pieces
from headloom.grammar.parse import parse

from .battery import EXAMPLES, SETTINGS, block
from .test_compile import MODELS, model

HERE = Path(__file__).parent
TORCH = Target("torch")
RUFF = Path(sys.executable).parent / "ruff"


def texts() -> dict[str, str]:
    """Return every emitted text there is to look at, by a file's name."""
    found = {name: generate(block(name), TORCH).text for name in SETTINGS}
    found |= {f"model_{name}": generate(model(name), TORCH).text for name in MODELS}
    for path in EXAMPLES:
        arch = check(parse(path.read_text()))
        for what in (*arch.blocks.values(), *arch.models.values()):
            kind = "block" if isinstance(what, Block) else "model"
            found[f"{path.stem}_{kind}_{what.name}"] = generate(what, TORCH).text
    return found


TEXTS = texts()


@pytest.mark.parametrize("name", ["gqa", "gated_delta", "cross"])
def test_an_example_is_emitted_as_the_golden(name: str, golden: Callable[[Path, str], None]):
    arch = check(parse((HERE.parents[1] / "examples" / f"{name}.loom").read_text()))
    (what,) = arch.blocks.values()
    golden(HERE / "golden" / f"{name}.txt", generate(what, TORCH).text)


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_stands_alone_and_is_pleasant_to_read(name):
    text = TEXTS[name]
    long = [line for line in text.splitlines() if len(line) > WIDTH]
    assert not long
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert text.endswith("\n")
    assert "fmt: skip" not in text
    imported = {
        alias.name.partition(".")[0] if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported <= {"torch", "math", "collections.abc", "copy", "typing"}


@pytest.mark.skipif(not (RUFF.exists() or shutil.which("ruff")), reason="ruff is not installed")
def test_no_text_has_unused_or_unknown_names(tmp_path):
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.py").write_text(text)
    ruff = str(RUFF) if RUFF.exists() else "ruff"
    command = [
        ruff,
        "check",
        "--isolated",
        "--no-cache",
        "--line-length",
        "100",
        "--select",
        "F,E9,E501",
        "--output-format",
        "concise",
        str(tmp_path),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize(
    ("score", "why"),
    [
        ("s - max_keys(s)", "`max_keys` looks at other pairs"),
        ("s + norm(w[h])", "its expressions read vectors"),
    ],
)
def test_what_flex_attention_cannot_say_is_an_obstacle(score, why):
    text = "block b { width = 16; heads = 2; mask = causal; param w[heads, head_dim] = 1; "
    what = find(check(parse(f"{text} score = {score} }}")), "b")
    with pytest.raises(ValueError, match=why):
        generate(what, Target("torch", lowering="flex"))


def test_names_are_those_that_a_text_reads():
    text = """
    def f(a: A, b=B) -> C:
        def g(): return outer + a
        return [each.field for each in g(key=value) if f"{shown}"]
    x.part, y = f(z), 'quoted'  # said
    """
    read = {"A", "B", "C", "outer", "a", "each", "g", "value", "shown", "x", "f", "z"}
    assert names_read([textwrap.dedent(text)]) == read


def test_pieces_are_what_their_files_define():
    found = {}
    for file in FILES:
        text = (HERE.parents[1] / "compiler" / "pieces" / f"{file}.py").read_text()
        for node in ast.parse(text).body:
            name = getattr(node, "name", None) or next(
                (each.id for each in ast.walk(node) if isinstance(each, ast.Name)), ""
            )
            if not isinstance(node, ast.Expr | ast.Import | ast.ImportFrom):
                found[name] = ast.dump(node)
    assert {name: ast.dump(ast.parse(text).body[0]) for name, text in pieces().items()} == found
    assert list(pieces()) == list(found)


def test_a_text_is_the_same_every_time():
    for name in ("alibi", "delta", "cross_bias"):
        assert generate(block(name), TORCH) == generate(block(name), TORCH)


def test_a_long_statement_is_broken_and_means_the_same():
    left = " + ".join(f"alpha_{at} * beta_{at}" for at in range(8))
    lines = [
        f"    value = ({left}).squeeze(-2) / torch.exp({left})  # [b, n]",
        f"    return function({left}, {left}, last)",
        "    short = 1",
    ]
    broken = wrap(lines)
    assert max(map(len, broken)) <= WIDTH
    assert broken[0] == "    # [b, n]"
    assert broken[-1] == "    short = 1"
    before, after = ("def f():\n" + "\n".join(each) for each in (lines, broken))
    assert ast.dump(ast.parse(before)) == ast.dump(ast.parse(after))


@pytest.mark.parametrize(("name", "variable"), [
    ("gate", "gate"), ("x", "x"), ("lambda", "lambda_"), ("s", "s_"), ("rope", "rope_"),
    ("k.1", "k__1"), ("t_i", "t_i_"), ("range", "range_"), ("s_", "s__"), ("copy", "copy_"),
])  # fmt: skip
def test_variables_stay_away_from_the_texts_own(name, variable):
    assert ident(name) == variable


@pytest.mark.parametrize(("name", "made"), [
    ("tiny_gemma", "TinyGemma"), ("none", "NoneBlock"), ("tensor", "TensorBlock"),
    ("_", "Block"), ("any", "AnyBlock"),
])  # fmt: skip
def test_classes_stay_away_from_the_texts_own(name, made):
    assert class_name(name) == made
