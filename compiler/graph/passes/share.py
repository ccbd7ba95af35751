"""Compute the same thing once.

    k.1 = rms_norm(c)                     k.1 = rms_norm(c)
    k = split(k.1, heads=8)         →     k = split(k.1, heads=8)
    v = split(k.1, heads=8)               (reads of v become reads of k)

Operations with tensors of their own differ by their module, and random ones are never equal.
"""

from __future__ import annotations

from dataclasses import replace

from ....ops import OPS
from ..graph import Graph, Node

_APART = ("drop", "input", "tensor")


def share(graph: Graph) -> Graph:
    """Return the graph with equal nodes merged into the first of them."""
    first: dict[Node, str] = {}
    renamed: dict[str, str] = {}
    kept: list[Node] = []
    for node in graph.nodes:
        inputs = tuple(renamed.get(name, name) for name in node.inputs)
        key = replace(node, name="", inputs=inputs)
        apart = node.op in _APART or (node.op in OPS and OPS[node.op].random)
        if not apart and not node.module and key in first:
            renamed[node.name] = first[key]
            continue
        first[key] = node.name
        kept.append(node)
    return graph.rewritten(kept, renamed)
