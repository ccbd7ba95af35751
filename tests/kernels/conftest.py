"""Kernels run in Triton's interpreter here; it must be chosen before triton is imported."""

import os
import sys

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

import hashlib
import linecache
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import triton

from headloom.kernels.render import IMPORTS, render, skeleton_text
from headloom.kernels.spec import Attend

Load = Callable[..., Any]


@pytest.fixture(scope="session")
def load() -> Load:
    """Return what makes a spec callable, the way the compiler loads an emitted text."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("triton was imported without TRITON_INTERPRET=1")
    return _load


@pytest.fixture(scope="session")
def execute() -> Callable[[str, str], ModuleType]:
    """Return what runs a text as the compiler does: registered with linecache, no file."""
    return _execute


def _load(spec: Attend, name: str = "attend", **others: Attend) -> Any:
    """Execute an emitted text registered with linecache; the function, or the module."""
    body = "".join(repr(each) for each in (spec, *others.values()))
    namespace = "headloom_" + hashlib.sha256(body.encode()).hexdigest()[:12]
    parts = [IMPORTS, skeleton_text(), render(spec, name, namespace)]
    parts += [render(each, other, namespace) for other, each in others.items()]
    module = _execute("\n\n".join(parts), f"<{namespace}>")
    return module if others else getattr(module, name)


def _execute(text: str, filename: str) -> ModuleType:
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    module = ModuleType(filename.strip("<>").replace(" ", "_"))
    sys.modules[module.__name__] = module  # torch.compile looks globals up there
    exec(compile(text, filename, "exec"), module.__dict__)
    return module
