"""Layers that read layers below: what each hands on, and whose cache they read.

layers = [full, reader] * 2,  reader: k = previous.k; v = previous.v

    full     gives the keys and values that its cache holds to the reader above
    reader   keeps no keys; with a cache it reads those of `full`, which therefore holds as
             many tokens as the widest mask of the two needs
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ...grammar.expr import TRUE
from ...grammar.syntax import Expr
from ..algebra.masks import extent, in_order, remembered, widest
from ..facts import decoding
from ..model import (
    Apply,
    Block,
    Mixing,
    Pairwise,
    Read,
    elsewhere,
    flow_nodes,
    is_map_elsewhere,
)

Finish = Callable[[Block, tuple[str, ...]], Block]  # a block that gives these of its streams


Has = Callable[[Block, str], bool]  # whether a block has a stream of this name


def stack(
    layers: Sequence[Block], steps: tuple[int, ...], finish: Finish, has: Has
) -> tuple[Block, ...]:
    """Return the layers of a model, each of which gives what those above read of it."""
    made = _Stack(layers, steps, has)
    if made.finish(finish):
        made.borrow()
        made.lend()
        made.serve()
        return made.layers()
    rest = iter(made.blocks)
    return tuple(layer.using(rest).keeping() for layer in layers)


@dataclass(frozen=True, slots=True)
class _Place:
    """A stream of a block, or with `use` None of a layer itself."""

    layer: int
    use: int | None
    name: str


class _Stack:
    """The layers of a model, and the blocks in them, from below; `wanted` is read of each."""

    def __init__(self, layers: Sequence[Block], steps: tuple[int, ...], has: Has) -> None:
        self.tops, self.steps = layers, steps
        self.blocks: list[Block] = []
        self.at: list[int] = []  # which layer each block is in
        self.uses: list[dict[str, int]] = []  # of each layer: what stands before names → its block
        for at, layer in enumerate(layers):
            placed = list(layer.placed())
            self.uses.append({name: len(self.blocks) + n for n, (name, _) in enumerate(placed)})
            self.blocks += [block for _, block in placed]
            self.at += [at] * len(placed)
        self.drafts, self.has = tuple(self.blocks), has
        self.own: list[dict[str, None]] = [{} for _ in layers]  # read of the layers themselves
        self.shared: list[dict[str, None]] = [{} for _ in self.blocks]  # read of the blocks

    # what is read

    def finish(self, finish: Finish) -> bool:
        """Finish every block, from above, with what is read of it; say whether anything is."""
        for at in reversed(range(len(self.tops))):
            read: dict[str, None] = {}
            for use in self.uses[at].values():
                shared = tuple(self.shared[use])
                self.blocks[use] = replace(finish(self.blocks[use], shared), shared=shared)
                read |= dict.fromkeys(self.blocks[use].below)
            for name in (*read, *self.tops[at].keeping(self.own[at]).below):
                self._want(self._place(at, name))
        if any(self.own) or any(self.shared):
            return True
        self.blocks = [replace(block, shared=None) for block in self.blocks]
        return False

    def _place(self, at: int, name: str) -> _Place:
        """Return what a name means in layer `at`."""
        found = elsewhere(name)
        assert found is not None
        step, label = found
        layer = self.steps[step if step >= 0 else step + self.steps.index(at)]
        before, dot, last = label.rpartition(".")
        use = self.uses[layer].get(f"{before}{dot}")
        if last in ("x", "out") or use is None or not self.has(self.drafts[use], last):
            return _Place(layer, None, last)
        return _Place(layer, use, last)

    def _want(self, place: _Place) -> None:
        table = self.own[place.layer] if place.use is None else self.shared[place.use]
        table[place.name] = None

    def _source(self, use: int, name: str) -> _Place | None:
        """Return what a stream of a block is of another layer, if it is read as it is there."""
        source = self.blocks[use].resolved(name)
        return None if elsewhere(source) is None else self._place(self.at[use], source)

    # what is kept

    def borrow(self) -> None:
        """Find out which attentions read keys that a layer below keeps, from below."""
        if any(decoding.obstacle(block) is not None for block in self.blocks):
            return  # there are no caches
        for use, block in enumerate(self.blocks):
            borrows = [name for name, mixing in _of_tokens(block) if self._borrows(use, mixing)]
            self.blocks[use] = replace(block, borrows=tuple(borrows))

    def _borrows(self, use: int, mixing: Mixing) -> bool:
        """Say whether all that an attention reads along its keys is kept by one block below."""
        own = mixing.indexed("j")
        read = [each for each in own if self.blocks[use].resolved(each) != "doc"]
        places = [self._source(use, each) for each in read]
        sources = {None if each is None else each.use for each in places}
        (source, *more) = sources
        if source is None or more or _in_turn(mixing):
            return False
        below = self.blocks[source]
        there = [below.resolved(each.name) for each in places if each is not None]
        for name, other in _of_tokens(below):
            same = [below.resolved(each.name) for each in other.inputs[1:3]] == there[:2]
            if same and not _in_turn(other):
                if name in below.borrows:
                    return all(elsewhere(each) is not None for each in there)
                return not _late(below, {*other.indexed("j"), *there} - {"doc"})
        return False

    def lend(self) -> None:
        """Say what each block gives to those above: of a call's tokens, of all that is kept."""
        self.shared = [{} for _ in self.blocks]
        lends: list[dict[str, None]] = [{} for _ in self.blocks]
        for at in reversed(range(len(self.tops))):
            for use in self.uses[at].values():
                given = (tuple(self.shared[use]), tuple(lends[use]))
                block = replace(self.blocks[use], shared=given[0], lends=given[1])
                self.blocks[use] = block
                self._lend(use, block, lends)
                for name in (*_read_now(block), *given[0]):
                    if (place := self._source(use, name)) is not None:
                        self._want(place)
                for name in filter(is_map_elsewhere, block.below):
                    self._want(self._place(at, name))
            for name in self.tops[at].keeping(self.own[at]).below:
                self._want(self._place(at, name))

    def _lend(self, use: int, block: Block, lends: list[dict[str, None]]) -> None:
        """Let the blocks that a block borrows from know what they lend."""
        borrowed = [name for each in block.borrows for name in block.mixings[each].indexed("j")]
        passed = [name for name in block.lends if name not in block.lent]
        places = [self._source(use, name) for name in (*borrowed, *passed)]
        known = [each for each in places if each is not None]
        for each in known:
            assert each.use is not None
            lends[each.use][each.name] = None
        if "doc" in (*borrowed, *passed):
            for each in known:
                assert each.use is not None
                lends[each.use]["doc"] = None

    def serve(self) -> None:
        """Let blocks that read each other's keys or maps keep the same tokens."""
        groups = {use: {use} for use in range(len(self.blocks))}
        for use, block in enumerate(self.blocks):
            names = [name for each in block.borrows for name in block.mixings[each].indexed("j")]
            places = [self._source(use, name) for name in names]
            maps = filter(is_map_elsewhere, block.below)
            places += [self._place(self.at[use], name) for name in maps]
            for each in places:
                if each is not None and each.use is not None:
                    both = groups[use] | groups[each.use]
                    groups |= dict.fromkeys(both, both)
        masks = [list(dict.fromkeys(_masks(block))) for block in self.blocks]
        for use, block in enumerate(self.blocks):
            every = [mask for other in sorted(groups[use]) for mask in masks[other]]
            self.blocks[use] = _serving(block, masks[use], every)

    def layers(self) -> tuple[Block, ...]:
        """Return the layers with their blocks, each with what is read of it."""
        rest = iter(self.blocks)
        done = [layer.using(rest) for layer in self.tops]
        return tuple(layer.sharing(tuple(own)) for layer, own in zip(done, self.own, strict=True))


