"""A recurrence as the sequential kernels take it: streams, tensors and states of one head.

scan_of(graph, node)   →   Scan(heads=4, streams=(Stream("q", 16), …), states=(…), …)
"""

from __future__ import annotations

from ...grammar.expr import evaluate
from ...kernels.sequential import Scan, State, Stream
from ...kernels.spec import Tensor
from ..graph.graph import Graph, Node
from ..model import Recurrence


def scan_of(graph: Graph, node: Node) -> Scan:
    """Return what a sequential kernel would compute of a recurrence."""
    mix: Recurrence = node.get("recurrence")
    heads = int(node.dims[1])
    learned = {weight.name for weight in graph.weights if weight.learned}
    return Scan(
        heads=heads,
        value_dim=int(node.dims[3]),
        streams=tuple(
            Stream(name, _size(graph.node(name), heads))
            for name in node.inputs
            if graph.node(name).op != "tensor"
        ),
        states=tuple(
            State(each.name, each.shape, float(evaluate(each.init, {})), each.levels)
            for each in mix.states
        ),
        statements=tuple((each.name, each.value) for each in mix.updates),
        tensors=tuple(
            Tensor(name, graph.node(name).dims, differentiable=name in learned)
            for name in node.inputs
            if graph.node(name).op == "tensor"
        ),
        causal=mix.causal,
    )


def _size(stream: Node, heads: int) -> int | None:
    """Return the features a head has of a stream, None for a number."""
    if len(stream.dims) == 4:
        return int(stream.dims[3])
    each = int(stream.dims[2]) // heads
    return None if each == 1 else each
