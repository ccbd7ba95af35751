"""How many bytes decoding keeps of one sequence, as the emitted caches hold them.

keys and values      of all tokens, or of a window; once, however many attentions read them
a context            what its keys and values are made to, once
a recurrence         its states
short convolutions   the tokens before the next one
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod

from ..grammar.syntax import Expr, Index, Name, walk
from ..ops import OPS, Shape
from .masks import extent, widest
from .mixing import mix_exprs
from .model import (
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
)


def kept_bytes(block: Block, tokens: int, size: int) -> int:
    """Return the bytes kept after so many tokens, in numbers of `size` bytes."""
    total = size * _tails(block)
    groups: dict[str, list[tuple[str, Mixing]]] = {}
    for name, mixing in block.mixings.items():
        if isinstance(mixing.mix, Recurrence):
            states = sum(prod(state.shape) for state in mixing.mix.states)
            total += max(4, size) * mixing.heads * states
        elif mixing.queries == "n" and mixing.keys in ("n", "m"):
            early = mixing.keys == "m" or not _late(block, name, mixing)
            groups.setdefault(mixing.keys if early else name, []).append((name, mixing))
    for name, group in groups.items():
        held = tokens
        if name != "m":
            seen = widest(extent(_pairwise(mixing).mask) for _, mixing in group)
            if seen.back is not None:
                held = min(tokens, seen.prefix + seen.back + 1)
        keyed = _keyed(block, group)
        total += held * sum(_width(block, each, size) for each in keyed)
    return total


def _pairwise(mixing: Mixing) -> Pairwise:
    assert isinstance(mixing.mix, Pairwise)
    return mixing.mix


def _late(block: Block, name: str, mixing: Mixing) -> bool:
    """Say whether keys and values are made of what was mixed before."""
    keyed = _keyed(block, [(name, mixing)])
    return any(_mixes(block, Read(each, Shape("n", 1))) for each in keyed)


def _mixes(block: Block, flow: Flow) -> bool:
    if isinstance(flow, Mixing):
        return True
    streams = (block.stream(node.name) for node in flow_nodes(flow) if isinstance(node, Read))
    return any(isinstance(node, Mixing) for node in flow_nodes(flow)) or any(
        _mixes(block, each.flow) for each in streams if each is not None
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


def _keyed(block: Block, mixings: Iterable[tuple[str, Mixing]]) -> tuple[str, ...]:
    """Return what a cache keeps of each token: k, v, and what expressions index by j."""
    made: dict[Flow, str] = {}
    for own, mixing in mixings:
        asked = [node for flow in block.flows for node in flow_nodes(flow)
                 if isinstance(node, Statistic) and node.inputs[0].name == own]  # fmt: skip
        exprs = (*mix_exprs(mixing.mix), *(each.expr for each in asked if each.expr is not None))
        reads = {each.name for each in mixing.inputs}
        reads |= {each.name for node in asked for each in node.inputs}
        for name in (*(each.name for each in mixing.inputs[1:3]), *_indexed(exprs, reads)):
            stream = block.stream(name)
            flow = _inlined(block, stream.flow) if stream is not None else Read(name, Shape("n", 1))
            made.setdefault(flow, name)
    return tuple(made.values())


def _indexed(exprs: tuple[Expr, ...], streams: set[str]) -> Iterator[str]:
    """Yield the streams that expressions read at j."""
    for expr in exprs:
        for node in walk(expr):
            if isinstance(node, Index) and isinstance(node.base, Name) and Name("j") in node.items:
                yield from {node.base.id} & {"doc", *streams}


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
