"""Whether what a pair reads at another key's token may stand after its query.

    mask = causal;  s + t[j // 4 * 4]           never: that token is j or before it
    mask = causal;  s + t[j // 4 * 4 + 3]       it may: query 0 reads token 3
    mask = causal and i // 4 > j // 4; the same  never: the blocks of such keys are complete

A read counts where its pair is visible and what chooses it is so: within `where(c, …)` only where
c holds, beside `or` only where the other side does not. What depends on data or heads is taken
for whatever lets more be read. First a bound on the distance from j is compared with the nearest
query that the mask lets see j. Where that does not decide, positions are tried: an expression of
sums, constant factors, `//` and `%` is the same piece again and again, and its pieces end near
multiples and sums of its constants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import combinations_with_replacement
from math import floor, inf

from ...grammar.expr import TRUE, calls, fold, names, number
from ...grammar.functions import MAP_FUNCTIONS
from ...grammar.syntax import (
    POOLED,
    Binary,
    Call,
    Compare,
    Expr,
    Index,
    Name,
    Number,
    Unary,
    children,
    walk,
)
from ...ops import OPS
from ...ops.shape import pooling
from ..algebra.masks import bound, extent
from ..model import Apply, Block, Flow, Mixing, Pairwise, Part, Read, Statistic, Stream, flow_nodes

_FIRST = 64  # positions that are tried one by one
_LARGEST = 1 << 24  # constants beyond it are no positions
_MOST = 2048  # positions that are tried at most; where there are more, nothing is certain


Streams = Mapping[str, Stream]


def last_token(flow: Flow, streams: Streams) -> tuple[float, float]:
    """Return a and b, where what a flow has at its token g is made of tokens up to a · g + b.

    They are those that its axis is pooled of; a is 1 and b is 0 where it is not.
    """
    stride = pooling(flow.shape.tokens)[1]
    if isinstance(flow, Read):
        known = streams.get(flow.name)
        return (1, 0) if stride == 1 else (stride, inf) if known is None else (
            last_token(known.flow, streams)
        )  # fmt: skip
    if stride == 1:
        return 1, 0
    if isinstance(flow, Apply) and OPS[flow.op].groups:
        last, step = OPS[flow.op].reaches(dict(flow.options))
        a, b = last_token(flow.inputs[0], streams)
        return a * step, a * last + b
    ahead = isinstance(flow, Apply) and OPS[flow.op].looks_ahead(dict(flow.options))
    if isinstance(flow, Apply | Part) and not ahead:
        made = [last_token(each, streams) for each in flow.inputs if each.shape.tokens != "1"]
        return stride, max((b for _, b in made), default=0)
    return stride, inf


def incomplete(
    expr: Expr,
    known: Expr,
    streams: Streams,
    sides: tuple[str, ...] = ("i", "j"),
    rows: int = 1,
    visible: Expr | None = None,
) -> Index | None:
    """Return what an expression reads of a group that may not be complete at its query, if any.

    `known` holds of all pairs that count, and `visible` of those that functions of the map see;
    only what stands on these sides is asked for. Of `rows` of queries together, a group is complete
    where it is at the last of them.
    """
    for node, holds in _guarded(expr, known, visible or known):
        for item in node.items:
            if isinstance(item, Call) and item.function == POOLED and names(item) & {*sides}:
                assert isinstance(node.base, Name)
                stream = streams.get(node.base.id)
                if stream is not None and isinstance(stream.flow, Statistic):
                    continue  # of a map, whose rows know what they see
                a, b = (1, inf) if stream is None else last_token(stream.flow, streams)
                tried = bound(holds, _is_tried, most=True)
                if group_may_be_later(item.args[0], a, b, tried, rows):
                    return node
    return None


def group_may_be_later(place: Expr, a: float, b: float, known: Expr, rows: int = 1) -> bool:
    """Say whether token a · place + b may lie after the query, where `known` holds.

    Of `rows` of queries together, after the last of them.
    """
    if b == inf:
        return True
    last = fold(Binary("+", Binary("*", place, number(int(a), place)), number(int(b), place)))
    if rows > 1:
        begins = Binary("*", Binary("//", Name("i"), Number(rows)), Number(rows))
        after = Compare((last, Binary("+", begins, Number(rows - 1))), (">",))
        last = Call("where", (after, last, Number(-1)))
    return _may_be_later(last, known)


def _incomplete(block: Block, mixing: Mixing) -> Index | None:
    """Return what an attention reads of groups that may not be complete at its query."""
    assert isinstance(mixing.mix, Pairwise)
    if mixing.queries != "n" or pooling(mixing.keys)[0] != "n":
        return None
    mix, streams = mixing.mix, {each.name: each for each in block.streams}
    for read in mixing.inputs:  # keys that are pooled themselves
        if read.shape.tokens == mixing.keys != "n":
            a, b = last_token(read, streams)
            tried = bound(mix.mask, _is_tried, most=True)
            if group_may_be_later(Name("j"), a, b, tried):
                return Index(Name(read.name), (Name("j"),), read.span)
    if mix.select is not None:
        free = mix.select.candidates(mix.mask)
        asked = not mix.select.elsewhere  # else that layer says it of the same pairs
        score = mix.select.score
        if asked and (found := incomplete(score, free, streams, visible=mix.mask)):
            return found
    exprs = (mix.mask, mix.score, mix.weights, *mix.normalize.exprs)
    met = () if mix.similarity is None else (mix.similarity,)
    more = () if mix.select is None else (mix.select.always, mix.select.among)
    for expr in (*exprs, *met, *more):
        if found := incomplete(expr, mix.mask, streams):
            return found
    return None


def later_read(block: Block, flow: Flow) -> Index | None:
    """Return what a flow reads at a token that may lie after its query, if anything."""
    if isinstance(flow, Mixing) and isinstance(flow.mix, Pairwise):
        if found := _incomplete(block, flow):
            return found
        mix = flow.mix
        exprs = (
            mix.mask,
            *(each for each in (mix.similarity, mix.score, mix.weights) if each is not None),
            *mix.normalize.exprs,
        )
        return _of_pairs(flow, exprs)
    for node in flow_nodes(flow):
        if isinstance(node, Statistic) and node.expr is not None:
            mixing = block.mixings.get(node.inputs[0].name)
            if mixing is not None and (found := _of_pairs(mixing, (node.expr,))):
                return found
    return None


def sees_no_later(block: Block, flow: Flow) -> bool:
    """Say whether the masks of the attentions in a flow hide all later keys."""
    asked = [
        block.mixings.get(node.inputs[0].name)
        for node in flow_nodes(flow)
        if isinstance(node, Statistic)
    ]
    mixings = [flow] if isinstance(flow, Mixing) else [each for each in asked if each is not None]
    return all(extent(each.mix.mask).causal for each in mixings if isinstance(each.mix, Pairwise))


def _of_pairs(mixing: Mixing, exprs: tuple[Expr, ...]) -> Index | None:
    assert isinstance(mixing.mix, Pairwise)
    if mixing.queries != "n" or mixing.keys != "n":
        return None
    mask = mixing.mix.mask
    for expr in exprs:
        given = TRUE if expr == mask else mask
        for index, place, known in _reads(expr, given, given):
            if _may_be_later(place, bound(known, _is_tried, most=True)):
                return index
    return None


def _reads(expr: Expr, known: Expr, visible: Expr) -> Iterator[tuple[Index, Expr, Expr]]:
    """Yield every read at another key's token: the index, its token, and what holds there."""
    for node, holds in _guarded(expr, known, visible):
        for item in node.items:
            if names(item) == {"j"} and item != Name("j") and not calls(item, POOLED):
                yield node, item, holds


