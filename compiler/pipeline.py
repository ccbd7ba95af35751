"""The road from a checked block to a module, in order, stoppable after every stage.

text ─parse→ File ─check→ Architecture ─build→ Graph ─PASSES→ Graph ─choose→ Plan ─emit→ Code
─load→ Module

plan = lower(block, Target("torch"))
code = generate(block, Target("torch"))
module = load(code)()
"""

from __future__ import annotations

import linecache
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from .emit import Code, emit
from .graph.passes import simplest
from .lowerings.choose import choose
from .model import Block, Model
from .plan.plan import Plan, Target

if TYPE_CHECKING:
    from torch import nn


def lower(block: Block, target: Target) -> Plan:
    """Return the graph of a block after all passes, with every path chosen."""
    return choose(simplest(block), target)


def plans(what: Block | Model, target: Target) -> list[Plan]:
    """Return the plans of a block, or of every different block of a model, in order."""
    blocks = what.blocks
    return [lower(block, target) for block in blocks]


def generate(what: Block | Model, target: Target) -> Code:
    """Return the standalone file of a block or model."""
    return emit(what, plans(what, target))


def load(code: Code) -> type[nn.Module]:
    """Execute a file's text and return its class; tracebacks and Triton see that very text."""
    name = f"headloom_module_{code.digest}"
    if name not in sys.modules:
        filename = f"<{name}>"
        linecache.cache[filename] = (
            len(code.text),
            None,
            code.text.splitlines(keepends=True),
            filename,
        )
        module = ModuleType(name)
        module.__file__ = filename
        sys.modules[name] = module
        try:
            exec(compile(code.text, filename, "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
    made: type[nn.Module] = getattr(sys.modules[name], code.name)
    return made
