"""Running Python where Headloom cannot be imported.

A script is run by another interpreter, in a folder elsewhere, which refuses the import of
`headloom`; what it is given and returns goes through files. That interpreter has imported
PyTorch and nothing else, and stays; every script runs in a process of its own that is split
from it, and finds nothing that another has left behind.
"""

from __future__ import annotations

import atexit
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

_RUNNER = """\
import importlib.abc, os, sys, traceback, warnings

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "headloom":
            raise ImportError("headloom must not be imported here")

sys.meta_path.insert(0, Refuse())
answers, sys.stdout = sys.stdout, sys.stderr
import torch
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

def run(folder):
    with open(folder + "/script.py", encoding="utf-8") as file:
        space = {"__name__": "script"}
        exec(compile(file.read(), folder + "/script.py", "exec"), space)
    given = torch.load(folder + "/given.pt", weights_only=True)
    torch.save(space["run"](**given), folder + "/result.pt")

def guarded(folder):
    try:
        run(folder)
    except BaseException:
        with open(folder + "/problem.txt", "w", encoding="utf-8") as file:
            traceback.print_exc(file=file)

for line in sys.stdin:
    folder, status = line.rstrip("\\n"), 0
    if hasattr(os, "fork"):
        child = os.fork()
        if not child:
            guarded(folder)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    else:
        guarded(folder)
    print(status, file=answers, flush=True)
"""


def apart(script: str, **given: Any) -> Any:
    """Return what `run(**given)` of a script returns: tensors, numbers, lists and dicts of them.

    Raises `RuntimeError` where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="headloom-") as name:
        folder = Path(name)
        (folder / "script.py").write_text(script, encoding="utf-8")
        torch.save(given, folder / "given.pt")
        _run(folder)
        return torch.load(folder / "result.pt", weights_only=True)


def _run(folder: Path) -> None:
    runner = _runner()
    assert runner.stdin is not None
    assert runner.stdout is not None
    try:
        runner.stdin.write(f"{folder}\n")
        runner.stdin.flush()
        answer = runner.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        _runner.cache_clear()
        raise RuntimeError(f"the exported file ended its process, with {runner.wait()}")
    if answer.strip() != "0":
        raise RuntimeError(f"the exported file ended its process, with {answer.strip()}")
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
