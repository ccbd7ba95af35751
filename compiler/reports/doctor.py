"""What works here: versions, devices, the interpreter, the compilers for GPUs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "triton", "lark", "numpy", "optuna", "pyyaml", "rich", "click", "safetensors")
OPTIONAL = ("triton",)
_INTERPRETED = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch, triton, triton.language as tl

@triton.jit
def double(x, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(x + at, 2 * tl.load(x + at))

x = torch.ones(16)
double[(1,)](x, 16)
assert x.tolist() == [2.0] * 16
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `ok` None: it is absent, and need not be there."""

    name: str
    ok: bool | None
    value: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """Look at everything."""
    findings = [
        Finding("python", sys.version_info >= (3, 11), platform.python_version()),
        Finding("machine", True, f"{platform.platform(terse=True)}, {os.cpu_count()} cores"),
    ]
    findings += [_package(name) for name in PACKAGES]
    if find_spec("torch") is not None:
        findings.append(_devices())
    if find_spec("triton") is not None:
        findings += [_interpreter(), _cross_compiler()]
    return findings


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, version(name))
    except PackageNotFoundError:
        return Finding(name, None if name in OPTIONAL else False, "not installed")


def _devices() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", None, "none; kernels run in the interpreter, modules on the CPU")
    names = [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())]
    return Finding("GPU", True, ", ".join(names))


def _interpreter() -> Finding:
    """Run a kernel in a process of its own: the interpreter is chosen once per process."""
    done = subprocess.run(
        [sys.executable, "-"], input=_as_file(), text=True, capture_output=True, check=False
    )
    if done.returncode:
        return Finding("triton interpreter", False, done.stderr.strip().splitlines()[-1])
    return Finding("triton interpreter", True, "runs kernels without a GPU")


def _as_file() -> str:
    """Triton reads a kernel's source from a file, so the script writes itself to one."""
    return (
        "import runpy, tempfile, os\n"
        f"text = {_INTERPRETED!r}\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    path = os.path.join(folder, 'kernel.py')\n"
        "    open(path, 'w').write(text)\n"
        "    runpy.run_path(path)\n"
    )


def _cross_compiler() -> Finding:
    from ...kernels.aot import cuda_tools

    missing = [name for name, path in cuda_tools().items() if path is None]
    if missing:
        return Finding("ahead-of-time compiler", None, f"triton's package has no {missing[0]}")
    return Finding("ahead-of-time compiler", True, "builds for sm_80, sm_90, sm_100 without a GPU")


def show(findings: list[Finding]) -> None:
    """Print the findings as a table."""
    table = Table(show_header=False, box=None)
    for each in findings:
        mark = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[dim]–[/]"}[each.ok]
        table.add_row(mark, each.name, each.value)
    Console(highlight=False).print(table)
