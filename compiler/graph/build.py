"""model.Block → graph.Graph: one node for every step of the meaning, nothing fused.

block { mask = causal }   →   q, k, v, s = similarity(q, k), visible = mask(),
                              p = normalize(s, visible), o = combine(p, v), y = …
"""

from __future__ import annotations

from collections.abc import Collection

from ...grammar.expr import TRUE
from ...grammar.syntax import Expr, Index, Name, walk
from ...ops import Weight
from ..model import (
    MAPS,
    OFFERED,
    Apply,
    Block,
    Flow,
    Mixing,
    Pairwise,
    Part,
    Read,
    Recurrence,
    Statistic,
    elsewhere,
    flow_nodes,
)
from .graph import AnyNode, Dims, Graph, Node, dims_of
from .operations import (
    Combine,
    Drop,
    Input,
    Mask,
    Normalize,
    Operation,
    Scan,
    Score,
    Similarity,
    Stage,
    StatisticOf,
    TensorRead,
    Weights,
    Whole,
)


def build(block: Block) -> Graph:
    """Return the unfused graph of a block."""
    builder = _Builder(block)
    for stream in block.streams:
        builder.flow(stream.flow, stream.name)
    output = builder.flow(block.out, "y" if block.stream("y") is None else "out")
    auxiliary = None if block.regularize is None else builder.flow(block.regularize, "auxiliary")
    moved = tuple((each.name, builder.flow(each.flow, f"{each.name}.next")) for each in block.moves)
    named = {"out": output, **dict.fromkeys(MAPS, "o")}
    shared = {name: named.get(name) or builder.given(name) for name in block.shared or ()}
    shared |= {f"{name}[j]": builder.given(name) for name in block.lent}
    return Graph(block, tuple(builder.nodes), output, tuple(shared.items()), auxiliary, moved)


def tensors_read(*exprs: Expr | None) -> tuple[str, ...]:
    """Return the streams and tensors that expressions index, in the order of reading."""
    found = {
        node.base.id: None
        for expr in exprs
        if expr is not None
        for node in walk(expr)
        if isinstance(node, Index) and isinstance(node.base, Name)
    }
    return tuple(found)


