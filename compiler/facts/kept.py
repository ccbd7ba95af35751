"""What a block keeps of a sequence between calls, and how many bytes that is.

Keys      keys and values of all tokens, or of a window; once, however many attentions read them
State     the states of a recurrence
Context   what is made of a context, once
Groups    what groups of tokens were pooled to
Tails     the tokens before the next one
Within    what a part of a layer keeps

It is found in the graph, in which equal things are one node. The emitted caches hold this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from ...ops import Shape
from ...ops.shape import axis_size
from ..algebra.masks import Extent, extent, in_order, remembered, widest
from ..graph.graph import AnyNode, Graph, Node, is_wide, made_by, shape_of
from ..graph.operations import Attend, Scan, Stage, Whole
from ..graph.passes import simplest
from ..graph.roots import Roots
from ..graph.sides import KEY, read_along
from ..model import Block, Pairwise


@dataclass(frozen=True, slots=True)
class Held:
    """A stream that is held, by its node, or a sum of what queries made of the keys.

    What is `wide` takes four bytes a number at least, and so does what is `changing`: later tokens
    write it anew.
    """

    name: str
    shape: Shape
    wide: bool = False
    changing: bool = False

    def bytes(self, tokens: int, size: int) -> int:
        count = self.shape.tokens
        own = axis_size(count, tokens)
        size = max(4, size) if self.wide or self.changing else size
        return own * self.shape.features * (8 if self.name == "doc" else size)


@dataclass(frozen=True, slots=True)
class Budget:
    """How many heads hold keys of their own, and how many of them at most; None for all."""

    groups: int
    slots: int | None

    def of(self, tokens: int) -> int:
        """Return how many keys are held at most after so many tokens."""
        return tokens if self.slots is None else min(tokens, self.slots)


@dataclass(frozen=True, slots=True)
class Keys:
    """What the attentions `readers` read of each token before.

    `early` is that of all keys that are there before anything is mixed; it is the first reader
    that brings them. With a `ring`, of the first `prefix` tokens and the last `ring` alone;
    `ordered` is whether they are read in the order of the tokens. With a `budget` it is what is
    held from query to query, and where those tokens stood.
    """

    readers: tuple[str, ...]
    early: bool
    streams: tuple[Held, ...]
    ring: int | None
    prefix: int
    ordered: bool
    budget: Budget | None = None

    def bytes(self, tokens: int, size: int) -> int:
        if self.budget is not None:
            held = self.budget.of(tokens)
            places = 8 * self.budget.groups * held
            return places + sum(each.bytes(held, size) for each in self.streams)
        held = tokens if self.ring is None else min(tokens, self.prefix + self.ring)
        return sum(each.bytes(held, size) for each in self.streams)


@dataclass(frozen=True, slots=True)
class State:
    """The states of a recurrence, so many numbers."""

    recurrence: str
    numbers: int

    def bytes(self, tokens: int, size: int) -> int:  # noqa: ARG002  the same after any number
        return max(4, size) * self.numbers


@dataclass(frozen=True, slots=True)
class Context:
    """What is read of a context once it was given."""

    streams: tuple[Held, ...]

    def bytes(self, tokens: int, size: int) -> int:
        return sum(each.bytes(tokens, size) for each in self.streams)


@dataclass(frozen=True, slots=True)
class Tails:
    """The inputs of stages at the tokens before the next one: node → how many numbers.

    Of stages that carry, it is what they made of all tokens, in float64.
    """

    stages: tuple[tuple[str, int], ...]
    carried: tuple[tuple[str, int], ...] = ()

    def bytes(self, tokens: int, size: int) -> int:  # noqa: ARG002  room for them is there at once
        made = sum(numbers for _, numbers in self.carried)
        return size * sum(numbers for _, numbers in self.stages) + 8 * made


@dataclass(frozen=True, slots=True)
class Groups:
    """What groups of the tokens so far were pooled to."""

    stream: Held

    def bytes(self, tokens: int, size: int) -> int:
        return self.stream.bytes(tokens, size)


@dataclass(frozen=True, slots=True)
class Within:
    """What a part of a layer keeps, by the part's name; of the tokens it is given, if `taken`."""

    part: str
    kept: Kept
    taken: bool = False

    def bytes(self, tokens: int, size: int) -> int:
        return self.kept.bytes(tokens, size)


