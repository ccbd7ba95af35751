"""Layers that read the layer below: what each gives to the next, and whose cache they read.

layers = [full, reader] * 2,  reader: k = previous.k; v = previous.v

    full     gives the keys and values that its cache holds to the reader above
    reader   keeps no keys; with a cache it reads those of `full`, which therefore holds as
             many tokens as the widest mask of the two needs
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from ...grammar.expr import TRUE
from ...grammar.syntax import Expr
from ..algebra.masks import extent, in_order, remembered, widest
from ..facts import decoding
from ..model import MAPS, PREVIOUS, Apply, Block, Mixing, Pairwise, Read, flow_nodes

Finish = Callable[[tuple[str, ...]], Block]  # the block of a layer that gives these streams


def stack(layers: Sequence[Finish]) -> tuple[Block, ...]:
    """Return the layers of a model, from below; each keeps what the one above reads of it."""
    done: list[Block] = []
    wanted: tuple[str, ...] = ()
    for finish in reversed(layers):
        block = finish(wanted)
        done.insert(0, replace(block, shared=wanted))
        wanted = block.previous
    if not any(block.shared for block in done):
        return tuple(replace(block, shared=None) for block in done)
    return _serving(_lending(_borrowing(done)))


def _borrowing(layers: list[Block]) -> list[Block]:
    """Find out which attentions read keys that a layer below keeps, from below."""
    if any(decoding.obstacle(block) is not None for block in layers):
        return layers  # there are no caches
    done = layers[:1]
    for block in layers[1:]:
        borrows = tuple(
            name for name, mixing in _of_tokens(block) if _borrows(done[-1], block, mixing)
        )
        done.append(replace(block, borrows=borrows))
    return done


def _borrows(below: Block, block: Block, mixing: Mixing) -> bool:
    """Say whether all that an attention reads along its keys is kept by the layer below."""
    read = [_below(block, name) for name in mixing.indexed("j")]
    if None in read[:2] or _in_turn(mixing):
        return False
    there = [each if each == "doc" else below.resolved(each) for each in read if each is not None]
    if len(there) < len(read):
        return False
    for name, other in _of_tokens(below):
        same = [below.resolved(each.name) for each in other.inputs[1:3]] == there[:2]
        if same and not _in_turn(other):
            if name in below.borrows:
                return all(each == "doc" or each.startswith(PREVIOUS) for each in there)
            from ..graph.build import build  # here: no other check needs a graph
            from ..graph.passes.fuse_attend import fuse_attend
            from ..graph.roots import Roots

            roots = Roots(fuse_attend(build(below)))
            streams = {*other.indexed("j"), *there} - {"doc"}
            return not any(map(roots.late, streams))
    return False


def _in_turn(mixing: Mixing) -> bool:
    """Say whether an attention keeps more than the keys and values that it reads at first."""
    return isinstance(mixing.mix, Pairwise) and mixing.mix.in_turn


def _below(block: Block, name: str) -> str | None:
    """Return the name in the layer below of a stream that is read as it is there."""
    source = block.resolved(name)
    if source == "doc":
        return source
    return source.removeprefix(PREVIOUS) if source.startswith(PREVIOUS) else None


def _of_tokens(block: Block) -> Iterator[tuple[str, Mixing]]:
    """Yield the attentions in which the tokens are the queries and the keys."""
    for name, mixing in block.mixings.items():
        if isinstance(mixing.mix, Pairwise) and mixing.queries == mixing.keys == "n":
            yield name, mixing


def _lending(layers: list[Block]) -> list[Block]:
    """Say what each layer gives to the next, from above: of a call's tokens, of all kept."""
    done: list[Block] = []
    shared: tuple[str, ...] = ()
    lends: tuple[str, ...] = ()
    for block in reversed(layers):
        block = replace(block, shared=shared, lends=lends)
        done.insert(0, block)
        borrowed = [name for each in block.borrows for name in block.mixings[each].indexed("j")]
        passed = [name for name in lends if name not in block.lent]
        lends = _names(block, [*borrowed, *passed])
        shared = (*_names(block, [*_read_now(block), *shared]), *_maps(block))
    return done


def _names(block: Block, names: Iterable[str]) -> tuple[str, ...]:
    """Return what streams of a layer are called in the layer below, if they come from there."""
    found = (_below(block, name) for name in names)
    return tuple(dict.fromkeys(each for each in found if each is not None and each != "doc")) + (
        ("doc",) if "doc" in names else ()
    )


def _maps(block: Block) -> tuple[str, ...]:
    return tuple(name for name in MAPS if name in block.previous)


def _read_now(block: Block) -> Iterator[str]:
    """Yield the streams of which a layer reads the tokens of the call, not what was kept."""
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


def _serving(layers: list[Block]) -> tuple[Block, ...]:
    """Let layers that read each other's keys or maps keep the same tokens."""
    done: list[Block] = []
    at = 0
    while at < len(layers):
        end = at + 1
        while end < len(layers) and (layers[end].borrows or _maps(layers[end])):
            end += 1
        done += _together(layers[at:end])
        at = end
    return tuple(done)


def _together(layers: list[Block]) -> list[Block]:
    masks = [list(dict.fromkeys(_masks(block))) for block in layers]
    every = [mask for group in masks for mask in group]
    done = []
    for block, own in zip(layers, masks, strict=True):
        more = tuple(mask for mask in dict.fromkeys(every) if mask not in own)
        if own and more:
            here, all_ = (widest(extent(mask) for mask in group) for group in (own, every))
            if (here.back, here.prefix) != (all_.back, all_.prefix):
                block = replace(block, serves=more)
        done.append(block)
    return done


def _masks(block: Block) -> Iterator[Expr]:
    for _, mixing in _of_tokens(block):
        assert isinstance(mixing.mix, Pairwise)
        ordered = any(map(in_order, mixing.mix.exprs))  # a ring that is borrowed is not
        ordered = ordered or mixing.mix.select is not None
        yield TRUE if ordered else remembered(mixing.mix.mask, mixing.mix.exprs)
