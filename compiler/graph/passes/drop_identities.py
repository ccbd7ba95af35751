"""Remove steps that change nothing.

s.1 = score(s, expr=s)                 p.1 = weights(p, visible, expr=p)
p = normalize(s.1, visible)      →     p = normalize(s, visible)
o = combine(p.1, v)                    o = combine(p, v)
"""

from __future__ import annotations

from ....grammar.syntax import Name
from ..graph import AnyNode, Graph, is_wide
from ..operations import Drop, Score, Stage, Weights


def drop_identities(graph: Graph) -> Graph:
    """Return the graph without scores, weights, dropouts and copies that do nothing."""
    renamed = {node.name: node.inputs[0] for node in graph.nodes if _does_nothing(graph, node)}
    kept = [node for node in graph.nodes if node.name not in renamed]
    return graph.rewritten(kept, renamed)


def _does_nothing(graph: Graph, node: AnyNode) -> bool:
    match node.op:
        case Score(Name("s")) | Weights(Name("p")) | Drop(0):
            return True
        case Stage("pointwise") as stage:
            copied = bool(stage.given["expr"] == Name("a0"))
            return copied and not is_wide(graph.node(node.inputs[0]))
        case Stage("dropout") as stage:
            return bool(stage.given["p"] == 0)
        case _:
            return False