class _Builder:
    def __init__(self, block: Block) -> None:
        self.block = block
        self.nodes: list[AnyNode] = []
        self.names: set[str] = set()
        self.tensors: dict[str, Weight] = {each.name: each for each in block.tensors}

    def add(self, name: str, op: Operation, inputs: tuple[str, ...], dims: Dims) -> str:
        return self.put(Node(name, op, inputs, dims, span=self.block.span))

    def put(self, node: AnyNode) -> str:
        self.names.add(node.name)
        self.nodes.append(node)
        return node.name

    def given(self, name: str) -> str:
        """Return an argument, a param or a const as a node."""
        if name in self.names:
            return name
        if name in self.tensors:
            return self.add(name, TensorRead(), (), self.tensors[name].shape)
        if elsewhere(name) is not None or name in OFFERED:
            return self.add(name, Input(), (), self._below()[name])
        dims: dict[str, Dims] = {
            "x": dims_of(self.block.x),
            "context": ("b", "m", self.block.context_width or 0),
            "doc": ("b", "n"),
        }
        return self.add(name, Input(), (), dims[name])

    def _below(self) -> dict[str, Dims]:
        """Return the dimensions of the streams that are read of the layers below."""
        flows = [*(each.flow for each in self.block.streams), self.block.out]
        nodes = [node for flow in flows for node in flow_nodes(flow)]
        return {node.name: dims_of(node.shape) for node in nodes if isinstance(node, Read)}

    def flow(self, flow: Flow, name: str) -> str:
        """Add the nodes of a flow; its last one gets the name, the others `name.1` …"""
        if isinstance(flow, Read):
            if flow.name not in self.names:
                self.given(flow.name)
            return self._named(flow.name, name)
        if isinstance(flow, Mixing):
            if isinstance(flow.mix, Pairwise):
                return self._pairwise(flow, flow.mix, name)
            return self._recurrence(flow, flow.mix, name)
        order = [each for each in flow_nodes(flow) if not isinstance(each, Read)]
        made: dict[int, str] = {}
        for at, node in enumerate(order):
            inputs = tuple(
                self._read(each.name) if isinstance(each, Read) else made[id(each)]
                for each in node.inputs
            )
            own = name if at == len(order) - 1 else f"{name}.{at + 1}"
            if isinstance(node, Statistic) and own != name:  # named after what it is of
                own = f"{node.inputs[0].name}.{node.kind}"
                own = own if own not in self.names else f"{own}.{len(self.names)}"
            made[id(node)] = own
            if isinstance(node, Statistic):
                tensors = tuple(self.given(each) for each in tensors_read(node.expr))
                read = tuple(dict.fromkeys((*inputs, *tensors)))
                self.add(own, StatisticOf(node.kind, node.expr), read, dims_of(node.shape))
                continue
            assert isinstance(node, Apply | Part)
            stage: Stage | Whole
            stage = (
                Whole(node.what, node.once, node.taken)
                if isinstance(node, Part)
                else Stage(node.op, node.options)
            )
            self.put(Node(own, stage, inputs, dims_of(node.shape), node.module, node.span))
        return name

    def _read(self, name: str) -> str:
        return name if name in self.names else self.given(name)

    def _named(self, source: str, name: str) -> str:
        """A stream that is another one under a new name: `let g = q`."""
        if source == name:
            return name
        node = next(each for each in self.nodes if each.name == source)
        copy = Stage("pointwise", (("expr", Name("a0")),))
        return self.put(Node(name, copy, (source,), node.dims))

    def _pairwise(self, mixing: Mixing, mix: Pairwise, name: str) -> str:
        dims = dims_of(mixing.shape)
        grid: Dims = (*dims[:-1], mixing.keys)
        q, k, v = (each.name for each in mixing.inputs[:3])
        own = "" if name == "o" else f"{name}."
        chosen = () if mix.select is None else mix.select.exprs
        chosen += () if mix.keep is None else mix.keep.exprs
        read = {
            part: tuple(self.given(each) for each in tensors_read(*exprs))
            for part, exprs in (
                ("score", (mix.score,)),
                ("mask", (mix.mask, *chosen)),
                ("weights", (mix.weights,)),
            )
        }
        normal = tuple(self.given(each) for each in tensors_read(*mix.normalize.exprs))
        met = tuple(self.given(each) for each in tensors_read(mix.similarity))
        met = tuple(name for name in met if name not in (q, k))
        met += () if mix.carry is None else self._named_in(mix.carry, {"k"})
        op = Similarity(mix.scale, mix.similarity, mix.carry)
        s = self.add(f"{own}s", op, (q, k, *met), grid)
        s = self.add(f"{own}s.1", Score(mix.score), (s, *read["score"]), grid)
        visible = self.add(
            f"{own}visible", Mask(mix.mask, mix.select, mix.keep), read["mask"], grid
        )
        p = self.add(f"{own}p", Normalize(mix.normalize), (s, visible, *normal), grid)
        p = self.add(f"{own}p.1", Weights(mix.weights), (p, visible, *read["weights"]), grid)
        p = self.add(f"{own}p.2", Drop(mix.dropout), (p,), grid)
        again = tuple(self.given(each) for each in tensors_read(mix.again))
        return self.add(name, Combine(mix.again), (p, v, *again), dims)

    def _recurrence(self, mixing: Mixing, mix: Recurrence, name: str) -> str:
        read = [each for expr in mix.exprs for each in self._named_in(expr, mix.written)]
        return self.add(name, Scan(mix), tuple(dict.fromkeys(read)), dims_of(mixing.shape))

    def _named_in(self, expr: Expr, bound: Collection[str]) -> tuple[str, ...]:
        """Return the streams and tensors that an expression names, but for what is bound in it."""
        read: dict[str, None] = {}
        for node in walk(expr):
            if isinstance(node, Name) and node.id not in bound and node != TRUE:
                known = node.id in self.names or node.id in self.tensors
                read |= {self.given(node.id): None} if known else {}
        return tuple(read)
