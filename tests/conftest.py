"""What every test needs: Triton's interpreter where there is no GPU, and golden files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # everything here is small, and runs side by side
os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is imported
sys.modules.setdefault("fla", None)  # or transformers takes its kernels for the layers we compare


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files anew")


def pytest_runtest_setup() -> None:
    if "triton.runtime.interpreter" in sys.modules:
        _hasten_interpreter()


@cache
def _hasten_interpreter() -> None:
    """Leave out what Triton's interpreter does over and over, to no effect: half of its time.

    Every call of a device function replaces the functions of the language again, which once a
    launch is enough. Sums are watched for overflow by an assertion that only `debug` acts on.
    """
    interpreter = sys.modules["triton.runtime.interpreter"]
    replace_functions: Callable[[Any], Any] = interpreter._patch_lang
    replaced: set[int] = set()

    def launched(kernel: Any) -> Any:
        replaced.clear()
        return replace_functions(kernel)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in replaced:
            replaced.add(id(self.fn.__globals__))
            replace_functions(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as problem:
            raise interpreter.InterpreterError(repr(problem)) from problem

    interpreter._patch_lang = launched
    interpreter.InterpretedFunction.__call__ = called
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """Return what compares a text with a golden file, or writes it."""

    def compare(path: Path, text: str) -> None:
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"run pytest --update-golden to make {path.name}"
        assert text == path.read_text(encoding="utf-8")

    return compare
