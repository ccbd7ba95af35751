"""A recurrence as the sequential kernels take it: streams, tensors and states of one head.

scan_of(graph, node)   →   Scan(heads=4, streams=(Stream("q", 16), …), states=(…), …)
"""

from __future__ import annotations

from ...grammar.expr import evaluate
from ...kernels.sequential import Scan, State, Stream
from ...kernels.spec import Tensor
from ..facts.parameters import weights
from ..graph import operations
from ..graph.graph import AnyNode, Graph, Node


def scan_of(graph: Graph, node: Node[operations.Scan]) -> Scan:
    """Return what a sequential kernel would compute of a recurrence."""
    mix = node.op.mix
    heads = int(node.dims[1])
    learned = {weight.name for weight in weights(graph.block) if weight.learned}
    return Scan(
        heads=heads,
        value_dim=int(node.dims[3]),
        streams=tuple(
            Stream(name, _size(graph.node(name), heads))
            for name in node.inputs
            if not graph.is_tensor(name)
        ),
        states=tuple(
            State(each.name, each.shape, float(evaluate(each.init, {})), each.levels)
            for each in mix.states
        ),
        statements=tuple((each.name, each.value) for each in mix.updates),
        tensors=tuple(
            Tensor(name, graph.node(name).dims, differentiable=name in learned)
            for name in node.inputs
            if graph.is_tensor(name)
        ),
        causal=mix.causal,
    )


def _size(stream: AnyNode, heads: int) -> int | None:
    """Return the features a head has of a stream, None for a number."""
    if len(stream.dims) == 4:
        return int(stream.dims[3])
    each = int(stream.dims[2]) // heads
    return None if each == 1 else each
