"""Remove what does not reach the output.

g = sigmoid(g.1)        (nobody reads g)   →   nothing
"""

from __future__ import annotations

from ..graph import Graph


def drop_dead(graph: Graph) -> Graph:
    """Return the graph with only the nodes that the output and what is shared depend on."""
    needed = set(graph.ends)
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed.update(node.inputs)
    return graph.rewritten(node for node in graph.nodes if node.name in needed)
