"""What the kernel checks need to know: whether there is a kernel, and whether it can run here.

Without a CUDA device the kernels run in Triton's interpreter, which has to be asked for
before triton is imported.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...kernels.aot import Compiled, compile_ahead
from ...kernels.sequential import Scan
from ...kernels.spec import Attend
from ..graph import operations
from ..graph.graph import made_by, shape_of
from ..lowerings.operators import Operator, operators, readings
from ..model import Block, Model
from ..pipeline import generate, lower
from ..plan.plan import Plan, Target
from ..plan.recurrences import Chunked


def _kernel_plan(block: Block) -> Plan | str:
    """Return the plan in which something is a kernel, or why there is none."""
    plan = lower(block, Target("triton"))
    if any(each.path == "triton" for each in plan.lowerings.values()):
        return plan
    for each in plan.lowerings.values():
        reasons = dict(each.obstacles)
        return reasons.get("triton") or reasons.get("chunkwise") or "no kernel carries it"
    return "it has no attention"


class CalledOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operators of emitted files that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ours: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace.startswith("headloom_"):
            self.ours.add(str(func))
        return func(*args, **(kwargs or {}))


def interpreted(block: Block) -> str | None:
    """Return why the block's kernels cannot be run here, or None."""
    plan = _kernel_plan(block)
    if isinstance(plan, str):
        return plan
    if find_spec("triton") is None:
        return "triton is not installed"
    return (
        None
        if can_run_kernels()
        else ("triton was imported without TRITON_INTERPRET=1, and there is no CUDA device")
    )


def can_run_kernels() -> bool:
    """Say whether kernels run in this process; ask for the interpreter while that is possible."""
    if torch.cuda.is_available():
        return True
    if "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import triton

    return bool(triton.knobs.runtime.interpret)


def repeated(blocks: Iterable[Block]) -> dict[Block, str]:
    """Return the blocks whose kernels an earlier one has too, but for fractions, and its name."""
    first: dict[str, Block] = {}
    again: dict[Block, str] = {}
    for block in blocks:
        text = _kernel_text(block)
        if text in first:
            again[block] = first[text].name
        else:
            first[text] = block
    return again


def _kernel_text(block: Block) -> str:
    """Return the emitted file of a block with kernels, without its constants and fractions."""
    code = generate(block, Target("triton"))
    text = re.sub(r"    def constants\(.*?\n\n", "", code.text, flags=re.DOTALL)
    return re.sub(r"\d+\.\d+(e[-+]?\d+)?|headloom_[0-9a-f]{12}", "_", text)


def ahead_of_time(what: Block | Model, targets: tuple[str, ...]) -> str | tuple[int, float]:
    """Compile a block's kernels for GPUs. Raises `RuntimeError` where one spills or overflows."""
    if not targets:
        return "no targets were named (`--target sm_90`)"
    assert isinstance(what, Block)
    plan = _kernel_plan(what)
    if isinstance(plan, str):
        return plan
    count = 0
    for operator in operators(plan, what.name):
        found = _compiled(operator, plan, targets)
        for each in found:
            if not each.ok:
                raise RuntimeError(
                    f"{each.kernel} on {each.target} spills {each.spills} bytes "
                    f"and takes {each.shared} of {each.limit} shared"
                )
        count += len(found)
    return count, 0.0


def _compiled(operator: Operator, plan: Plan, targets: tuple[str, ...]) -> tuple[Compiled, ...]:
    """Compile the kernels of an operator, with the sizes its tensors have in the plan."""
    node, spec, graph = operator.node, operator.spec, plan.graph
    if isinstance(spec, Attend):
        assert made_by(node, operations.Attend)
        q, k, v = (shape_of(graph.node(name).dims) for name in (node.q, node.k, node.v))
        kv_heads = max(k.heads or 1, v.heads or 1)
        return compile_ahead(spec, targets, q.dim, v.dim, heads=q.heads or 1, kv_heads=kv_heads)
    if isinstance(spec, Scan):
        return compile_ahead(spec, targets)
    assert made_by(node, operations.Scan)
    states = {each.name: each.shape for each in node.op.mix.states}
    form = plan.recurrences[node.name]
    assert isinstance(form, Chunked)
    step = next(step for step, found in readings(form) if found == spec)
    d, e = reversed(states[step.state]) if step.turned else states[step.state]
    return compile_ahead(spec, targets, d, e, heads=int(node.dims[1]))
