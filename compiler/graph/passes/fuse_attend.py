"""Bring one attention together into one node.

    s = similarity(q, k, scale)
    s.1 = score(s, slope, expr)
    visible = mask(doc, expr)              o = attend(q, k, v, slope, doc,
    p = normalize(s.1, visible)      →                scale, score, mask, normalizer,
    p.1 = weights(p, visible)                         weights, rate)
    p.2 = drop(p.1)
    o = combine(p.2, v)

What is asked of the rows and columns of the map, the attention gives too.
Whether a kernel can carry the whole is decided afterwards, by `choose`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import networkx as nx

from ....grammar.syntax import Name
from ..graph import Graph, Node


def fuse_attend(graph: Graph) -> Graph:
    """Return the graph with every chain from similarity to combine as one `attend`."""
    made = {node.name: node for node in graph.nodes}
    asked: dict[str, list[Node]] = {}
    for node in graph.of("statistic"):
        asked.setdefault(node.inputs[0], []).append(node)
    return graph.rewritten(_in_order(
        _asked(_fused(made, node), asked.get(node.name, [])) if node.op == "combine" else node
        for node in graph.nodes
    ))  # fmt: skip


def _asked(attend: Node, statistics: list[Node]) -> Node:
    """Return an attention that gives numbers of its rows or columns as well."""
    more = (name for each in statistics for name in each.inputs[1:])
    reads = dict.fromkeys([*attend.inputs[3:], *more])
    wanted = tuple((each.name, each.get("kind"), each.get("expr")) for each in statistics)
    return replace(attend, inputs=(*attend.inputs[:3], *reads)).having(statistics=wanted)


def _in_order(nodes: Iterable[Node]) -> list[Node]:
    """Return the nodes so that each stands after what it reads, else as they were."""
    made = {node.name: node for node in nodes}
    reads = nx.DiGraph((name, node.name) for node in made.values() for name in node.inputs)
    reads.add_nodes_from(made)
    place = {name: at for at, name in enumerate(made)}
    return [made[name] for name in nx.lexicographical_topological_sort(reads, place.__getitem__)]


def _fused(made: dict[str, Node], combine: Node) -> Node:
    """Walk back from the weighted sum; steps that were identities are absent."""
    at, values = made[combine.inputs[0]], combine.inputs[1]
    steps: dict[str, Node] = {}
    while True:
        steps[at.op] = at
        if at.op == "similarity":
            break
        at = made[at.inputs[0]]
    mask = made[steps["normalize"].inputs[1]]
    others = [
        name
        for step, skip in ((steps["similarity"], 2), (steps.get("score"), 1), (mask, 0),
                           (steps["normalize"], 2), (steps.get("weights"), 2))
        if step is not None
        for name in step.inputs[skip:]
    ]  # fmt: skip
    inputs = (*steps["similarity"].inputs[:2], values, *dict.fromkeys(others))
    attrs = {
        "scale": steps["similarity"].get("scale"),
        "similarity": steps["similarity"].get("expr"),
        "score": steps["score"].get("expr") if "score" in steps else Name("s"),
        "mask": mask.get("expr"),
        "normalizer": steps["normalize"].get("normalizer"),
        "weights": steps["weights"].get("expr") if "weights" in steps else Name("p"),
        "rate": steps["drop"].get("rate") if "drop" in steps else 0.0,
    }
    return Node(combine.name, "attend", inputs, combine.dims, tuple(attrs.items()), "",
                combine.span)  # fmt: skip
