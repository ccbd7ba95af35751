"""What only a fresh process knows: the peak memory of a run on a CPU, and how long compiling takes.

*Memory.* A process never gives back all it took. So another one runs the case once, which
compiles and loads everything, sets the kernel's high-water mark back, and runs it again: what
counts is the peak above what is held between the two. On a GPU PyTorch counts what it hands out.
*Compiling.* From the text to the module, torch imported before the clock starts, nothing else.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .case import Case, inputs
from .cells import OURS

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT = 900  # seconds that one measurement may take
_MARK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_PARTS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak(case: Case, peer: str, threads: int, run: Callable[[], object]) -> int | None:
    """Return the bytes a run takes at its peak above those held before, None if unknown.

    `run` is used on a GPU; on a CPU the case is run in another process.
    """
    if case.device.startswith("cuda"):
        return _on_gpu(run)
    if not _MARK.exists():
        return None
    try:
        return int(_asked("memory", case, peer, threads))
    except RuntimeError:
        return None


def compiling(case: Case, threads: int) -> float:
    """Return the seconds from the text of a case to its module. Raises `RuntimeError`."""
    return _asked("compiling", case, OURS, threads)


def _asked(what: str, case: Case, peer: str, threads: int) -> float:
    """Ask a process of its own. Raises `RuntimeError` with the last line of what it said."""
    path = os.pathsep.join(each for each in sys.path if each)
    env = {**os.environ, **_PARTS, "PYTHONPATH": path}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package comes with its bytecode
    asked = json.dumps({"what": what, "case": asdict(case), "peer": peer, "threads": threads})
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=asked,
            env=env,
            text=True,
            capture_output=True,
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {LIMIT} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it ended"])[-1])
    return float(done.stdout)


def _on_gpu(run: Callable[[], object]) -> int:
    import torch

    run()
    torch.cuda.synchronize()
    gc.collect()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def free(device: str) -> int:
    """Return the bytes that can be taken now."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _status(field: str) -> int:
    (found,) = (line for line in _lines(_STATUS) if line.startswith(f"{field}:"))
    return 1024 * int(found.split()[1])


def _compiling(case: Case) -> float:
    import torch  # noqa: F401  - its import is not what is measured

    begun = time.perf_counter()
    from .peers import OURSELVES

    OURSELVES.make(case)
    return time.perf_counter() - begun


def _peak(case: Case, peer: str) -> int:
    """Run a case twice and return the peak of the second run above what was held."""
    from .checking import outcome, stirred
    from .peers import named

    what = case.what
    module = stirred(named(peer).make(case).eval())
    x, given = inputs(case, what)
    outcome(module, case, x, given)
    gc.collect()
    held = _status("VmRSS")
    _MARK.write_text("5", encoding="ascii")
    outcome(module, case, x, given)
    return max(0, _status("VmHWM") - held)


def main() -> None:
    """Answer the question on standard input."""
    import torch

    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    case, answers = Case(**asked["case"]), sys.stdout
    sys.stdout = sys.stderr
    if asked["what"] == "memory":
        print(_peak(case, asked["peer"]), file=answers)
    else:
        print(_compiling(case), file=answers)


if __name__ == "__main__":
    main()
