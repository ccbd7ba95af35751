"""Compute the same thing once.

    k.1 = rms_norm(c)                     k.1 = rms_norm(c)
    k = split(k.1, heads=8)         →     k = split(k.1, heads=8)
    v = split(k.1, heads=8)               (reads of v become reads of k)

Operations with tensors of their own differ by their module, and random ones are never equal.
"""

from __future__ import annotations

from dataclasses import replace

from ..graph import AnyNode, Graph
from ..operations import Drop, Input, Stage, TensorRead, Whole


def share(graph: Graph) -> Graph:
    """Return the graph with equal nodes merged into the first of them."""
    first: dict[AnyNode, str] = {}
    renamed: dict[str, str] = {}
    kept: list[AnyNode] = []
    for node in graph.nodes:
        inputs = tuple(renamed.get(name, name) for name in node.inputs)
        key = replace(node, name="", inputs=inputs)
        if not _apart(node) and key in first:
            renamed[node.name] = first[key]
            continue
        first[key] = node.name
        kept.append(node)
    return graph.rewritten(kept, renamed)


def _apart(node: AnyNode) -> bool:
    """Say whether a node is itself, however like it others are."""
    match node.op:
        case Input() | TensorRead() | Drop() | Whole():
            return True
        case Stage() as stage:
            return bool(node.module) or stage.definition.random
        case _:
            return False
