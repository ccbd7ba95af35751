"""The README's blocks work as printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from headloom.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def blocks(kind: str) -> list[str]:
    return [text for each, text in BLOCKS if each == kind]


def write_specs(folder: Path) -> None:
    """Write every description under the name in its first line."""
    for text in blocks("loom"):
        name = re.match(r"# (\S+\.loom)", text)
        assert name, "a description in the README begins with its file's name"
        (folder / name[1]).write_text(text, encoding="utf-8")


def commands() -> list[str]:
    return [
        line.removeprefix("$ ").partition("  #")[0].strip()
        for text in blocks("console")
        for line in text.splitlines()
    ]


@pytest.mark.parametrize("line", commands())
def test_command(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_specs(tmp_path)
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(line)
    assert program == "headloom"
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_specs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for text in blocks("python"):
        script = tmp_path / "script.py"
        script.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_error(tmp_path: Path) -> None:
    (shown,) = blocks("text")
    (tmp_path / "gqa.loom").write_text("block a {\n  heads = 8\n  kv_heads = 3\n}\n")
    done = subprocess.run(
        [sys.executable, "-m", "headloom", "check", "gqa.loom"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert shown.strip() in done.stderr


def test_set_up_commands_are_those_that_ci_runs() -> None:
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    main_job, tests = (text.strip() for text in blocks("sh"))
    for part in (*main_job.split(" && "), *tests.split(" && ")):
        assert part.replace("pip install", "pip install --quiet") in run