def _late(block: Block, streams: set[str]) -> bool:
    """Say whether some streams depend on what is mixed in their block."""
    from ..graph.build import build  # here: no other check needs a graph
    from ..graph.passes.fuse_attend import fuse_attend
    from ..graph.roots import Roots

    return any(map(Roots(fuse_attend(build(block))).late, streams))


def _in_turn(mixing: Mixing) -> bool:
    """Say whether an attention keeps more than the keys and values that it reads at first."""
    return isinstance(mixing.mix, Pairwise) and mixing.mix.in_turn


def _of_tokens(block: Block) -> Iterator[tuple[str, Mixing]]:
    """Yield the attentions in which the tokens are the queries and the keys."""
    for name, mixing in block.mixings.items():
        if isinstance(mixing.mix, Pairwise) and mixing.queries == mixing.keys == "n":
            yield name, mixing


def _read_now(block: Block) -> Iterator[str]:
    """Yield the streams of which a block reads the tokens of the call, not what was kept."""
    for name, flow in (*((each.name, each.flow) for each in block.streams), ("", block.out)):
        for node in flow_nodes(flow):
            if isinstance(node, Apply):
                yield from (each.name for each in node.inputs if isinstance(each, Read))
            elif isinstance(node, Mixing):
                borrowed = node.indexed("j") if name in block.borrows else ()
                yield from (each.name for each in node.inputs if each.name not in borrowed)
                yield from node.indexed("i") if isinstance(node.mix, Pairwise) else ()
    if isinstance(block.out, Read):
        yield block.out.name


def _serving(block: Block, own: Sequence[Expr], every: Iterable[Expr]) -> Block:
    """Return a block that keeps what all these masks need."""
    more = tuple(mask for mask in dict.fromkeys(every) if mask not in own)
    if own and more:
        here, all_ = (widest(extent(mask) for mask in group) for group in (own, [*own, *more]))
        if (here.back, here.prefix) != (all_.back, all_.prefix):
            return replace(block, serves=more)
    return block


def _masks(block: Block) -> Iterator[Expr]:
    for _, mixing in _of_tokens(block):
        assert isinstance(mixing.mix, Pairwise)
        ordered = any(map(in_order, mixing.mix.exprs))  # a ring that is borrowed is not
        ordered = ordered or mixing.mix.select is not None
        yield TRUE if ordered else remembered(mixing.mix.mask, mixing.mix.exprs)