Part = Keys | State | Context | Groups | Tails | Within


@dataclass(frozen=True, slots=True)
class Kept:
    """All that a block keeps, in the order of its caches."""

    parts: tuple[Part, ...] = ()

    @property
    def keys(self) -> tuple[Keys, ...]:
        """The caches of keys and values."""
        return tuple(each for each in self.parts if isinstance(each, Keys))

    @property
    def of_tokens(self) -> tuple[Keys | Groups, ...]:
        """The caches that have room for so many tokens."""
        return tuple(each for each in self.parts if isinstance(each, Keys | Groups))

    @property
    def context(self) -> tuple[Held, ...]:
        """What is held of a context."""
        found = (each.streams for each in self.parts if isinstance(each, Context))
        return next(found, ())

    def read_by(self, attention: str) -> Keys | None:
        """Return the cache that holds the keys of an attention."""
        return next((each for each in self.keys if attention in each.readers), None)

    def bytes(self, tokens: int, size: int) -> int:
        """Return the bytes held after so many tokens, in numbers of `size` bytes."""
        return sum(each.bytes(tokens, size) for each in self.parts)


@lru_cache(maxsize=256)
def kept(block: Block) -> Kept:
    """Return what a block keeps."""
    return kept_of(simplest(block))


def kept_of(graph: Graph) -> Kept:
    """Return what the block of a graph keeps."""
    roots = Roots(graph)
    of_tokens, of_context = _keys(graph, roots), _context(graph, roots)
    groups = (*_groups(graph),)
    return Kept(
        (*of_tokens, *_states(graph), *of_context, *groups, *_tails(graph), *_within(graph))
    )


def pools(graph: Graph, node: AnyNode) -> bool:
    """Say whether a node makes groups of the tokens of a call."""
    if not made_by(node, Stage) or not node.op.definition.groups:
        return False
    given = graph.node(node.inputs[0]).dims  # a group for each token is no axis of its own
    return "n" in given and "n" not in node.dims


def pooled(graph: Graph) -> tuple[Node[Stage], ...]:
    """Return the nodes that make groups of the tokens of a call."""
    return tuple(each for each in graph.of(Stage) if pools(graph, each))


def _groups(graph: Graph) -> Iterator[Groups]:
    for node in pooled(graph):
        (held,) = _held(graph, (node.name,))
        yield Groups(held)


def _keys(graph: Graph, roots: Roots) -> Iterator[Keys]:
    """Yield the caches of keys and values: one for all that are there from the start.

    What is made of what was mixed before cannot be brought at once, and has one each.
    """
    groups: dict[str | None, list[Node[Attend]]] = {}
    for node in graph.of(Attend):
        tokens = node.dims[2] == "n" and not graph.crosses(node)
        if tokens and node.name not in graph.block.borrows:
            late = any(map(roots.late, along_keys(graph, node)))
            late = late or node.op.mix.in_turn  # what it keeps is known when it is mixed
            groups.setdefault(node.name if late else None, []).append(node)
    for only, nodes in groups.items():
        lent = graph.lent.values() if only is None else ()
        read = (each for node in nodes for each in along_keys(graph, node))
        own = (remembered(node.op.mix.mask, node.op.exprs) for node in nodes)
        reach = widest(map(extent, (*own, *graph.block.serves)))
        ring, prefix = (None, 0) if reach.back is None else (reach.back + 1, reach.prefix)
        readers = tuple(node.name for node in nodes)
        ordered = any(in_order(expr) for node in nodes for expr in node.op.exprs)
        ordered = ordered or any(node.op.mix.select is not None for node in nodes)
        streams = _held(graph, (*read, *lent))
        if nodes[0].op.mix.in_turn:
            streams = _changing(nodes[0], streams)
        budget = budget_of(nodes[0].op.mix, int(nodes[0].dims[1])) if only is not None else None
        if budget is not None:
            ring, prefix = None, 0
        yield Keys(readers, only is None, streams, ring, prefix, ordered, budget)


