"""The graph: typed values, each made by one operation from earlier ones.

    q  : [b, 8, n, 64]   = rope(q.1, theta=10000)
    s  : [b, 8, n, m]    = similarity(q, k, scale=0.125)
    o  : [b, 8, n, 64]   = attend(q, k, v)        # after fusion

Nodes are frozen and in order: a node reads only what stands before it. Sizes are numbers
or the symbols `b`, `n` and `m`. What a node does is a typed `Operation`, with its expressions
as trees. `verify`
says what is wrong with a graph, and runs between the passes in tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Generic, TypeGuard, TypeVar

from ...grammar.source import NOWHERE, Span
from ...ops import OPS, Shape
from ..model import Block
from .operations import Attend, Input, Operation, Scan, Stage, TensorRead

Dims = tuple[int | str, ...]
Kind = TypeVar("Kind", bound=Operation)
Made = TypeVar("Made", bound=Operation, covariant=True)


@dataclass(frozen=True, slots=True)
class Node(Generic[Made]):
    """One value and how it is made: a `Node[Attend]` is an attention."""

    name: str
    op: Made
    inputs: tuple[str, ...]
    dims: Dims
    module: str = ""
    span: Span = field(default=NOWHERE, compare=False, repr=False)

    @property
    def q(self: Node[Attend]) -> str:
        return self.inputs[0]

    @property
    def k(self: Node[Attend]) -> str:
        return self.inputs[1]

    @property
    def v(self: Node[Attend]) -> str:
        return self.inputs[2]

    @property
    def others(self) -> tuple[str, ...]:
        """The inputs without roles of their own: what its expressions read."""
        return self.inputs[len(self.op.roles) :]


AnyNode = Node[Operation]


def made_by(node: AnyNode, kind: type[Kind]) -> TypeGuard[Node[Kind]]:
    """Say whether a node's operation is of a kind."""
    return isinstance(node.op, kind)


@dataclass(frozen=True, slots=True)
class Graph:
    """One block, lowered. `block` keeps the sizes and the source it came from.

    In `shared`, `k` are the keys of a call's tokens, `k[j]` all that are kept of them.
    """

    block: Block
    nodes: tuple[AnyNode, ...]
    output: str
    shared: tuple[tuple[str, str], ...] = ()  # what the layer above reads → its node
    auxiliary: str | None = None  # what training adds to the loss
    moved: tuple[tuple[str, str], ...] = ()  # a tensor → the node of what training sets it to

    @property
    def lent(self) -> dict[str, str]:
        """What layers above read of all that is kept, under the name they know: its node."""
        return {label: name for label, name in self.shared if label.endswith("[j]")}

    @property
    def ends(self) -> tuple[str, ...]:
        """What the graph is for: its output, what it shares, what only training does."""
        shared = tuple(name for _, name in self.shared)
        return (self.output, *shared, *self.aside)

    @property
    def aside(self) -> tuple[str, ...]:
        """What only training needs: the term of the loss, and what it moves tensors to."""
        added = () if self.auxiliary is None else (self.auxiliary,)
        return (*added, *(name for _, name in self.moved))

    def node(self, name: str) -> AnyNode:
        return next(each for each in self.nodes if each.name == name)

    def of(self, kind: type[Kind]) -> Iterator[Node[Kind]]:
        """Yield the nodes of one kind of operation."""
        return (each for each in self.nodes if made_by(each, kind))

    def shapes(self, node: AnyNode) -> list[Shape]:
        """Return the shapes of what a node reads."""
        return [shape_of(self.node(name).dims) for name in node.inputs]

    def mixings(self) -> Iterator[Node[Attend] | Node[Scan]]:
        """Yield the attentions and recurrences."""
        return (each for each in self.nodes if made_by(each, Attend) or made_by(each, Scan))

    def crosses(self, attend: Node[Attend]) -> bool:
        """Say whether an attention's queries and keys are different lists of tokens."""
        return self.node(attend.k).dims[-2] != attend.dims[2]

    def is_tensor(self, name: str) -> bool:
        """Say whether a value is a param or const."""
        return isinstance(self.node(name).op, TensorRead)

    @property
    def reads_context(self) -> bool:
        """Whether a context is among the arguments."""
        return any(each.name == "context" for each in self.of(Input))

    def readers(self, name: str) -> tuple[AnyNode, ...]:
        return tuple(each for each in self.nodes if name in each.inputs)

    def rewritten(self, nodes: Iterable[AnyNode], renamed: dict[str, str] | None = None) -> Graph:
        """Return the graph with other nodes; reads of renamed values follow."""
        renamed = renamed or {}

        def follow(name: str) -> str:
            while name in renamed:
                name = renamed[name]
            return name

        def renaming(each: AnyNode) -> AnyNode:
            changed = {name: follow(name) for name in each.inputs if name in renamed}
            if not changed:
                return each
            inputs = tuple(changed.get(name, name) for name in each.inputs)
            return replace(each, inputs=inputs, op=each.op.renamed(changed))

        done = tuple(renaming(each) for each in nodes)
        shared = tuple((label, follow(name)) for label, name in self.shared)
        auxiliary = None if self.auxiliary is None else follow(self.auxiliary)
        moved = tuple((tensor, follow(name)) for tensor, name in self.moved)
        output = follow(self.output)
        return replace(
            self, nodes=done, output=output, shared=shared, auxiliary=auxiliary, moved=moved
        )


