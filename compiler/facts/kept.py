"""How many bytes decoding keeps of one sequence, as the emitted caches hold them.

keys and values      of all tokens, or of a window; once, however many attentions read them
a context            what its keys and values are made to, once
a recurrence         its states
short convolutions   the tokens before the next one
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod

from ...ops import OPS, Shape
from ..algebra.masks import extent, remembered, widest
from ..model import (
    Apply,
    Block,
    Flow,
    Mixing,
    Pairwise,
    Read,
    Recurrence,
    Statistic,
    applies,
    flow_nodes,
    indexed,
)


def kept_bytes(block: Block, tokens: int, size: int) -> int:
    """Return the bytes kept after so many tokens, in numbers of `size` bytes."""
    total = size * _tails(block)
    groups: dict[str, list[tuple[str, Mixing]]] = {}
    for name, mixing in block.mixings.items():
        if name in block.borrows:
            continue
        if isinstance(mixing.mix, Recurrence):
            states = sum(prod(state.kept) for state in mixing.mix.states)
            total += max(4, size) * mixing.heads * states
        elif mixing.queries == "n" and mixing.keys in ("n", "m"):
            early = mixing.keys == "m" or not _late(block, name, mixing)
            groups.setdefault(mixing.keys if early else name, []).append((name, mixing))
    for name, group in groups.items():
        held = tokens
        if name != "m":
            own = (remembered(_pairwise(each).mask, each.mix.exprs) for _, each in group)
            masks = (*own, *block.serves)
            seen = widest(map(extent, masks))
            if seen.back is not None:
                held = min(tokens, seen.prefix + seen.back + 1)
        lent = block.lent if name == "n" else ()
        keyed = _keyed(block, group, lent)
        if name == "m":  # the layer below gives its own of the context again
            keyed = tuple(each for each in keyed if _of_context(block, Read(each, Shape("m", 1))))
        total += held * sum(_width(block, each, size) for each in keyed)
    return total


def _pairwise(mixing: Mixing) -> Pairwise:
    assert isinstance(mixing.mix, Pairwise)
    return mixing.mix


def _late(block: Block, name: str, mixing: Mixing) -> bool:
    """Say whether keys and values are made of what was mixed before."""
    return any(late(block, each) for each in _keyed(block, [(name, mixing)]))


def late(block: Block, name: str) -> bool:
    """Say whether a stream is made of what was mixed before, or is mixed itself."""
    return _mixes(block, Read(name, Shape("n", 1)))


def _mixes(block: Block, flow: Flow) -> bool:
    if isinstance(flow, Mixing):
        return True
    streams = (block.stream(node.name) for node in flow_nodes(flow) if isinstance(node, Read))
    return any(isinstance(node, Mixing) for node in flow_nodes(flow)) or any(
        _mixes(block, each.flow) for each in streams if each is not None
    )


def _of_context(block: Block, flow: Flow) -> bool:
    streams = [(node.name, block.stream(node.name)) for node in flow_nodes(flow)
               if isinstance(node, Read)]  # fmt: skip
    return any(
        name == "context" or (stream is not None and _of_context(block, stream.flow))
        for name, stream in streams
    )


def _tails(block: Block) -> int:
    """Return how many numbers the stages keep that read earlier tokens."""
    return sum(
        node.shape.features * OPS[node.op].lookback(dict(node.options))
        for flow in block.flows
        for node in applies(flow)
        if node.shape.tokens == "n"
    )


def _width(block: Block, name: str, size: int) -> int:
    stream = block.stream(name)
    if stream is not None:
        return stream.shape.features * size
    widths = {"x": block.width * size, "context": (block.context_width or 0) * size, "doc": 8}
    return widths[name]


def _keyed(
    block: Block, mixings: Iterable[tuple[str, Mixing]], lent: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Return what a cache keeps of each token: k, v, what expressions index by j, what is lent."""
    made: dict[Flow, str] = {}
    read = [name for own, mixing in mixings
            for name in (*mixing.indexed("j"), *_asked(block, own))]  # fmt: skip
    for name in (*read, *lent):
        stream = block.stream(name)
        flow = _inlined(block, stream.flow) if stream is not None else Read(name, Shape("n", 1))
        made.setdefault(flow, name)
    return tuple(made.values())


def _asked(block: Block, own: str) -> list[str]:
    """Return the streams along the keys that numbers of an attention's rows read."""
    asked = [node for flow in block.flows for node in flow_nodes(flow)
             if isinstance(node, Statistic) and node.inputs[0].name == own]  # fmt: skip
    return [name for node in asked if node.expr is not None
            for name in indexed((node.expr,), node.inputs, "j")]  # fmt: skip


def _inlined(block: Block, flow: Flow) -> Flow:
    """Return a flow in terms of x and context: equal flows are computed, and kept, once."""
    match flow:
        case Apply():
            return replace(flow, inputs=tuple(_inlined(block, each) for each in flow.inputs))
        case Read(name) if (stream := block.stream(name)) is not None:
            return Read(name, flow.shape) if isinstance(stream.flow, Mixing) else _inlined(
                block, stream.flow)  # fmt: skip
        case _:
            return flow
