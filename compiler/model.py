"""The checked architecture: every name resolved, every dimension a number.

`check` makes these from syntax; `reference` gives them their meaning; `build` lowers them
to a graph. Scalar expressions stay trees, but what they may read is now fixed:

    score, mask, weights …   s p sum tau i j h n m seen, and t[…] for streams and tensors
    mixer statements         q k v, states, streams, tensors, sizes as numbers
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import floor
from typing import TypeGuard

from ..grammar.diagnostics import Diagnostic
from ..grammar.expr import FALSE, TRUE, fold, names
from ..grammar.source import NOWHERE, Span
from ..grammar.syntax import Binary, Call, Compare, Expr, File, Index, Name, Unary, walk
from ..ops import Shape, Weight

MAPS = ("s", "p")  # the logits and the weights of `o`, which layers above may read
# What a model gives to those of its layers that read it, and to their parts: the outputs of all
# layers below [layer + 1, n, width], one token that meets all, the ids of the tokens [n, 1], how
# often the layer has run before, one number.
OFFERED = ("earlier", "condition", "tokens", "turn")

# ── names of streams in other layers ─────────────────────────────────────────────────────

_ELSEWHERE = re.compile(r"(?:previous|at\[(-?\d+)\])\.(.+)")


def elsewhere(name: str) -> tuple[int, str] | None:
    """Return the layer that a stream is of, and what it is called there; None for one's own.

    Layers are numbered as they run, below 0 back from the one that reads. With several blocks in a
    layer the name says which: `attn.k`.
    """
    found = _ELSEWHERE.fullmatch(name)
    return None if found is None else (int(found[1] or -1), found[2])


def there(step: int, name: str) -> str:
    """Return the name here of a stream in another layer: `previous.k`, `at[-3].k`, `at[0].k`."""
    return f"previous.{name}" if step == -1 else f"at[{step}].{name}"


def is_map_elsewhere(name: str) -> bool:
    """Say whether a name is the map of another layer."""
    found = elsewhere(name)
    return found is not None and found[1].rpartition(".")[2] in MAPS


# ── streams ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Read:
    """A stream by name: `x`, `context`, one the block declares, one of `elsewhere`."""

    name: str
    shape: Shape
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Apply:
    """An operation of `ops.OPS` on streams; its tensors live in the submodule `module`."""

    op: str
    inputs: tuple[Flow, ...]
    options: tuple[tuple[str, object], ...]
    shape: Shape
    module: str = ""
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Mixing:
    """Tokens mix: the heads that queries gather from what they see, [heads, queries, value_dim].

    `inputs` are the streams it reads: q, k and v first where the mix is pairwise.
    """

    mix: Pairwise | Recurrence
    inputs: tuple[Read, ...]
    shape: Shape
    span: Span = field(default=NOWHERE, compare=False, repr=False)

    @property
    def heads(self) -> int:
        assert self.shape.heads is not None
        return self.shape.heads

    @property
    def queries(self) -> str:
        """The tokens that i counts."""
        return self.shape.tokens

    @property
    def keys(self) -> str:
        """The tokens that j counts."""
        return self.inputs[1].shape.tokens if isinstance(self.mix, Pairwise) else self.queries

    @property
    def crosses(self) -> bool:
        """Whether queries and keys are different lists of tokens."""
        return self.keys != self.queries

    def indexed(self, at: str) -> tuple[str, ...]:
        """Return the streams read along the keys (j) or queries (i) of a pairwise mix."""
        mix = self.mix
        assert isinstance(mix, Pairwise)
        first = self.inputs[1:3] if at == "j" else self.inputs[:1]
        read = indexed(mix.exprs, self.inputs, at)
        return tuple(dict.fromkeys((*(each.name for each in first), *read)))


def _documents(at: str, other: str) -> Compare:
    sides = (Index(Name("doc"), (Name(at),)), Index(Name("doc"), (Name(other),)))
    return Compare(sides, ("==",))


SAME_DOCUMENT = (_documents("i", "j"), _documents("j", "i"))  # `document`, and turned


def without_document(mask: Expr) -> Expr:
    """Return a mask without the demand that query and key are of one document."""
    match mask:
        case Binary("and", left, right):
            rest = [each for each in map(without_document, (left, right)) if each != TRUE]
            return (
                TRUE if not rest else rest[0] if len(rest) == 1 else Binary("and", rest[0], rest[1])
            )
        case _:
            return TRUE if mask in SAME_DOCUMENT else mask


def indexed(exprs: Iterable[Expr], inputs: tuple[Read, ...], at: str) -> list[str]:
    """Return the streams that expressions read by the token i or j."""
    streams = {"doc", *(each.name for each in inputs)}
    return [
        node.base.id
        for expr in exprs
        for node in walk(expr)
        if isinstance(node, Index) and isinstance(node.base, Name) and node.base.id in streams
        if any(at in names(item) for item in node.items)
    ]


@dataclass(frozen=True, slots=True)
class Statistic:
    """A number for every row or column of a map, [heads, tokens, 1].

    `kind`: `lse` is the logarithm of the normaliser's denominator, 0 where it is zero; `joint`
    the same, but -inf there, which is what it weighs; `entropy` that of the row,
    `rows` the sum of `expr` over the visible keys, `columns` over the queries that see a key.
    Of kind `map` it is no number, but all weights of a row, without a gradient.
    The first of the inputs is what was mixed, the others are what `expr` reads.
    """

    kind: str
    expr: Expr | None
    inputs: tuple[Read, ...]
    shape: Shape
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Part:
    """A stage that is a whole by itself: a block, a layer, a feed-forward, a stage with tensors.

    Its tensors live in the submodule `module`. It takes one stream; experts take a second one,
    what each of them weighs for each token, [n, experts]. Parts with one `once`, the place of a
    text, have the same tensors: those of the first of them. A part that is `taken` runs on some
    tokens alone, of which a second stream [n, 1] is not 0; it gives 0 at the others.
    """

    what: Block
    inputs: tuple[Flow, ...]
    shape: Shape
    module: str = ""
    span: Span = field(default=NOWHERE, compare=False, repr=False)
    once: Span | None = None
    taken: Taken | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """How many tokens of a sequence are taken at most: a number, or a share; None if not known."""

    count: int | None = None
    share: float | None = None

    def of(self, tokens: int) -> int:
        """Return how many of so many tokens are taken at most."""
        most = tokens if self.share is None else max(1, floor(self.share * tokens))
        return most if self.count is None else min(self.count, tokens)


Flow = Read | Apply | Mixing | Statistic | Part


def flow_nodes(flow: Flow, seen: set[int] | None = None) -> Iterator[Flow]:
    """Yield every node of a flow, inputs first, and once where several read the same one."""
    seen = set() if seen is None else seen
    if id(flow) in seen:
        return
    seen.add(id(flow))
    if not isinstance(flow, Read):
        for each in flow.inputs:
            yield from flow_nodes(each, seen)
    yield flow


def flow_mapped(
    flow: Flow, change: Callable[[Apply | Part], Flow], done: dict[int, Flow] | None = None
) -> Flow:
    """Return a flow with every operation and part changed, once, inputs before what reads them."""
    done = {} if done is None else done
    if not isinstance(flow, Apply | Part):
        return flow
    if id(flow) not in done:
        inputs = tuple(flow_mapped(each, change, done) for each in flow.inputs)
        done[id(flow)] = change(replace(flow, inputs=inputs))
    return done[id(flow)]


def is_part(flow: Flow) -> TypeGuard[Part]:
    """Say whether a flow is a block, a layer or a feed-forward, with a name of its own."""
    return isinstance(flow, Part) and flow.what.kind != "stage"


def applies(flow: Flow) -> Iterator[Apply]:
    """Yield the operations of a flow, inputs before what reads them."""
    return (node for node in flow_nodes(flow) if isinstance(node, Apply))


@dataclass(frozen=True, slots=True)
class Stream:
    """`let name = flow`, q, k and v, and what is mixed: `o` and the branches."""

    name: str
    flow: Flow

    @property
    def shape(self) -> Shape:
        return self.flow.shape


def reaching(streams: Mapping[str, Stream], ends: Iterable[Flow]) -> set[str]:
    """Return the streams that reach the output, or what training adds to the loss."""
    found: set[str] = set()
    stack = list(ends)
    while stack:
        for node in flow_nodes(stack.pop()):
            if isinstance(node, Read) and node.name in streams and node.name not in found:
                found.add(node.name)
                stack.append(streams[node.name].flow)
    return found


# ── how tokens mix ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Normalizer:
    """Scores → weights.

    Without `where`: p = numerator / denominator, the denominator (None for 1) in `sum`, the
    row sum of the numerator over visible keys. With `where`: p = numerator, which reads the
    row threshold `tau` that makes the condition true. `name` is for people.
    """

    name: str
    numerator: Expr
    denominator: Expr | None = None
    where: Expr | None = None

    @property
    def exprs(self) -> tuple[Expr, ...]:
        """The numerator, and the denominator where it has one."""
        return (self.numerator,) if self.denominator is None else (self.numerator, self.denominator)

    def mapped(self, change: Callable[[Expr], Expr]) -> Normalizer:
        """Return it with each of these changed."""
        numerator, *rest = map(change, self.exprs)
        return replace(self, numerator=numerator, denominator=rest[0] if rest else None)


def _running(*exprs: Expr) -> tuple[Expr, ...]:
    found: dict[Expr, None] = {}
    for expr in exprs:
        for node in reversed(list(walk(expr))):
            match node:
                case Call("running_queries", (arg,)):
                    found[arg] = None
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Select:
    """Which of the visible keys a query reads, by content: groups of them, by a score.

    `kind` is top (the `amount` best), above (a threshold) or mass (the fewest whose softmax reaches
    a share). `size` keys that stand together are a group, `rows` queries choose together, and so do
    `share` heads that stand together. A group is free to be chosen where one of them sees a key of
    it that is `among` and not `always`; what is always is read whatever is chosen, and with
    `counted` the groups of such keys count as chosen. A score is the same all over a group, or a
    group has the maximum, sum, mean or logarithm of the sum of exponentials `within` it, of its
    pairs that are free; of heads that share it is the sum. Of equal scores the first is better. A
    score may read `s`, before `score`; it is another for each head, or not `by_heads`, and then it
    is no sum. It may be the choice of a layer `elsewhere`, by streams of that.
    """

    kind: str
    amount: float
    score: Expr
    size: int = 1
    rows: int = 1
    share: int = 1
    always: Expr = FALSE
    counted: bool = False
    among: Expr = TRUE
    within: str = ""
    by_heads: bool = True
    elsewhere: bool = False

    @property
    def exprs(self) -> tuple[Expr, ...]:
        """Every expression of a pair."""
        return (self.score, self.always, self.among)

    @property
    def running(self) -> tuple[Expr, ...]:
        """What its score sums over the queries up to one, inner ones first."""
        return _running(self.score)

    def candidates(self, mask: Expr) -> Expr:
        """Return which pairs that a mask shows make their group one that may be chosen."""
        free = Binary("and", mask, Unary("not", self.always))
        return fold(Binary("and", free, self.among))

    def mapped(self, change: Callable[[Expr], Expr]) -> Select:
        """Return it with each of these changed."""
        score, always, among = map(change, self.exprs)
        return replace(self, score=score, always=always, among=among)


@dataclass(frozen=True, slots=True)
class Keep:
    """Which keys stay held from one query to the next; what does not is gone for good.

    Query i reads, of the keys that were held after the query before it and its own, those that the
    mask shows it. Of these stay held: what is `always`, and of the others the `count` with the best
    score, which may read `s` before `score`, the weights `p` before `weights`, and `o`, the vector
    that p mixes of the values. `share` heads that stand together hold the same: what one of them
    reads, by the sum of the scores of those that do. Of equal scores the first is better.
    `running_queries` sums over the queries so far.
    """

    count: int
    score: Expr
    share: int = 1
    always: Expr = FALSE

    @property
    def exprs(self) -> tuple[Expr, ...]:
        """Every expression of a pair."""
        return (self.score, self.always)

    @property
    def running(self) -> tuple[Expr, ...]:
        """What its score sums over the queries up to one, inner ones first."""
        return _running(self.score)

    def mapped(self, change: Callable[[Expr], Expr]) -> Keep:
        """Return it with each of these changed."""
        return replace(self, score=change(self.score), always=change(self.always))


@dataclass(frozen=True, slots=True)
class Pairwise:
    """`mix = attend`: every query against every key.

    `similarity` is an expression in q[h, i] and k[…, j]; None is their product. With `again`, an
    expression over h and j, what is mixed is in the values itself, so many times: the mask shows
    earlier tokens alone, and v is the values without it. `carry` is what each further token does
    to the keys before it, linear in `k`, over streams of that token for a key head, as a mixer's
    statement is; None for nothing.
    """

    scale: float
    score: Expr
    mask: Expr
    normalize: Normalizer
    weights: Expr
    dropout: float = 0.0
    similarity: Expr | None = None
    again: Expr | None = None
    carry: Expr | None = None
    select: Select | None = None
    keep: Keep | None = None

    @property
    def in_turn(self) -> bool:
        """Whether tokens leave more behind than their keys and values, each after the one before.

        What is mixed goes into values, tokens change or forget keys, or queries add to sums over
        the keys.
        """
        further = (self.again, self.carry, self.keep)
        return any(each is not None for each in further) or bool(self.running)

    @property
    def running(self) -> tuple[Expr, ...]:
        """What its expressions sum over the queries up to one, inner ones first.

        What a selection sums comes first: it sees what is not chosen too. What says which keys are
        held sums of those alone.
        """
        chosen = () if self.select is None else self.select.running
        chosen += () if self.keep is None else self.keep.running
        return (*chosen, *_running(self.score, self.weights))

    @property
    def exprs(self) -> tuple[Expr, ...]:
        """Every expression of a pair."""
        met = () if self.similarity is None else (self.similarity,)
        again = () if self.again is None else (self.again,)
        chosen = () if self.select is None else self.select.exprs
        chosen += () if self.keep is None else self.keep.exprs
        return (*met, self.score, self.mask, *chosen, *self.normalize.exprs, self.weights, *again)

    def mapped(self, change: Callable[[Expr], Expr]) -> Pairwise:
        """Return it with each of these changed."""
        return replace(
            self,
            score=change(self.score),
            mask=change(self.mask),
            normalize=self.normalize.mapped(change),
            weights=change(self.weights),
            similarity=None if self.similarity is None else change(self.similarity),
            again=None if self.again is None else change(self.again),
            select=None if self.select is None else self.select.mapped(change),
            keep=None if self.keep is None else self.keep.mapped(change),
        )


@dataclass(frozen=True, slots=True)
class State:
    """What a recurrence remembers, per head; `init` is a number or reads tensors[h].

    With `weights`, a vector of the current token, it is kept in as many levels, one for each
    node of a Fenwick tree over the tokens so far (Guo et al. 2025). Before token i (from 0, in
    its document) levels 0 … z are merged into level z + 1, z the number of zeros at the end of
    i; the last level takes what would go beyond. A statement that writes the state is affine in
    it: its linear part is of every level, the rest goes into level 0. Whatever else reads the
    state reads the sum of weights[l] * level l.
    """

    name: str
    shape: tuple[int, ...]
    init: Expr
    weights: Expr | None = None
    levels: int = 0

    @property
    def kept(self) -> tuple[int, ...]:
        """The shape of what is remembered, levels first."""
        return (self.levels, *self.shape) if self.levels else self.shape


@dataclass(frozen=True, slots=True)
class Update:
    """`name <- value`; the name `o` is the output."""

    name: str
    value: Expr


@dataclass(frozen=True, slots=True)
class Recurrence:
    """A mixer with state: the statements run once a token, top to bottom, per query head.

    In them q, k, v and streams with heads are vectors; a stream without heads is its slice
    for the head: a number where it has one feature a head. A vector times a matrix scales
    the rows. `causal` is false for the bidirectional form: all updates first, then outputs.
    `resets`: the states start anew where the segment of a token differs from the one before.
    """

    name: str
    states: tuple[State, ...]
    updates: tuple[Update, ...]
    causal: bool = True
    resets: bool = False

    @property
    def leveled(self) -> tuple[State, ...]:
        """The states that are kept in levels."""
        return tuple(each for each in self.states if each.levels)

    @property
    def exprs(self) -> tuple[Expr, ...]:
        """Every expression: of the statements, of what states begin with and are weighed by."""
        weights = (each.weights for each in self.states if each.weights is not None)
        return (
            *(each.value for each in self.updates),
            *(each.init for each in self.states),
            *weights,
        )

    @property
    def written(self) -> frozenset[str]:
        """The names that the statements write, and the states."""
        states = {each.name for each in self.states}
        return frozenset(states.union(each.name for each in self.updates))

    def mapped(self, change: Callable[[Expr], Expr]) -> Recurrence:
        """Return it with every expression changed."""
        updates = (replace(each, value=change(each.value)) for each in self.updates)
        states = (
            replace(
                each,
                init=change(each.init),
                weights=None if each.weights is None else change(each.weights),
            )
            for each in self.states
        )
        return replace(self, updates=tuple(updates), states=tuple(states))


@dataclass(frozen=True, slots=True)
class Experts:
    """How many a feed-forward is, each with tensors of its own, and how many a token is sent to.

    `most` of them at most; None where that depends on the data. Whom a token weighs 0, it is not
    sent to, and such a weight has no gradient.
    """

    count: int
    most: int | None = None


# ── blocks and models ────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)  # without slots, so that what follows from it is found out once
class Block:
    """A block, or what it is a part of: a layer, a feed-forward, a stage, a model's two ends.

    `kind` says which; only in a block tokens mix. `streams` come in an order in which each reads
    earlier ones. The sizes are those of the block itself; a branch may have others, which its
    streams show. A stage takes what comes in as it is; `given` is its shape, of all others
    [n, width]. With `experts` it is so many feed-forwards, whose tensors are stacked.

    The last fields are of a layer among others. `shared` is what layers above read of this
    one, at the tokens of a call; None where no layer of the model reads another. With a cache,
    the mixings in `borrows` read the keys that a layer below keeps; of `lends`, layers above
    read all tokens that are kept; and what is kept must serve the masks in `serves` too.
    """

    name: str
    width: int
    context_width: int | None
    heads: int
    kv_heads: int
    value_heads: int
    head_dim: int
    value_dim: int
    streams: tuple[Stream, ...]
    tensors: tuple[Weight, ...]
    out: Flow
    regularize: Flow | None = None  # a number that training adds to the loss
    moves: tuple[Stream, ...] = ()  # what a forward pass in training sets tensors to, after it
    span: Span = field(default=NOWHERE, compare=False, repr=False)
    shared: tuple[str, ...] | None = None
    borrows: tuple[str, ...] = ()
    lends: tuple[str, ...] = ()
    serves: tuple[Expr, ...] = ()
    kind: str = "block"
    given: Shape | None = None
    experts: Experts | None = None

    @property
    def x(self) -> Shape:
        """The shape of what comes in."""
        return Shape("n", self.width) if self.given is None else self.given

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Its parts, in the order in which they are run."""
        return tuple(
            node for flow in self.flows for node in flow_nodes(flow) if isinstance(node, Part)
        )

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """What of `OFFERED` it reads, or a part of it."""
        own = {each.name for each in self.streams} | {each.name for each in self.tensors}
        nodes = [node for flow in self.flows for node in flow_nodes(flow)]
        read = {node.name for node in nodes if isinstance(node, Read)} - own
        read = read.union(*(each.what.reads for each in self.parts))
        return tuple(name for name in OFFERED if name in read)

    @cached_property
    def shares(self) -> tuple[Span, ...]:
        """The `once` of its parts, and of theirs, in the order in which they are run."""
        found: dict[Span, None] = {}
        for part in self.parts:
            found |= dict.fromkeys(part.what.shares)
            found |= {} if part.once is None else {part.once: None}
        return tuple(found)

    @property
    def uses(self) -> tuple[Block, ...]:
        """The blocks in which tokens mix: itself, or those of its parts, in order."""
        if self.kind == "block":
            return (self,)
        return tuple(block for part in self.parts for block in part.what.uses)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The different ones of these."""
        return tuple(dict.fromkeys(self.uses))

    def using(self, blocks: Iterator[Block]) -> Block:
        """Return it with other blocks in the places of `uses`, taken in order."""
        if self.kind == "block":
            return next(blocks)

        def changed(node: Apply | Part) -> Flow:
            return replace(node, what=node.what.using(blocks)) if isinstance(node, Part) else node

        streams = tuple(
            replace(each, flow=flow_mapped(each.flow, changed)) for each in self.streams
        )
        return replace(self, streams=streams, out=flow_mapped(self.out, changed))

    @property
    def flows(self) -> tuple[Flow, ...]:
        """Every flow: of the streams, of the output, of what only training does."""
        return (*(each.flow for each in self.streams), self.out, *self.aside)

    @property
    def aside(self) -> tuple[Flow, ...]:
        """What only training does: the term of the loss, and what it moves tensors to."""
        added = () if self.regularize is None else (self.regularize,)
        return (*added, *(each.flow for each in self.moves))

    @property
    def moving(self) -> bool:
        """Whether training moves a tensor of its own, or of a part."""
        return bool(self.moves) or any(each.what.moving for each in self.parts)

    def stream(self, name: str) -> Stream | None:
        return next((each for each in self.streams if each.name == name), None)

    @property
    def mixings(self) -> dict[str, Mixing]:
        """What mixes tokens, by name: `o`, and the branches."""
        return {each.name: each.flow for each in self.streams if isinstance(each.flow, Mixing)}

    @cached_property
    def marks(self) -> bool:
        """Whether segments only mark tokens: an expression says itself what documents mean.

        Else each segment of a row is a sequence of its own, that nothing else reaches.
        """
        if any(each.what.marks for each in self.parts):
            return True
        read: list[Expr] = []
        for flow in (node for each in self.flows for node in flow_nodes(each)):
            if isinstance(flow, Mixing) and isinstance(flow.mix, Pairwise):
                mix = flow.mix
                met = () if mix.similarity is None else (mix.similarity,)
                read += [
                    *met,
                    mix.score,
                    without_document(mix.mask),
                    *mix.normalize.exprs,
                    mix.weights,
                ]
            elif isinstance(flow, Statistic) and flow.expr is not None:
                read.append(flow.expr)
        return any("doc" in names(each) for each in read)

    @cached_property
    def below(self) -> tuple[str, ...]:
        """What its text reads of layers below: streams, and `s` and `p` of maps."""
        read: dict[str, None] = {}
        for flow in self.flows:
            for node in flow_nodes(flow):
                if isinstance(node, Read):
                    read[node.name] = None
                elif isinstance(node, Mixing) and isinstance(node.mix, Pairwise):
                    exprs = (node.mix.score, node.mix.weights)
                    read |= {name: None for expr in exprs for name in sorted(names(expr))}
                elif isinstance(node, Part) and node.what.kind != "block":
                    read |= dict.fromkeys(node.what.below)
        return tuple(each for each in read if elsewhere(each) is not None)

    def placed(self, prefix: str = "") -> Iterator[tuple[str, Block]]:
        """Yield `uses` with what stands before their streams' names above: `attn.`, or nothing."""
        if self.kind == "block":
            yield prefix, self
        several = len(self.uses) > 1
        for part in () if self.kind == "block" else self.parts:
            yield from part.what.placed(f"{prefix}{part.module}." if several else prefix)

    def sharing(self, names: tuple[str, ...]) -> Block:
        """Return a layer, and those in it, as one of which others read streams of its own."""
        if self.kind == "block":
            return self

        def changed(node: Apply | Part) -> Flow:
            if isinstance(node, Part) and node.what.kind == "layer":
                return replace(node, what=node.what.sharing(()))
            return node

        kept = self.keeping(names)
        streams = (replace(each, flow=flow_mapped(each.flow, changed)) for each in kept.streams)
        out = flow_mapped(self.out, changed)
        return replace(kept, streams=tuple(streams), out=out, shared=names)

    def keeping(self, names: Iterable[str] = ()) -> Block:
        """Return it with the streams that reach its output, or are among the names."""
        ends = [self.out, *self.aside]
        own = {each.name: each for each in self.streams}
        ends += [Read(name, own[name].shape) for name in names if name in own]
        kept = reaching(own, ends)
        return replace(self, streams=tuple(each for each in self.streams if each.name in kept))

    def resolved(self, name: str) -> str:
        """Return what a stream is that only gives another one a new name."""
        while (stream := self.stream(name)) is not None and isinstance(stream.flow, Read):
            name = stream.flow.name
        return name

    @property
    def lent(self) -> tuple[str, ...]:
        """What of `lends` this layer keeps itself; the rest it hands on."""
        doc = ("doc",) if "doc" in self.lends else ()
        borrowed = {
            self.resolved(name)
            for mixing in (self.mixings[each] for each in self.borrows)
            for name in mixing.indexed("j")
        }
        own = tuple(
            name for name in self.lends if name != "doc" and self.resolved(name) not in borrowed
        )
        return (*own, *doc) if own else ()

    @property
    def stacked(self) -> bool:
        """Whether it is told what the layers below gave, as some of the model reads others."""
        told = self.shared is not None or bool(self.below)
        return told or any(each.what.stacked for each in self.parts)

    def alone(self) -> Block:
        """Return the block as it is by itself, where no layer stands above it."""
        return replace(self.keeping(), shared=None, borrows=(), lends=(), serves=())

    def remixed(self, change: Callable[[Pairwise], Pairwise]) -> Block:
        """Return the block with every pairwise mix changed."""

        def changed(stream: Stream) -> Stream:
            flow = stream.flow
            if isinstance(flow, Mixing) and isinstance(flow.mix, Pairwise):
                return replace(stream, flow=replace(flow, mix=change(flow.mix)))
            return stream

        return replace(self, streams=tuple(changed(each) for each in self.streams))


