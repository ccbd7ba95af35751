"""A wheel holds every subpackage and data file, and works where it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_COPIED = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "shared")
FOLDERS = ("grammar", "ops", "kernels", "compiler", "search", "bench", "export", "known")


def tree() -> set[str]:
    """The files that belong in the package."""
    found = {f"headloom/{path.name}" for path in ROOT.glob("*.py")} | {"headloom/py.typed"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".loom", ".lark", ".yaml"):
                found.add(f"headloom/{path.relative_to(ROOT).as_posix()}")
    found |= {f"headloom/zoo/{path.name}" for path in (ROOT / "examples" / "zoo").glob("*.loom")}
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy: what `build/` holds would go in, and two processes would meet there."""
    out = tmp_path_factory.mktemp("wheel")
    tree = tmp_path_factory.mktemp("tree") / "headloom"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_COPIED))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(out), str(tree)],
        check=True,
    )
    return next(out.glob("headloom-*.whl"))


@pytest.mark.slow
def test_wheel_holds_the_tree(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == tree()


@pytest.mark.slow
def test_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (tmp_path / "a.loom").write_text("block a { width = 32; heads = 4; mask = causal }\n")
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import headloom, torch\n"
        f"assert headloom.__file__.startswith({str(site)!r})\n"
        "y = headloom.compile(headloom.load('a.loom'))(torch.randn(1, 5, 32))\n"
        "assert y.shape == (1, 5, 32)\n"
        "from headloom.compiler import zoo\n"
        "assert 'sparsemax' in zoo.names() and zoo.entry('swin').what().heads == 4\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
