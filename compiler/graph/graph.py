"""The graph: typed values, each made by one operation from earlier ones.

    q  : [b, 8, n, 64]   = rope(q.1, theta=10000)
    s  : [b, 8, n, m]    = similarity(q, k, scale=0.125)
    o  : [b, 8, n, 64]   = attend(q, k, v)        # after fusion

Nodes are frozen and in order: a node reads only what stands before it. Sizes are numbers
or the symbols `b`, `n` and `m`. Scalar expressions travel inside nodes as trees. `verify`
says what is wrong with a graph, and runs between the passes in tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ...grammar.expr import rebuild, substitute
from ...grammar.source import NOWHERE, Span
from ...grammar.syntax import Expr, Index, Name
from ...ops import OPS, Shape, Weight
from ..model import Block, Normalizer, Recurrence

Dims = tuple[int | str, ...]

# Operations that are not stages of a pipeline: (least inputs, what they are).
SPECIAL = {
    "input": (0, "an argument of the module"),
    "tensor": (0, "a param or const"),
    "similarity": (2, "scale · q · k"),
    "score": (1, "an expression in s"),
    "mask": (0, "who sees whom"),
    "normalize": (2, "scores and visibility to weights"),
    "weights": (2, "an expression in p, where visible"),
    "drop": (1, "dropout on the weights"),
    "combine": (2, "Σ_j p v"),
    "attend": (3, "all of these in one"),
    "scan": (0, "a recurrence along the tokens"),
    "statistic": (1, "a number of every row or column of a map"),
}


@dataclass(frozen=True, slots=True)
class Node:
    """One value and how it is made."""

    name: str
    op: str
    inputs: tuple[str, ...]
    dims: Dims
    attrs: tuple[tuple[str, Any], ...] = ()
    module: str = ""
    span: Span = field(default=NOWHERE, compare=False, repr=False)

    def get(self, name: str) -> Any:
        """Return an attribute; None where it has none of this name."""
        return dict(self.attrs).get(name)

    def having(self, **attrs: Any) -> Node:
        """Return the node with attributes replaced or added."""
        return replace(self, attrs=tuple({**dict(self.attrs), **attrs}.items()))


@dataclass(frozen=True, slots=True)
class Graph:
    """One block, lowered. `block` keeps the sizes and the source it came from.

    In `shared`, `k` are the keys of a call's tokens, `k[j]` all that are kept of them.
    """

    block: Block
    nodes: tuple[Node, ...]
    output: str
    weights: tuple[Weight, ...]
    shared: tuple[tuple[str, str], ...] = ()  # what the layer above reads → its node
    auxiliary: str | None = None  # what training adds to the loss

    @property
    def ends(self) -> tuple[str, ...]:
        """What the graph is for: its output, what it shares, what training adds to the loss."""
        shared = tuple(name for _, name in self.shared)
        more = () if self.auxiliary is None else (self.auxiliary,)
        return (self.output, *shared, *more)

    def node(self, name: str) -> Node:
        return next(each for each in self.nodes if each.name == name)

    def of(self, op: str) -> Iterator[Node]:
        """Yield the nodes of one operation."""
        return (each for each in self.nodes if each.op == op)

    def mixings(self) -> Iterator[Node]:
        """Yield the attentions and recurrences."""
        return (each for each in self.nodes if each.op in ("attend", "scan"))

    def crosses(self, attend: Node) -> bool:
        """Say whether an attention's queries and keys are different lists of tokens."""
        return self.node(attend.inputs[1]).dims[-2] != attend.dims[2]

    def readers(self, name: str) -> tuple[Node, ...]:
        return tuple(each for each in self.nodes if name in each.inputs)

    def rewritten(self, nodes: Iterable[Node], renamed: dict[str, str] | None = None) -> Graph:
        """Return the graph with other nodes; reads of renamed values follow."""
        renamed = renamed or {}

        def follow(name: str) -> str:
            while name in renamed:
                name = renamed[name]
            return name

        def renaming(each: Node) -> Node:
            inputs = tuple(follow(name) for name in each.inputs)
            changed = {name: follow(name) for name in each.inputs if name in renamed}
            attrs = each.attrs
            if changed:
                attrs = tuple((name, _renamed(value, changed)) for name, value in attrs)
            return replace(each, inputs=inputs, attrs=attrs)

        done = tuple(renaming(each) for each in nodes)
        shared = tuple((label, follow(name)) for label, name in self.shared)
        auxiliary = None if self.auxiliary is None else follow(self.auxiliary)
        return replace(self, nodes=done, output=follow(self.output), shared=shared,
                       auxiliary=auxiliary)  # fmt: skip


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """Return an attribute with streams renamed: `t[j]` in a score, `k` in a recurrence."""
    if isinstance(value, Recurrence):
        written = {each.name for each in value.states} | {each.name for each in value.updates}
        new = {old: Name(to) for old, to in names.items() if old not in written}
        updates = (replace(each, value=substitute(each.value, new)) for each in value.updates)
        states = (
            replace(each, init=substitute(each.init, new),
                    weights=None if each.weights is None else substitute(each.weights, new))
            for each in value.states
        )  # fmt: skip
        return replace(value, updates=tuple(updates), states=tuple(states))
    if isinstance(value, Normalizer):
        below = value.denominator
        return replace(
            value,
            numerator=_renamed(value.numerator, names),
            denominator=None if below is None else _renamed(below, names),
        )
    if isinstance(value, tuple):  # statistics: name, kind, expression
        return tuple(_renamed(each, names) for each in value)
    return _reindexed(value, names) if isinstance(value, Expr) else value


