"""Compiling kernels ahead of time, without a GPU: do they fit the hardware they are for?

    for each in compile_ahead(spec, targets=("sm_90",), head_dim=128):
        print(each.kernel, each.registers, each.spills, each.shared, each.ok)

The emitted text is compiled exactly as it would be launched, with pointers and strides
aligned as torch aligns them. This runs in a process of its own, without TRITON_INTERPRET:
that flag decides, once per process, what `@triton.jit` makes of a function.

What was found is kept in the user's cache folder, by the text, the job and Triton's version:
the same kernels are compiled once on a machine. The folder may be deleted at any time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..grammar.store import folder as cache_folder
from ..grammar.syntax import Binary, Call, Compare, Expr, Index, Name, Number, Unary, children
from . import recurrence
from .recurrence import Recurrence
from .render import IMPORTS, render, skeleton_text
from .sequential import Scan
from .sequential_render import render_scan
from .spec import Attend

# Shared memory that one block may use, in bytes (CUDA C++ Programming Guide, table of
# compute capabilities; for CDNA3 the size of the local data share).
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
Row = dict[str, Any]  # the resources of one kernel, as the worker prints them

_NAME, _NAMESPACE = "attend", "headloom_ahead"
_WORKER = Path(__file__).with_name("compile_worker.py")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel for one target: registers of a thread, bytes it spills, shared bytes."""

    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    limit: int

    @property
    def ok(self) -> bool:
        """Nothing spills, and a block's shared memory fits."""
        return self.spills == 0 and self.shared <= self.limit


def cuda_tools() -> dict[str, Path | None]:
    """Return the tools that triton's package brings for NVIDIA, None for one that is absent."""
    spec = find_spec("triton")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    tools: dict[str, Path | None] = {}
    for name in ("ptxas", "cuobjdump"):
        paths = [Path(folder) / "backends/nvidia/bin" / name for folder in folders]
        tools[name] = next((path for path in paths if path.is_file()), None)
    return tools


def compile_ahead(
    spec: Attend | Recurrence | Scan,
    targets: tuple[str, ...] = ("sm_80", "sm_90"),
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: str = "bf16",
    heads: int = 8,
    kv_heads: int = 2,
    backward: bool = True,
) -> tuple[Compiled, ...]:
    """Compile every kernel of a spec for each target: `sm_80`, `sm_90`, `sm_100`, `gfx942`.

    `dtype` is `bf16`, `fp16` or `fp32`; `value_dim` defaults to `head_dim`; a recurrence has no
    `kv_heads`, a scan brings its own sizes. Raises `ValueError` for a spec no kernel can carry,
    `RuntimeError` where compilation fails.
    """
    if unknown := set(targets) - set(SHARED_LIMIT):
        raise ValueError(f"unknown targets: {', '.join(sorted(unknown))}")
    value_dim = value_dim or head_dim
    job: dict[str, object] = {"name": f"_{_NAME}", "backward": backward}
    if isinstance(spec, Recurrence):
        texts = (skeleton_text("chunked"), recurrence.render(spec, _NAME, _NAMESPACE))
        job |= {"inputs": _inputs(spec, heads, head_dim, value_dim, dtype)}
    elif isinstance(spec, Scan):
        texts = (skeleton_text("sequential"), render_scan(spec, _NAME, _NAMESPACE))
        job |= {"tokens": [2, 512], "dtype": dtype}
    else:
        texts = (skeleton_text(), render(spec, _NAME, _NAMESPACE))
        job |= {
            "q": [2, heads, 512, head_dim],
            "k": [2, kv_heads, 512, head_dim],
            "v": [2, kv_heads, 512, value_dim],
            "dtype": dtype,
            "kinds": _kinds(spec),
        }
    rows = _measured("\n\n".join((IMPORTS, *texts)), job, targets)
    return tuple(Compiled(**row, limit=SHARED_LIMIT[row["target"]]) for row in rows)


def _inputs(
    spec: Recurrence, heads: int, head_dim: int, value_dim: int, dtype: str
) -> list[tuple[list[int], str]]:
    """Return the shapes and dtypes of what a recurrence takes, in its order."""
    before, vector = [2, heads, 512], ([2, heads, 512, head_dim], dtype)
    found = [vector, vector, ([*before, value_dim], dtype)]
    found += [vector] * spec.corrected
    if spec.decay is not None:
        found.append(([*before, 1 if spec.decay == "number" else head_dim], "fp32"))
    return [*found, ([2, heads, head_dim, value_dim], "fp32")]


def _kinds(spec: Attend) -> dict[str, str]:
    """Guess what the tensors hold from how they are read: flags, whole numbers or floats."""
    found: dict[str, str] = {}

    def visit(expr: Expr, kind: str) -> None:
        match expr:
            case Index(Name(name), items):
                found[name] = kind
                for item in items:
                    visit(item, "i64")
            case Binary("and" | "or", left, right):
                visit(left, "i1")
                visit(right, "i1")
            case Unary("not", operand) | Call("where", (operand, *_)):
                visit(operand, "i1")
            case Binary("//" | "%", left, right):
                visit(left, "i64")
                visit(right, "i64")
            case Compare(operands, ops):
                plain = all(isinstance(each, Index | Number) for each in operands)
                for each in operands:
                    visit(each, "i64" if plain and set(ops) <= {"==", "!="} else "fp32")
            case _:
                for child in children(expr):
                    visit(child, "fp32")

    for part, expr, _ in spec.parts():
        visit(expr, "i1" if part == "mask" else "fp32")
    return found


def _measured(text: str, job: dict[str, object], targets: tuple[str, ...]) -> list[Row]:
    """Return the resources of a text's kernels for each target, compiled where none are kept."""
    places = {target: _place(text, job | {"target": target}) for target in targets}
    found: dict[str, list[Row]] = {
        target: json.loads(place.read_text(encoding="utf-8"))
        for target, place in places.items()
        if place is not None and place.is_file()
    }
    if missing := [target for target in targets if target not in found]:
        rows = _compiled(text, job | {"targets": missing})
        found |= {target: [row for row in rows if row["target"] == target] for target in missing}
        for target in missing:
            _keep(found[target], places[target])
    return [row for target in targets for row in found[target]]


def _place(text: str, job: dict[str, object]) -> Path | None:
    """Return where the resources of kernels are kept, None where nothing can be."""
    folder = cache_folder()
    if folder is None:
        return None
    worker = _WORKER.read_text(encoding="utf-8")
    parts = (text, json.dumps(job, sort_keys=True), worker, version("triton"))
    return folder / "kernels" / f"{sha256(repr(parts).encode()).hexdigest()}.json"


def _keep(rows: list[Row], place: Path | None) -> None:
    """Write the rows whole or not at all: other processes may do the same."""
    if place is None:
        return
    place.parent.mkdir(exist_ok=True)
    part = place.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(rows), encoding="utf-8")
    part.replace(place)


def _compiled(text: str, job: dict[str, object]) -> list[Row]:
    """Compile a text in a process of its own. Raises `RuntimeError` where that fails."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    with tempfile.TemporaryDirectory() as folder:
        emitted = Path(folder, "emitted.py")
        emitted.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(_WORKER)],
            input=json.dumps(job | {"path": str(emitted)}),
            capture_output=True,
            text=True,
            env=env,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"ahead-of-time compilation failed:\n{done.stderr[-4000:]}")
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows
