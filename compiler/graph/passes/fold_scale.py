"""Let the product of queries and keys take a number by which the score divides or multiplies it.

    o = attend(q, k, v, scale=0.125,              o = attend(q, k, v, scale=0.0025,
               score=50 * tanh(s / 50))      →               score=50 * tanh(s))

Queries are scaled, which are fewer than pairs.
"""

from __future__ import annotations

from dataclasses import replace

from ....grammar.expr import names, rebuild
from ....grammar.syntax import Binary, Expr, Name, Number
from ...model import MAPS
from ..graph import AnyNode, Graph, made_by
from ..operations import Attend

S = Name("s")


def fold_scale(graph: Graph) -> Graph:
    """Return the graph with factors of `s` in scores as part of the scale."""
    read = {name for label, name in graph.shared if label in MAPS}  # layers above read these maps
    return graph.rewritten(each if each.name in read else _folded(each) for each in graph.nodes)


def _folded(node: AnyNode) -> AnyNode:
    if not made_by(node, Attend) or node.op.mix.similarity is not None:
        return node
    mix = node.op.mix
    for chosen in (mix.select, mix.keep):
        if chosen is not None and "s" in names(chosen.score):  # which is the s before `score`
            return node
    found: set[float] = set()
    bare = _without(mix.score, found)
    if len(found) != 1 or found & {0.0, 1.0} or bare == S:
        return node
    new = replace(mix, score=bare, scale=mix.scale * found.pop())
    return replace(node, op=replace(node.op, mix=new))


def _without(expr: Expr, found: set[float]) -> Expr:
    """Return a score without the factors of `s`, and note them: 1 where it has none."""
    match expr:
        case Binary("/", Name("s"), Number(value)) if value:
            found.add(1 / value)
            return S
        case Binary("*", Name("s"), Number(value)) | Binary("*", Number(value), Name("s")):
            found.add(float(value))
            return S
        case Name("s"):
            found.add(1.0)
            return S
    return rebuild(expr, lambda each: _without(each, found))
