"""Running an emitted file where Headloom cannot be imported.

The text is written to a folder of its own and run by another interpreter that refuses the
import of `headloom`; what it computes comes back through a file. That interpreter stays for
the files that follow: importing PyTorch takes longer than running any of them.
"""

from __future__ import annotations

import atexit
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..emit import Code

_RUNNER = """\
import importlib.abc, importlib.util, sys, traceback

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "headloom":
            raise ImportError("headloom must not be imported here")

sys.meta_path.insert(0, Refuse())
answers, sys.stdout = sys.stdout, sys.stderr
import torch

def run(folder, name):
    spec = importlib.util.spec_from_file_location("exported", folder + "/exported.py")
    exported = importlib.util.module_from_spec(spec)
    sys.modules["exported"] = exported
    spec.loader.exec_module(exported)
    given = torch.load(folder + "/given.pt", weights_only=True)
    torch.set_default_dtype(torch.float64)  # a `const` keeps all its digits
    module = getattr(exported, name)().eval()
    torch.set_default_dtype(torch.float32)
    module.load_state_dict(given["state"])
    with torch.no_grad():
        torch.save(module(given["x"], **given["more"]), folder + "/result.pt")

for line in sys.stdin:
    folder, name = line.rstrip("\\n").split("\\t")
    try:
        run(folder, name)
    except BaseException:
        with open(folder + "/problem.txt", "w", encoding="utf-8") as file:
            traceback.print_exc(file=file)
    torch.set_default_dtype(torch.float32)
    print("done", file=answers, flush=True)
"""


def exported_output(
    code: Code, state: dict[str, Tensor], x: Tensor, given: dict[str, Tensor]
) -> Tensor:
    """Return what the file computes in another process. Raises `RuntimeError` if it fails."""
    with tempfile.TemporaryDirectory(prefix="headloom-") as name:
        folder = Path(name)
        (folder / "exported.py").write_text(code.text, encoding="utf-8")
        torch.save({"state": state, "x": x, "more": given}, folder / "given.pt")
        _run(folder, code.name)
        result: Tensor = torch.load(folder / "result.pt", weights_only=True)
        return result


def _run(folder: Path, name: str) -> None:
    runner = _runner()
    assert runner.stdin is not None
    assert runner.stdout is not None
    try:
        runner.stdin.write(f"{folder}\t{name}\n")
        runner.stdin.flush()
        answered = runner.stdout.readline() != ""
    except BrokenPipeError:
        answered = False
    if not answered:
        _runner.cache_clear()
        raise RuntimeError(f"the exported file ended its process, with {runner.wait()}")
    problem = folder / "problem.txt"
    if problem.is_file():
        text = problem.read_text(encoding="utf-8").strip()
        raise RuntimeError(f"the exported file failed: {text[-2000:]}")


@cache
def _runner() -> subprocess.Popen[str]:
    """Start the other interpreter; it ends when its input does, with this process."""
    runner = subprocess.Popen(
        [sys.executable, "-P", "-W", "error", "-c", _RUNNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        cwd=tempfile.gettempdir(),
    )
    atexit.register(_end, runner)
    return runner


def _end(runner: subprocess.Popen[str]) -> None:
    with runner:
        pass
