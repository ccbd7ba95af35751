"""Where something was measured: the device, the versions, the sources of the package."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_MEANT = ("torch", "triton", "transformers", "entmax", "fla-core", "flash-linear-attention")
_SOURCES = ("grammar", "ops", "kernels", "compiler", "bench")


@dataclass(frozen=True, slots=True)
class Machine:
    """What numbers depend on beside the case."""

    device: str
    threads: int
    cores: int
    versions: tuple[tuple[str, str], ...]
    sources: str

    @property
    def slug(self) -> str:
        """Its name in a file's."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "versions": dict(self.versions)}


def machine(device: str) -> Machine:
    """Return this machine, where things run on `device`."""
    import torch

    on_gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if on_gpu else _cpu()
    threads = torch.get_num_threads()
    known = tuple((each, found) for each in _MEANT if (found := _version(each)))
    title = name if on_gpu else f"{name}, {threads} thread{'s' if threads != 1 else ''}"
    return Machine(title, threads, os.cpu_count() or 1, known, sources())


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def sources() -> str:
    """Return a digest of what computes: a row measured of other sources is measured again."""
    root, found = Path(__file__).parent.parent, hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".loom", ".lark"):
                found.update(path.read_bytes())
    return found.hexdigest()[:16]
