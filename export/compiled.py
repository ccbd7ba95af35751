"""Programs compiled ahead of time, for the processor of the machine that they are written on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from ..compiler.verify.verify import Finding
from .checking import Compared, decoded, forwarded
from .program import Program
from .request import NotExportedError, Request

_LOAD = """\
import torch

def load(folder, name):
    return torch._inductor.aoti_load_package(folder + "/" + name.replace(".pt2", ".aot.pt2"))
"""


def called(name: str) -> str:
    """Return what the compiled form of a program's file is called."""
    return name.replace(".pt2", ".aot.pt2")


def obstacles(programs: Mapping[str, Program]) -> Sequence[str]:
    """Say why programs cannot be compiled, as far as that is known before it is tried."""
    loops = " and ".join(f"`{name}`" for name, each in programs.items() if each.loops)
    why = f"aot: Inductor does not compile the loops over tokens of {loops} for free lengths"
    found = [why] if loops else []
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        found.append("aot: there is no C++ compiler")
    return found


def write(request: Request, program: Program, path: Path) -> None:
    """Compile a program into a package. Raises `NotExportedError` where Inductor cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(program.exported, package_path=str(path))
    except torch._inductor.exc.InductorError as problem:
        why = f"aot: Inductor cannot compile `{path.name}`: {problem}"
        raise NotExportedError(request.what.name, "pt2", (why,)) from problem


def check(
    request: Request,
    calls: list[Compared],
    steps: list[Compared],
    given: dict[str, Any],
    scripts: tuple[str, str],
) -> Iterator[Finding]:
    """Run what was compiled as the programs themselves are."""
    forward, decode = (_LOAD + script for script in scripts)
    yield forwarded(request, calls, forward, given, check="compiled forward")
    if steps:
        yield decoded(request, steps, decode, given, check="compiled decoding")