def _reindexed(expr: Expr, names: dict[str, str]) -> Expr:
    expr = rebuild(expr, lambda each: _reindexed(each, names))
    if isinstance(expr, Index) and isinstance(expr.base, Name) and expr.base.id in names:
        return replace(expr, base=Name(names[expr.base.id], expr.base.span))
    return expr


def shape_of(dims: Dims) -> Shape:
    """Return the stream shape of [b, n, d] or [b, h, n, d]; of a tensor [], [d] or [h, d]."""
    if dims[:1] != ("b",):
        heads = int(dims[0]) if len(dims) == 2 else None
        return Shape("1", int(dims[-1]) if dims else 1, heads)
    if len(dims) == 3:
        return Shape(str(dims[1]), int(dims[2]))
    return Shape(str(dims[2]), int(dims[3]), int(dims[1]))


def dims_of(shape: Shape) -> Dims:
    """Return the dimensions a stream has at run time."""
    if shape.heads is None:
        return ("b", shape.tokens, shape.dim)
    return ("b", shape.heads, shape.tokens, shape.dim)


def verify(graph: Graph) -> list[str]:
    """Return what is wrong with a graph; an empty list where it is sound."""
    wrong: list[str] = []
    known: dict[str, Node] = {}
    for node in graph.nodes:
        wrong.extend(f"{node.name}: reads `{name}` before it is made"
                     for name in node.inputs if name not in known)  # fmt: skip
        if node.name in known:
            wrong.append(f"{node.name}: made twice")
        if node.op in OPS:
            if all(name in known for name in node.inputs):
                wrong.extend(_verify_stage(node, [known[name] for name in node.inputs]))
        elif node.op not in SPECIAL:
            wrong.append(f"{node.name}: there is no operation `{node.op}`")
        elif len(node.inputs) < SPECIAL[node.op][0]:
            wrong.append(f"{node.name}: `{node.op}` needs {SPECIAL[node.op][0]} inputs")
        known[node.name] = node
    wrong.extend(f"`{name}`, which is shared, is not made"
                 for _, name in graph.shared if name not in known)  # fmt: skip
    if graph.output not in known:
        wrong.append(f"the output `{graph.output}` is not made")
    elif known[graph.output].dims != dims_of(graph.block.out.shape):
        wrong.append(f"the output is {known[graph.output].dims}")
    return wrong


def _verify_stage(node: Node, inputs: list[Node]) -> Iterator[str]:
    op = OPS[node.op]
    shapes = [shape_of(each.dims) for each in inputs]
    dims = dims_of(op.shape(shapes, dict(node.attrs)))
    if dims != node.dims:
        yield f"{node.name}: is {node.dims}, `{node.op}` gives {dims}"
    if op.weights(shapes, dict(node.attrs)) and not node.module:
        yield f"{node.name}: owns tensors and has no module"
