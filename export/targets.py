"""What a module can be exported to, one row each.

A target is a module with three functions. To add one, write it, add its row here, and its name
to the command.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from ..compiler.verify.verify import Finding
from .request import Request


class Target(Protocol):
    """One way to take a module elsewhere. `OPTIONS` are those of `Options` that it takes."""

    OPTIONS: frozenset[str]

    def obstacles(self, request: Request) -> Sequence[str]:
        """Say which parts cannot be exported, and why. Nothing has been written yet."""

    def write(self, request: Request, folder: Path) -> None:
        """Write the folder, the same bytes for the same request."""

    def check(self, request: Request, folder: Path) -> Iterator[Finding]:
        """Load the folder where Headloom cannot be imported; yield what each comparison found."""


TARGETS = {  # name → its module
    "py": ".to_py",
    "pt2": ".to_pt2",
    "onnx": ".to_onnx",
    "hf": ".to_hf",
}


def target(name: str) -> Target:
    """Return a target, imported when it is asked for."""
    return cast(Target, import_module(TARGETS[name], __package__))
