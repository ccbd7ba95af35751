"""The text of any stage of the road, for `headloom build --emit STAGE`."""

from __future__ import annotations

from ...grammar.format import format_loom
from ...grammar.syntax import File
from ..api import target
from ..checking.check import check, find
from ..graph.graph import Graph
from ..pipeline import generate, graphs
from ..plan.choose import lowerings
from ..plan.operators import operators
from .picture import graph_lines


def stage_text(file: File, name: str | None, width: int | None, backend: str, stage: str) -> str:
    """Return the text of a stage: syntax, graph, code or kernels."""
    if stage == "syntax":
        return format_loom(file)
    what = find(check(file), name, width)
    if stage == "kernels":
        return _kernels(graphs(what, target("triton")))
    if stage == "graph":
        texts = [
            "\n".join([f"# {graph.block.name}", *graph_lines(graph)])
            for graph in graphs(what, target(backend))
        ]
        return "\n\n".join(texts) + "\n"
    return generate(what, target(backend)).text


def _kernels(made: list[Graph]) -> str:
    texts = []
    for graph in made:
        texts += [each.render("headloom") for each in operators(graph, graph.block.name)]
        for lowering in lowerings(graph):
            if lowering.path != "triton":
                reasons = dict(lowering.obstacles)
                why = reasons.get("triton") or reasons.get("chunkwise") or lowering.reason
                texts.append(f"# {graph.block.name} has no kernel: {why}")
    return "\n\n".join(text.strip("\n") for text in texts) + "\n"
