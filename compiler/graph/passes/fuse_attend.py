"""Bring one attention together into one node.

    s = similarity(q, k, scale)
    s.1 = score(s, slope, expr)
    visible = mask(doc, expr)              o = attend(q, k, v, slope, doc,
    p = normalize(s.1, visible)      →                scale, score, mask, normalizer,
    p.1 = weights(p, visible)                         weights, rate)
    p.2 = drop(p.1)
    o = combine(p.2, v)

What is asked of the rows and columns of the map, the attention gives too. What reads such an
answer of the same map is asked of the attention once more.
Whether a kernel can carry the whole is decided afterwards, by `choose`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ....grammar.syntax import Name
from ...model import Pairwise
from ..graph import AnyNode, Graph, Kind, Node, made_by
from ..operations import (
    Attend,
    Combine,
    Drop,
    Mask,
    Normalize,
    Score,
    Similarity,
    Statistic,
    StatisticOf,
    Weights,
    asked_again,
)


def fuse_attend(graph: Graph) -> Graph:
    """Return the graph with every chain from similarity to combine as one `attend`."""
    made = {node.name: node for node in graph.nodes}
    asked: dict[str, list[list[Node[StatisticOf]]]] = {}
    again: dict[str, Node[StatisticOf]] = {}
    for name, nodes in _asked(graph).items():
        asked[name] = _turns(made, name, nodes)
        for turn, later in enumerate(asked[name][1:], 1):
            given = [
                replace(each, inputs=(asked_again(name, turn), *each.others)) for each in later
            ]
            again.update({each.name: each for each in given})
    nodes_: list[AnyNode] = []
    for node in graph.nodes:
        if made_by(node, Combine):
            first, *rest = asked.get(node.name, [[]])
            nodes_.append(_fused(made, node, first))
            for turn, later in enumerate(rest, 1):
                nodes_.append(replace(_fused(made, node, later), name=asked_again(node.name, turn)))
        else:
            nodes_.append(again.get(node.name, node))
    return graph.rewritten(_in_order(nodes_))


def _asked(graph: Graph) -> dict[str, list[Node[StatisticOf]]]:
    """Return what is asked of the map of every attention, by its name."""
    asked: dict[str, list[Node[StatisticOf]]] = {}
    for node in graph.of(StatisticOf):
        asked.setdefault(node.inputs[0], []).append(node)
    return asked


def _turns(
    made: dict[str, AnyNode], name: str, asked: list[Node[StatisticOf]]
) -> list[list[Node[StatisticOf]]]:
    """Put what is asked of one map in turns: each reads no answer but those of turns before it."""
    own = {each.name for each in asked}
    turn: dict[str, int] = {name: 0}

    def found(node: str) -> int:
        """Return how many of the map's answers stand behind one another in what makes a node."""
        if node not in turn:
            behind = max((found(each) for each in made[node].inputs), default=0)
            turn[node] = behind + (node in own)
        return turn[node]

    turns: list[list[Node[StatisticOf]]] = [[] for _ in range(max(map(found, own)))]
    for each in asked:
        turns[found(each.name) - 1].append(each)
    return turns


def _in_order(nodes: Iterable[AnyNode]) -> list[AnyNode]:
    """Return the nodes so that each stands after what it reads, else as they were."""
    left = {node.name: node for node in nodes}
    done: dict[str, AnyNode] = {}
    while left:
        ready = next(each for each in left.values() if done.keys() >= set(each.inputs))
        done[ready.name] = left.pop(ready.name)
    return list(done.values())


def _fused(
    made: dict[str, AnyNode], combine: Node[Combine], asked: list[Node[StatisticOf]]
) -> Node[Attend]:
    """Walk back from the weighted sum; steps that were identities are absent."""
    chain = [made[combine.inputs[0]]]
    while not isinstance(chain[0].op, Similarity):
        chain.insert(0, made[chain[0].inputs[0]])
    similarity, normalize = _needed(chain, Similarity), _needed(chain, Normalize)
    mask = _needed([made[normalize.inputs[1]]], Mask)
    score, weights, drop = (_step(chain, Score), _step(chain, Weights), _step(chain, Drop))
    mix = Pairwise(
        scale=similarity.op.scale,
        score=Name("s") if score is None else score.op.expr,
        mask=mask.op.expr,
        select=mask.op.select,
        keep=mask.op.keep,
        normalize=normalize.op.normalizer,
        weights=Name("p") if weights is None else weights.op.expr,
        dropout=0.0 if drop is None else drop.op.rate,
        similarity=similarity.op.expr,
        again=combine.op.again,
        carry=similarity.op.carry,
    )
    chain.insert(chain.index(normalize), mask)
    read = dict.fromkeys(name for step in (*chain, combine, *asked) for name in step.others)
    inputs = (*similarity.inputs[:2], combine.inputs[1], *read)
    wanted = tuple(Statistic(each.name, each.op.kind, each.op.expr) for each in asked)
    return Node(combine.name, Attend(mix, wanted), inputs, combine.dims, span=combine.span)


def _step(nodes: list[AnyNode], kind: type[Kind]) -> Node[Kind] | None:
    return next((each for each in nodes if made_by(each, kind)), None)


def _needed(nodes: list[AnyNode], kind: type[Kind]) -> Node[Kind]:
    found = _step(nodes, kind)
    assert found is not None
    return found
