"""Whether a block can go on token by token, and what it has to remember to do so.

window attention      the keys and values of the last tokens
a recurrence          its states
cross-attention       the keys and values of the context, computed once
a mask that looks ahead, queries that are not the tokens: cannot decode, and why
"""

from __future__ import annotations

from functools import lru_cache

from ...grammar.functions import MAP_FUNCTIONS
from ...grammar.show import show
from ...grammar.syntax import Call, Index, Name, walk
from ...ops import OPS
from ...ops.shape import pooling
from ..algebra.masks import extent
from ..model import (
    OFFERED,
    Apply,
    Block,
    Flow,
    Mixing,
    Part,
    Read,
    Recurrence,
    Statistic,
    elsewhere,
)
from .later import later_read


@lru_cache(maxsize=256)
def obstacle(block: Block) -> str | None:
    """Return why a block cannot decode step by step; None where it can."""
    grown: dict[str, bool] = {"x": True, "context": False}
    for stream in block.streams:
        why = _obstacle(stream.flow, grown)
        if why is None and isinstance(stream.flow, Mixing) and stream.flow.queries == "n":
            why = other_queries(block, stream.flow)
        if why is None:
            why = _later(block, stream.flow)
        if why is not None:
            return why
        grown[stream.name] = grows(stream.flow, grown)
    return _obstacle(block.out, grown) or _later(block, block.out)


def _later(block: Block, flow: Flow) -> str | None:
    """Say what is read at a token that may lie after its query."""
    found = later_read(block, flow)
    return None if found is None else f"`{show(found)}` may read a token after its query"


def grows(flow: Flow, grown: dict[str, bool]) -> bool:
    """Say whether a flow's values depend on the block's own tokens."""
    match flow:
        case Read(name):
            below = elsewhere(name) is not None or name in OFFERED
            below = below and flow.shape.tokens == "n"
            return grown.get(name, below)
        case Apply(op) if OPS[op].starts:
            return False
        case Apply() | Mixing() | Statistic() | Part():
            return any(grows(each, grown) for each in flow.inputs)


def _obstacle(flow: Flow, grown: dict[str, bool]) -> str | None:
    if isinstance(flow, Read):
        return None
    if isinstance(flow, Statistic):
        return _of_statistic(flow)
    if isinstance(flow, Part):
        return obstacle(flow.what) or next(
            (why for each in flow.inputs if (why := _obstacle(each, grown))), None
        )
    if isinstance(flow, Apply):
        if OPS[flow.op].looks_ahead(dict(flow.options)) and grows(flow, grown):
            instead = f"; {OPS[flow.op].instead}" if OPS[flow.op].instead else ""
            return f"`{flow.op}` reads later tokens{instead}"
        return next((why for each in flow.inputs if (why := _obstacle(each, grown))), None)
    if isinstance(flow.mix, Recurrence):
        return None if flow.mix.causal else "it reads the whole sequence at once"
    q, *others = (grows(each, grown) for each in flow.inputs)
    if flow.queries != "n":
        return "what it gathers depends on all tokens" if q or any(others) else None
    if flow.mix.select is not None and flow.mix.select.rows > 1:
        return "`rows` of its `select` let a query choose with later ones"
    if flow.keys == "n":
        causal = extent(flow.mix.mask).causal
        return None if causal else "its mask lets a query see later keys"
    if pooling(flow.keys)[0] == "n":  # of groups, of which `later_read` says if they are complete
        return None
    far = [each for each in flow.inputs if each.shape.tokens == flow.keys]
    if any(grows(each, grown) for each in far):
        return "its keys depend on all tokens"
    return None


def _of_statistic(asked: Statistic) -> str | None:
    """Say why a number of rows or columns is not known token by token."""
    if asked.kind == "columns":
        return "`columns` reads all queries"
    parts = () if asked.expr is None else walk(asked.expr)
    for node in parts:
        if isinstance(node, Call) and node.function in MAP_FUNCTIONS:
            if node.function.endswith("_queries"):
                return f"`{node.function}` in `{asked.kind}` reads other queries"
            if node.function == "convolve":
                return f"`convolve` in `{asked.kind}` may read the queries before"
    return None


def other_queries(block: Block, mixing: Mixing) -> str | None:
    """Say which function of the map reads queries that are not there, or no longer."""
    shapes = {each.name: each.shape for each in block.tensors}
    for node in (node for expr in mixing.mix.exprs for node in walk(expr)):
        match node:
            case Call("running_queries"):  # of those before, a cache keeps the sum
                pass
            case Call(name) if name in MAP_FUNCTIONS and name.endswith("_queries"):
                return f"`{name}` reads all queries"
            case Call("convolve", (_, Index(Name(kernel), ()))) if shapes[kernel][-2] > 1:
                return "`convolve` reads the queries before"
    return None
