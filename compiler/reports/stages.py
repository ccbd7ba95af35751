"""The text of any stage of the road, for `headloom build --emit STAGE`."""

from __future__ import annotations

from ...grammar.format import format_loom
from ...grammar.syntax import File
from ..api import target
from ..checking.check import check, find
from ..lowerings.operators import operators
from ..pipeline import generate, plans
from ..plan.plan import Plan
from .picture import graph_lines


def stage_text(
    file: File,
    name: str | None,
    width: int | None,
    backend: str,
    stage: str,
    optimize: str = "default",
) -> str:
    """Return the text of a stage: syntax, graph, code or kernels."""
    if stage == "syntax":
        return format_loom(file)
    what = find(check(file), name, width)
    if stage == "kernels":
        return _kernels(plans(what, target("triton")))
    if stage == "graph":
        texts = [
            "\n".join([f"# {plan.block.name}", *graph_lines(plan)])
            for plan in plans(what, target(backend, optimize=optimize))
        ]
        return "\n\n".join(texts) + "\n"
    return generate(what, target(backend, optimize=optimize)).text


def _kernels(made: list[Plan]) -> str:
    texts = []
    for plan in made:
        texts += [each.render("headloom") for each in operators(plan, plan.block.name)]
        for lowering in plan.lowerings.values():
            if lowering.path != "triton":
                reasons = dict(lowering.obstacles)
                why = reasons.get("triton") or reasons.get("chunkwise") or lowering.reason
                texts.append(f"# {plan.block.name} has no kernel: {why}")
    return "\n\n".join(text.strip("\n") for text in texts) + "\n"
