"""Compiling sequential kernels ahead of time: registers, spills and shared memory, no GPU.

for each in compile_scan(scan, targets=("sm_90",)):
    print(each.kernel, each.registers, each.spills, each.shared, each.ok)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from .aot import SHARED_LIMIT, Compiled, work
from .render import IMPORTS
from .sequential import Scan
from .sequential_render import render_scan, sequential_text


def compile_scan(
    scan: Scan,
    targets: tuple[str, ...] = ("sm_80", "sm_90"),
    dtype: str = "bf16",
    tokens: int = 512,
) -> tuple[Compiled, ...]:
    """Compile the forward and the backward of a scan for each target, as they are launched.

    `dtype` is that of the streams: `bf16`, `fp16` or `fp32`. Raises `ValueError` for a scan
    that no kernel can carry, `RuntimeError` where compilation fails.
    """
    if unknown := set(targets) - set(SHARED_LIMIT):
        raise ValueError(f"unknown targets: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        emitted = Path(folder, "emitted.py")
        text = (IMPORTS, sequential_text(), render_scan(scan, "scan", "headloom_ahead"))
        emitted.write_text("\n\n".join(text), encoding="utf-8")
        rows = work(
            {
                "path": str(emitted),
                "name": "_scan",
                "scan": True,
                "targets": list(targets),
                "batch": 2,
                "n": tokens,
                "dtype": dtype,
            }
        )
    return tuple(Compiled(**row, limit=SHARED_LIMIT[row["target"]]) for row in rows)