def shape_of(dims: Dims) -> Shape:
    """Return the stream shape of [b, n, d] or [b, h, n, d]; of a tensor [], [d] or [h, d]."""
    if dims[:1] != ("b",):
        heads = int(dims[0]) if len(dims) == 2 else None
        return Shape("1", int(dims[-1]) if dims else 1, heads)
    if len(dims) == 3:
        return Shape(str(dims[1]), int(dims[2]))
    return Shape(str(dims[2]), int(dims[3]), int(dims[1]))


def is_wide(node: AnyNode) -> bool:
    """Say whether what a node gives stays float32 where the block is in less."""
    return made_by(node, Stage) and node.op.definition.wide


def dims_of(shape: Shape) -> Dims:
    """Return the dimensions a stream has at run time."""
    if shape.heads is None:
        return ("b", shape.tokens, shape.dim)
    return ("b", shape.heads, shape.tokens, shape.dim)


def verify(graph: Graph) -> list[str]:
    """Return what is wrong with a graph; an empty list where it is sound."""
    wrong: list[str] = []
    known: dict[str, AnyNode] = {}
    for node in graph.nodes:
        wrong.extend(
            f"{node.name}: reads `{name}` before it is made"
            for name in node.inputs
            if name not in known
        )
        if node.name in known:
            wrong.append(f"{node.name}: made twice")
        if made_by(node, Stage) and node.op.name not in OPS:
            wrong.append(f"{node.name}: there is no operation `{node.op.name}`")
        elif made_by(node, Stage) and all(name in known for name in node.inputs):
            wrong.extend(_verify_stage(node, [known[name] for name in node.inputs]))
        elif len(node.inputs) < len(node.op.roles):
            wrong.append(f"{node.name}: `{node.op.name}` needs {len(node.op.roles)} inputs")
        known[node.name] = node
    wrong.extend(
        f"`{name}`, which is shared, is not made" for _, name in graph.shared if name not in known
    )
    if graph.output not in known:
        wrong.append(f"the output `{graph.output}` is not made")
    elif known[graph.output].dims != dims_of(graph.block.out.shape):
        wrong.append(f"the output is {known[graph.output].dims}")
    return wrong


def _verify_stage(node: Node[Stage], inputs: list[AnyNode]) -> Iterator[str]:
    stage, given = node.op.definition, node.op.given
    shapes = [shape_of(each.dims) for each in inputs]
    dims = dims_of(stage.shape(shapes, given))
    if dims != node.dims:
        yield f"{node.name}: is {node.dims}, `{stage.name}` gives {dims}"
    if stage.weights(shapes, given) and not node.module:
        yield f"{node.name}: owns tensors and has no module"
