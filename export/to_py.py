"""One file of Python, its weights beside it: what `headloom build` writes, ready to be used.

made/model.py             the text, which needs torch alone
made/model.safetensors    the weights
made/README.md            how to load them
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..compiler.verify.verify import Finding
from .checking import decoded, decoding, forward, forwarded
from .place import write_text, writing
from .readme import fenced, readme
from .request import Request

OPTIONS: frozenset[str] = frozenset()
TEXT, WEIGHTS = "model.py", "model.safetensors"

# What runs apart: it loads the folder as its README says, and makes every call.
_LOAD = """\
import importlib.util, sys
import torch
from safetensors.torch import load_model

def load(folder, name, dtype):
    spec = importlib.util.spec_from_file_location("model", folder + "/model.py")
    sys.modules["model"] = file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(file)
    wide = dtype == "float64"
    torch.set_default_dtype(torch.float64 if wide else torch.float32)
    module = getattr(file, name)().to(getattr(torch, dtype)).eval()
    torch.set_default_dtype(torch.float32)
    load_model(module, folder + "/model.safetensors")
    return module
"""

_FORWARD = """\
def run(folder, name, dtype, calls):
    module = load(folder, name, dtype)
    with torch.no_grad():
        return [module(x, **given) for x, given in calls]
"""

_DECODE = """\
def run(folder, name, dtype, calls):
    module, made = load(folder, name, dtype), []
    with torch.no_grad():
        for batch, length, parts in calls:
            cache = module.init_cache(batch, length)
            made.append([module(x, cache=cache, **given) for x, given in parts])
    return made
"""


def obstacles(request: Request) -> Sequence[str]:  # noqa: ARG001  every target is asked
    """Say what cannot be exported: everything that is compiled can."""
    return ()


def write(request: Request, folder: Path) -> None:
    """Write the text, the weights and how to load them."""
    from safetensors.torch import save_model

    write_text(folder / TEXT, request.code.text)
    size = sum(each.nbytes for each in request.module.state_dict().values())
    with writing(folder / WEIGHTS, size) as path:
        save_model(request.module, str(path))
    write_text(folder / "README.md", _readme(request))


def check(request: Request, folder: Path) -> Iterator[Finding]:
    """Load the folder with torch and safetensors alone, call it, decode with it."""
    given = {"folder": str(folder), "name": request.code.name, "dtype": request.dtype_name}
    yield forwarded(request, forward(request), _LOAD + _FORWARD, given)
    yield decoded(request, decoding(request), _LOAD + _DECODE, given)


def _readme(request: Request) -> str:
    name, dtype = request.code.name, request.dtype_name
    lines = ["from model import " + name, "from safetensors.torch import load_model", ""]
    if dtype == "float64":
        lines = ["import torch", *lines, "torch.set_default_dtype(torch.float64)"]
    elif dtype != "float32":
        lines = ["import torch", *lines]
    cast = "" if dtype == "float32" else f".to(torch.{dtype})"
    lines += [f"module = {name}(){cast}.eval()", 'load_model(module, "model.safetensors")']
    says = (
        f"`{TEXT}` is the module, `{WEIGHTS}` holds its weights in {dtype}. It needs PyTorch, and "
        "safetensors to load them."
    )
    return readme(request, says, fenced("python", lines))
