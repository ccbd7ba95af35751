"""The commands: what they print, and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from headloom.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"
WRONG = "block a {\n  heads = 8\n  kv_heads = 3\n  maks = causal\n}\n"


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    path = tmp_path / "wrong.loom"
    path.write_text(WRONG)
    return path


def test_new_writes_something_that_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("new", "mine").exit_code == 0
    assert run("check", "mine.loom").exit_code == 0
    again = run("new", "mine")
    assert again.exit_code == 2
    assert "exists already" in again.output
    assert run("new", "not a name").exit_code == 2


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.*oml")) + sorted(EXAMPLES.glob("*.yaml")))
def test_examples_check(path: Path) -> None:
    result = run("check", path)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "path", [*sorted(EXAMPLES.glob("*.loom")), *sorted(EXAMPLES.glob("models/*.loom"))]
)
def test_examples_are_formatted(path: Path) -> None:
    assert run("fmt", "--check", path).exit_code == 0


def test_check_reports_everything_and_exits_1(wrong: Path) -> None:
    result = run("check", wrong)
    assert result.exit_code == 1
    assert "did you mean `mask`?" in result.stderr
    result = run("check", wrong, "--json")
    answer = json.loads(result.stdout)
    assert answer["ok"] is False
    (found,) = [each for each in answer["diagnostics"] if each["code"] == "L202"]
    assert (found["line"], found["column"]) == (4, 3)


def test_check_reads_the_search_block(tmp_path: Path) -> None:
    path = tmp_path / "space.loom"
    path.write_text("search { model = nope; tsk = mqar; trials = 0 }")
    result = run("check", path, "--json")
    assert result.exit_code == 1
    codes = {each["code"] for each in json.loads(result.stdout)["diagnostics"]}
    assert {"L521", "L523"} <= codes


@pytest.mark.parametrize("name", ["gqa.loom", "search_mqar.loom"])
def test_check_is_fast_and_does_not_import_torch(name: str) -> None:
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "headloom",
        "check",
        str(EXAMPLES / name),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "headloom.compiler.checking.check" in imported
    assert not imported & {"torch", "triton", "numpy", "optuna", "networkx"}
    graphs = {"headloom.compiler.graph.graph", "headloom.compiler.pipeline", "rich"}
    assert not imported & graphs


def test_check_of_a_missing_file() -> None:
    result = run("check", "nowhere.loom")
    assert result.exit_code == 1
    assert "L001" in result.stderr


def test_wrong_usage_exits_2() -> None:
    assert run("check").exit_code == 2
    assert run("bild").exit_code == 2
    assert run("build", EXAMPLES / "gqa.loom", "--backend", "cuda").exit_code == 2
    assert run("verify", EXAMPLES / "gqa.loom", "--target", "sm_1").exit_code == 2


def test_fmt_converts_without_loss(tmp_path: Path) -> None:
    source = EXAMPLES / "gemma_like.loom"
    as_yaml = tmp_path / "a.yaml"
    as_yaml.write_text(run("fmt", source, "--to", "yaml").stdout)
    assert run("fmt", as_yaml, "--to", "loom").stdout == source.read_text()


def test_fmt_check_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.loom"
    path.write_text("block a{heads=4}")
    assert run("fmt", "--check", path).exit_code == 1
    assert path.read_text() == "block a{heads=4}"
    assert run("fmt", path).exit_code == 0
    assert run("fmt", "--check", path).exit_code == 0


def test_loom_and_yaml_build_the_same_module() -> None:
    one = run("build", f"{EXAMPLES / 'gemma_like.loom'}:tiny_gemma")
    two = run("build", f"{EXAMPLES / 'gemma_like.yaml'}:tiny_gemma")
    assert one.exit_code == two.exit_code == 0
    assert one.stdout == two.stdout
    assert "class TinyGemma" in one.stdout


@pytest.mark.parametrize("stage", ["syntax", "graph", "code", "kernels"])
def test_build_stops_after_a_stage(stage: str) -> None:
    result = run("build", EXAMPLES / "gqa.loom", "--emit", stage)
    assert result.exit_code == 0, result.output
    expected = {
        "syntax": "block gqa",
        "graph": "attend(q, k, v)",
        "code": "class Gqa",
        "kernels": "@triton.jit",
    }
    assert expected[stage] in result.stdout


def test_optimize_is_said_and_built(tmp_path: Path) -> None:
    path = tmp_path / "a.loom"
    path.write_text("block a { heads = 2; head_dim = 8; normalize = sigmoid }")
    assert "compiled_tile" in run("build", path, "--optimize", "max").stdout
    assert "compiled_tile" not in run("build", path).stdout
    assert "compiled by torch.compile" in run("explain", path, "--optimize", "max").stdout


def test_build_of_an_unknown_name() -> None:
    result = run("build", f"{EXAMPLES / 'gqa.loom'}:gqq")
    assert result.exit_code == 1
    assert "did you mean `gqa`?" in result.stderr


def test_build_to_an_unwritable_place() -> None:
    result = run("build", EXAMPLES / "gqa.loom", "-o", "/nowhere/at/all.py")
    assert result.exit_code == 1
    assert "no such file or directory" in result.output


def test_show() -> None:
    result = run("show", EXAMPLES / "gemma_like.loom:local")
    assert result.exit_code == 0, result.output
    assert "queries ↓ keys →" in result.stdout
    assert "attend(q, k, v)" in result.stdout
    answer = json.loads(run("show", EXAMPLES / "gemma_like.loom:tiny_gemma", "--json").stdout)
    layers = ["local", "local", "global"] * 2
    assert answer["layers"] == [f"pre({each}, swiglu)" for each in layers]


def test_explain() -> None:
    result = run("explain", EXAMPLES / "gemma_like.loom:local", "--backend", "torch")
    assert "local: tiles" in result.stdout
    assert "not sdpa: it has no score function" in result.stdout
    result = run("explain", EXAMPLES / "gemma_like.loom:local", "--backend", "triton")
    assert "local: triton" in result.stdout


def test_explain_a_code() -> None:
    result = run("explain", "L204")
    assert result.exit_code == 0
    assert "kv_heads" in result.stdout
    assert run("explain", "L999").exit_code == 2


@pytest.mark.slow
def test_verify_of_a_broken_module_exits_3(tmp_path: Path) -> None:
    source = EXAMPLES / "sliding_window.loom"
    text = run("build", source, "--backend", "torch").stdout
    path = tmp_path / "broken.py"
    broken = text.replace("(i - j).abs() < 32", "(i - j).abs() < 9")
    assert broken != text
    path.write_text(broken)
    result = run("verify", source, "--module", path, "--json")
    answer = json.loads(result.stdout)
    assert result.exit_code == 3
    failed = {each["check"]: each["note"] for each in answer["findings"] if each["ok"] is False}
    assert {"forward", "gradients"} <= failed.keys()
    assert "b=1 n=19" in failed["forward"]  # the smallest case in which the window matters


def test_doctor() -> None:
    result = run("doctor", "--json")
    names = {each["name"]: each["ok"] for each in json.loads(result.stdout)}
    assert names["python"] is True
    assert names["torch"] is True


def test_every_command_has_an_example_in_its_help() -> None:
    for name, command in main.commands.items():
        help_ = run(name, "--help").output
        assert "Example" in help_, name
        assert command.help
