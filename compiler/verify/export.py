"""Running an emitted file where Headloom cannot be imported."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor

from ..emit import Code
from .apart import apart

_SCRIPT = """\
import importlib.util, sys
import torch

def run(path, name, state, x, given):
    spec = importlib.util.spec_from_file_location("exported", path)
    sys.modules["exported"] = exported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(exported)
    torch.set_default_dtype(torch.float64)  # a `const` keeps all its digits
    module = getattr(exported, name)().eval()
    torch.set_default_dtype(torch.float32)
    module.load_state_dict(state)
    with torch.no_grad():
        return module(x, **given)
"""


def exported_output(
    code: Code, state: dict[str, Tensor], x: Tensor, given: dict[str, Tensor]
) -> Tensor:
    """Return what the file computes in another process. Raises `RuntimeError` if it fails."""
    with tempfile.TemporaryDirectory(prefix="headloom-") as folder:
        path = Path(folder) / "exported.py"
        path.write_text(code.text, encoding="utf-8")
        result: Tensor = apart(
            _SCRIPT, path=str(path), name=code.name, state=dict(state), x=x, given=given
        )
        return result