@dataclass(frozen=True)
class Patches:
    """What cuts images [b, channels, rows · height, cols · width] into patches, row by row.

    `size` is (height, width) of one, which becomes the token of a linear map, `embed`. Where it is
    known, `image` is that of the images.
    """

    size: tuple[int, int]
    channels: int
    embed: Block
    image: tuple[int, int] | None = None

    @property
    def dim(self) -> int:
        """The numbers of one patch."""
        return self.channels * self.size[0] * self.size[1]

    @property
    def grid(self) -> tuple[int, int] | None:
        """The rows and columns of patches, where the size of images is known."""
        if self.image is None:
            return None
        return self.image[0] // self.size[0], self.image[1] // self.size[1]


@dataclass(frozen=True)
class Model:
    """A stack of layers between two ends. `vocab` None takes raw features [b, n, width], or, with
    `patches`, images [b, channels, height, width] or patches that are cut already [b, n, dim].

    `embed` is done to what the layers are given, `head` to what they give; their tensors are the
    model's own. With `lanes` the stream between is so many, [lanes, n, width]; it begins as copies.
    The context passes through the `encoder` first, where there is one. `condition` is the width of
    the one token that meets all, where a layer reads it. `steps` are the numbers of the layers in
    the order they run; one that runs again has the same weights, and a cache for each time.
    `memory` is how many learned tokens stand before those of each sequence, between the two ends.
    """

    name: str
    vocab: int | None
    width: int
    layers: tuple[Block, ...]
    embed: Block
    head: Block
    embed_position: str  # none, learned, sinusoidal
    positions: int  # how many a learned table holds
    dropout: float
    span: Span = field(default=NOWHERE, compare=False, repr=False)
    encoder: Model | None = None
    lanes: int | None = None
    condition: int | None = None
    steps: tuple[int, ...] = ()
    memory: int | None = None
    patches: Patches | None = None

    @property
    def turns(self) -> tuple[int, ...]:
        """How often the layer of each step has run before."""
        return tuple(self.steps[:at].count(place) for at, place in enumerate(self.steps))

    @property
    def taken(self) -> int:
        """The features of a token that comes in, where it is none of a vocabulary."""
        return self.width if self.patches is None else self.patches.dim

    @property
    def ends(self) -> tuple[Block, ...]:
        """What is done before and after the layers, in order."""
        first = () if self.patches is None else (self.patches.embed,)
        return (*first, self.embed, self.head)

    @property
    def run(self) -> tuple[Block, ...]:
        """The layers as they are run."""
        return tuple(self.layers[at] for at in self.steps)

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """What of `OFFERED` its layers read."""
        read = {name for layer in self.layers for name in layer.reads}
        return tuple(name for name in OFFERED if name in read)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The different blocks: those of the layers, then those of the encoder."""
        more = () if self.encoder is None else self.encoder.blocks
        return tuple(dict.fromkeys((*self.uses, *more)))

    @cached_property
    def uses(self) -> tuple[Block, ...]:
        """The blocks of the layers as they are run, however often each is used."""
        return tuple(block for layer in self.run for block in layer.uses)

    @property
    def stacked(self) -> bool:
        """Whether layers read the ones below."""
        return any(layer.stacked for layer in self.layers)

    @property
    def classifies(self) -> bool:
        """Whether there is one answer for each row, and not one for each token."""
        return self.head.out.shape.tokens == "1"

    @cached_property
    def marks(self) -> bool:
        """Whether segments only mark tokens, as one of the layers says what they mean."""
        return any(block.marks for block in self.layers)


@dataclass(frozen=True, repr=False)
class Architecture:
    """A checked file. `blocks` and `models` are elaborated at their default sizes."""

    file: File
    blocks: dict[str, Block]
    models: dict[str, Model]
    warnings: tuple[Diagnostic, ...] = ()

    @property
    def text(self) -> str:
        """The file as formatted Loom."""
        from ..grammar.format import format_loom

        return format_loom(self.file).rstrip()

    def __repr__(self) -> str:
        return self.text
