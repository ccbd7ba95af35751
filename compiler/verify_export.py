"""Running an emitted file where Headloom cannot be imported.

The text is written to a folder of its own and run by another interpreter that refuses the
import of `headloom`; what it computes comes back through a file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .emit import Code

_RUNNER = """\
import importlib.abc, importlib.util, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "headloom":
            raise ImportError("headloom must not be imported here")

sys.meta_path.insert(0, Refuse())
import torch

spec = importlib.util.spec_from_file_location("exported", sys.argv[1] + "/exported.py")
exported = importlib.util.module_from_spec(spec)
sys.modules["exported"] = exported
spec.loader.exec_module(exported)
given = torch.load(sys.argv[1] + "/given.pt", weights_only=True)
torch.set_default_dtype(torch.float64)  # a `const` keeps all its digits
module = getattr(exported, sys.argv[2])().eval()
torch.set_default_dtype(torch.float32)
module.load_state_dict(given["state"])
with torch.no_grad():
    torch.save(module(given["x"], **given["more"]), sys.argv[1] + "/result.pt")
"""


def exported_output(
    code: Code, state: dict[str, Tensor], x: Tensor, given: dict[str, Tensor]
) -> Tensor:
    """Return what the file computes in another process. Raises `RuntimeError` if it fails."""
    with tempfile.TemporaryDirectory(prefix="headloom-") as name:
        folder = Path(name)
        (folder / "exported.py").write_text(code.text, encoding="utf-8")
        (folder / "runner.py").write_text(_RUNNER, encoding="utf-8")
        torch.save({"state": state, "x": x, "more": given}, folder / "given.pt")
        done = subprocess.run(
            [sys.executable, "-W", "error", str(folder / "runner.py"), name, code.name],
            capture_output=True, text=True, cwd=name, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the exported file failed: {done.stderr.strip()[-2000:]}")
        result: Tensor = torch.load(folder / "result.pt", weights_only=True)
        return result