def _guarded(expr: Expr, known: Expr, visible: Expr) -> Iterator[tuple[Index, Expr]]:
    """Yield every read of a stream or tensor, and what holds where it counts."""
    match expr:
        case Index(Name()):
            yield expr, known
        case Binary("and" | "or" as op, left, right):
            for one, other in ((left, right), (right, left)):
                holds = other if op == "and" else Unary("not", other)
                yield from _guarded(one, Binary("and", known, holds), visible)
            return
        case Call("where", (condition, yes, no), ()):
            yield from _guarded(condition, known, visible)
            yield from _guarded(yes, Binary("and", known, condition), visible)
            yield from _guarded(no, Binary("and", known, Unary("not", condition)), visible)
            return
        case Call(name) if name in MAP_FUNCTIONS:  # of all visible keys, whatever was chosen
            known = visible
    for each in children(expr):
        yield from _guarded(each, known, visible)


def _is_tried(expr: Expr) -> bool:
    return isinstance(expr, Compare) and names(expr) <= {"i", "j"} and _is_pieces(expr)


@lru_cache(maxsize=1024)
def _may_be_later(place: Expr, known: Expr) -> bool:
    """Say whether a token may lie after the query, for a pair of which something is known."""
    if _ahead(place) <= extent(known).low:
        return False
    if not _is_pieces(place):
        return True
    import numpy as np  # here, so that the checking of other files does not load it

    from ..algebra.points import numbers

    at = np.array(_tried(place, known))
    if len(at) > _MOST:
        return True
    i, j = at[:, None], at[None, :]
    with np.errstate(all="ignore"):
        later = np.floor(numbers(place, {"i": i, "j": j})) > i
        holds = numbers(known, {"i": i, "j": j})
    return bool(np.any(later & holds))


def _ahead(place: Expr) -> float:
    """Return how far a token lies after j at most."""
    match place:
        case Number(value):
            return max(0.0, value)
        case Name("j"):
            return 0.0
        case Binary("+", inner, Number(value)) | Binary("+", Number(value), inner):
            return _ahead(inner) + value
        case Binary("-", inner, Number(value)):
            return _ahead(inner) - value
        case Binary("*", Binary("//", inner, Number(a)), Number(b)) if 0 < b <= a:
            return max(0.0, _ahead(inner))
        case Binary("/" | "//", inner, Number(value)) if value >= 1:
            return max(0.0, _ahead(inner))
        case Call("max", args):
            return max(map(_ahead, args))
        case Call("min", args):
            return min(map(_ahead, args))
    return inf


_PIECEWISE = ("abs", "min", "max", "clip", "floor", "relu", "where")


def _is_pieces(expr: Expr) -> bool:
    """Say whether an expression of i and j is made of pieces that constants tell the ends of."""
    match expr:
        case Number() | Name():
            return True
        case Binary("*", left, right):
            inside = isinstance(left, Number) or isinstance(right, Number)
        case Binary("/" | "//" | "%", _, right):
            inside = isinstance(right, Number)
        case Binary("**"):
            return False
        case Call(name):
            inside = name in _PIECEWISE
        case _:
            inside = not isinstance(expr, Index)
    return inside and all(_is_pieces(each) for each in children(expr))


def _tried(*exprs: Expr) -> list[int]:
    """Return the first positions, and those around multiples and sums of constants."""
    sizes = {
        abs(floor(node.value))
        for expr in exprs
        for node in walk(expr)
        if isinstance(node, Number) and abs(node.value) < _LARGEST
    }
    ends = {times * size for size in sizes for times in range(1, 5)}
    ends |= {a + b for a, b in combinations_with_replacement(sorted(sizes), 2)}
    near = {end + step for end in ends for step in (-2, -1, 0, 1, 2) if end + step >= 0}
    return sorted({*range(_FIRST), *near})
