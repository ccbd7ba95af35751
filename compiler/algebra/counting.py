"""How many pairs a mask lets through, exactly, for the cost of a block.

    pairs(causal, 4096, 4096)  →  8,390,656

Masks in which i and j matter only through i - j are counted along the diagonals; others
row by row, in chunks, and no further than they reach.
"""

from __future__ import annotations

from functools import lru_cache
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...grammar.expr import TRUE, fold, names, number, rebuild, substitute
from ...grammar.functions import FUNCTIONS
from ...grammar.syntax import Binary, Call, Compare, Expr, Index, Name, Number, Unary, children
from .masks import Extent, extent, linear, reads_data

_CHUNK = 1 << 22  # points evaluated at once


@lru_cache(maxsize=1024)
def pairs(mask: Expr, n: int, m: int, heads: int = 1) -> int:
    """Return how many (head, query, key) triples are visible; what depends on data counts."""
    with np.errstate(all="ignore"):  # a root of a distance that is negative sees nothing
        return _pairs(mask, n, m, heads)


def _pairs(mask: Expr, n: int, m: int, heads: int) -> int:
    mask = _without_data(mask)
    if "h" in names(mask):
        return sum(pairs(fold(substitute(mask, {"h": number(h)})), n, m) for h in range(heads))
    if mask == TRUE:
        return heads * n * m
    if _by_distance(mask):
        away = np.arange(-(m - 1), n)
        seen = np.broadcast_to(numbers(mask, {"i": away, "j": np.zeros_like(away),
                                              "n": n, "m": m}), away.shape)  # fmt: skip
        length = np.minimum(n, m + away) - np.maximum(0, away)
        return heads * int(np.sum(length[seen.astype(bool)]))
    total = 0
    bounds = extent(mask)
    for start in range(0, n, rows := _rows(bounds, m)):
        i = np.arange(start, min(n, start + rows))[:, None]
        j = _keys(bounds, start, start + rows, m)[None, :]
        seen = numbers(mask, {"i": i, "j": j, "n": n, "m": m})
        total += int(np.sum(np.broadcast_to(seen, (i.size, j.size)), dtype=np.int64))
    return heads * total


def _rows(bounds: Extent, m: int) -> int:
    """Return how many queries are looked at together: few of them where they see a band."""
    most = max(1, _CHUNK // max(1, m))
    band = bounds.high - bounds.low
    return int(max(64, min(most, band))) if isfinite(band) else most


def _keys(bounds: Extent, start: int, stop: int, m: int) -> NDArray[np.int64]:
    """Return every key that one of the queries `start` up to `stop` may see."""
    j = np.arange(m)
    near = (j >= start - bounds.high) & (j <= stop - 1 - bounds.low)
    return np.asarray(j[(near | (j < bounds.prefix)) & (j <= stop - 1 + bounds.ahead)])


def _by_distance(expr: Expr) -> bool:
    """Whether i and j matter only through i - j, as in `j <= i`."""
    if (line := linear(expr)) is not None:
        return line[0] + line[1] == 0
    if isinstance(expr, Compare):
        sides = zip(expr.operands, expr.operands[1:], strict=False)
        return all(
            _by_distance(Binary("-", a, b)) or (_by_distance(a) and _by_distance(b))
            for a, b in sides
        )
    if isinstance(expr, Binary | Unary | Call):
        return all(_by_distance(each) for each in children(expr))
    return isinstance(expr, Name) and expr.id not in ("i", "j")


def _without_data(mask: Expr) -> Expr:
    """Take every comparison that reads data for true: an upper bound on what is visible."""
    if isinstance(mask, Compare) and reads_data(mask):
        return TRUE
    if isinstance(mask, Unary) and reads_data(mask):
        return TRUE
    if isinstance(mask, Index):
        return TRUE
    return fold(rebuild(mask, _without_data)) if isinstance(mask, Binary) else mask


def numbers(expr: Expr, values: dict[str, Any]) -> Any:
    """Return the value of an expression over numpy arrays."""
    match expr:
        case Number(value):
            return value
        case Name("true" | "false" as id):
            return id == "true"
        case Name(id):
            return values[id]
        case Unary("not", operand):
            return np.logical_not(numbers(operand, values))
        case Unary(_, operand):
            return -numbers(operand, values)
        case Binary(op, left, right):
            return _NUMPY[op](numbers(left, values), numbers(right, values))
        case Compare(operands, ops):
            sides = [numbers(each, values) for each in operands]
            holds: Any = True
            for op, a, b in zip(ops, sides, sides[1:], strict=False):
                holds = np.logical_and(holds, _NUMPY[op](a, b))
            return holds
        case Call("ispow2", (arg,)):
            whole = np.asarray(numbers(arg, values))
            return (whole > 0) & ((whole & (whole - 1)) == 0)
        case Call("where", (condition, yes, no)):
            return np.where(numbers(condition, values), numbers(yes, values), numbers(no, values))
        case Call(name, args):
            function = _NUMPY.get(name) or np.vectorize(FUNCTIONS[name].value)
            return function(*(numbers(arg, values) for arg in args))
    raise TypeError(f"{type(expr).__name__} has no numbers")


_NUMPY: dict[str, Any] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.true_divide, "//": np.floor_divide,
    "%": np.mod, "**": np.power, "and": np.logical_and, "or": np.logical_or, "<": np.less,
    "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal, "==": np.equal,
    "!=": np.not_equal, "abs": np.abs, "min": np.minimum, "max": np.maximum, "floor": np.floor,
    "exp": np.exp, "log": np.log, "log2": np.log2, "sqrt": np.sqrt,
}  # fmt: skip