def budget_of(mix: Pairwise, heads: int) -> Budget | None:
    """Return how many keys stay held from query to query; None where nothing is forgotten.

    They are as many as are chosen and can always stay, by positions, but not more than are seen.
    """
    if mix.keep is None:
        return None
    stays, seen = (_most(extent(each)) for each in (mix.keep.always, mix.mask))
    known = [] if stays is None else [mix.keep.count + stays]
    known += [] if seen is None else [seen]
    return Budget(heads // mix.keep.share, min(known, default=None))


def _most(reach: Extent) -> int | None:
    """Return how many keys are within reach of a query and not after it; None for any number."""
    if reach.low > reach.high:
        return reach.prefix
    return None if reach.back is None else reach.prefix + reach.back + 1


def _changing(node: Node[Attend], streams: tuple[Held, ...]) -> tuple[Held, ...]:
    """Return what an attention holds whose keys later tokens change, or add to sums of."""
    mix, heads = node.op.mix, int(node.dims[1])
    if mix.carry is not None:
        streams = tuple(replace(each, changing=each.name == node.k) for each in streams)
    sums = (
        Held(sums_of(node.name, at), Shape("n", 1, heads), changing=True)
        for at in range(len(mix.running))
    )
    return (*streams, *sums)


def sums_of(attention: str, at: int) -> str:
    """Return what a sum over the queries so far is called, of those of an attention."""
    return f"{attention}_sums_{at}"


def along_keys(graph: Graph, node: Node[Attend]) -> tuple[str, ...]:
    """Return the streams of an attention along its keys: k, v, those indexed by j."""
    return tuple(dict.fromkeys((node.k, node.v, *read_along(graph, node, KEY))))


def _states(graph: Graph) -> Iterator[State]:
    for node in graph.of(Scan):
        numbers = sum(prod(each.kept) for each in node.op.mix.states)
        yield State(node.name, int(node.dims[1]) * numbers)


def _context(graph: Graph, roots: Roots) -> Iterator[Context]:
    """Yield what of the context is read by the rest, where a context is read."""
    if graph.reads_context:
        rest = (node for node in graph.nodes if not roots.far(node.name))
        read = (name for node in rest for name in node.inputs if roots.far(name))
        yield Context(_held(graph, read))


def _tails(graph: Graph) -> Iterator[Tails]:
    """Yield what stages keep that read earlier tokens, where there are such."""
    stages = [
        (node.name, lookback(node) * shape_of(graph.node(node.inputs[0]).dims).features)
        for node in graph.of(Stage)
        if lookback(node)
    ]
    for node in pooled(graph):
        features = shape_of(graph.node(node.inputs[0]).dims).features
        stages.append((node.name, (node.op.given["size"] - 1) * features))
    carried = [
        (node.name, carries(graph, node)) for node in graph.of(Stage) if carries(graph, node)
    ]
    if stages or carried:
        yield Tails(tuple(stages), tuple(carried))


def _within(graph: Graph) -> Iterator[Within]:
    for node in graph.of(Whole):
        if (found := kept(node.op.what)).parts:
            yield Within(node.module, found, node.op.taken is not None)


def lookback(node: AnyNode) -> int:
    """Return how many earlier tokens a node reads, of tokens that a cache is for."""
    if not made_by(node, Stage) or "n" not in node.dims:
        return 0
    return node.op.definition.lookback(node.op.given)


def carries(graph: Graph, node: AnyNode) -> int:
    """Return how many numbers a node makes of all earlier tokens, of those a cache is for."""
    if not made_by(node, Stage) or "n" not in node.dims:
        return 0
    return node.op.definition.carries(graph.shapes(node), node.op.given)


def _held(graph: Graph, names: Iterable[str]) -> tuple[Held, ...]:
    def shape(name: str) -> Shape:
        return Shape("n", 1) if name == "doc" else shape_of(graph.node(name).dims)

    def wide(name: str) -> bool:
        return name != "doc" and is_wide(graph.node(name))

    return tuple(Held(name, shape(name), wide(name)) for name in dict.fromkeys(names))
