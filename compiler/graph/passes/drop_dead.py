"""Remove what does not reach the output.

g = sigmoid(g.1)        (nobody reads g)   →   nothing
"""

from __future__ import annotations

import networkx as nx

from ..graph import Graph


def drop_dead(graph: Graph) -> Graph:
    """Return the graph with only the nodes that the output and what is shared depend on."""
    reads = nx.DiGraph((name, node.name) for node in graph.nodes for name in node.inputs)
    reads.add_nodes_from(graph.ends)
    needed = set(graph.ends).union(*(nx.ancestors(reads, end) for end in graph.ends))
    return graph.rewritten(node for node in graph.nodes if node.name in needed)
