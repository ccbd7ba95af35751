"""What every test needs: Triton's interpreter where there is no GPU, and golden files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # everything here is small, and runs side by side
os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is imported
sys.modules.setdefault("fla", None)  # or transformers takes its kernels for the layers we compare


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files anew")


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
