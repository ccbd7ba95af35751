"""Where an index lands: which reads need no help to stay inside their tensor.

The language rounds an index down, and what lies outside takes the nearest end. A kernel says
so with `nearest(index, size)`, and leaves that out where it changes nothing: for `h`, `i` and
`j` on an axis that runs along heads, queries or keys, and for what intervals prove.

    table[h, clip(i - j, -16, 16) + 16], of 33 columns    every index is inside
    table[h, i - j]                                       i - j needs `nearest`
"""

from __future__ import annotations

import math

from ..grammar.syntax import Binary, Call, Expr, Name, Number, Unary

Bounds = tuple[float, float]


def on_own_axis(item: Expr, size: int | str, heads: int | None) -> bool:
    """Say whether an index is the plain name that an axis runs along."""
    match item:
        case Name("i" | "j"):
            return isinstance(size, str)
        case Name("h"):
            return isinstance(size, int) and heads in (None, size)
        case _:
            return False


def surely_inside(item: Expr, size: int | str, heads: int | None) -> bool:
    """Say whether an index is certainly whole and on its axis, at every place that exists."""
    if on_own_axis(item, size, heads) or item == Number(0):
        return True
    found = bounds(item, heads)
    return found is not None and isinstance(size, int) and found[0] >= 0 and found[1] < size


def bounds(expr: Expr, heads: int | None) -> Bounds | None:
    """Return bounds on an expression over places; None where it may not be whole.

    >>> bounds(parse_expression("clip(i - j, -4, 4) + 4"), heads=8)
    (0, 8)
    """
    match expr:
        case Number(int() as value):
            return value, value
        case Name("h"):
            return 0, math.inf if heads is None else heads - 1
        case Name("i" | "j" | "n" | "m"):
            return 0, math.inf
        case Unary("-", operand) if a := bounds(operand, heads):
            return -a[1], -a[0]
        case Binary(op, left, right):
            a, b = bounds(left, heads), bounds(right, heads)
            return _combined(op, a, b) if a and b else None
        case Call("abs", (arg,)) if a := bounds(arg, heads):
            return max(0, a[0], -a[1]), max(-a[0], a[1])
        case Call("relu", (arg,)) if a := bounds(arg, heads):
            return max(0, a[0]), max(0, a[1])
        case Call("min" | "max" as name, (left, right)):
            a, b = bounds(left, heads), bounds(right, heads)
            pick = min if name == "min" else max
            return (pick(a[0], b[0]), pick(a[1], b[1])) if a and b else None
        case Call("clip", (arg, low, high)):
            found = [bounds(each, heads) for each in (arg, low, high)]
            if found[0] and found[1] and found[2]:
                (a0, a1), (b0, b1), (c0, c1) = found[0], found[1], found[2]
                return min(max(a0, b0), c0), min(max(a1, b1), c1)
        case Call("where", (_, left, right)):
            a, b = bounds(left, heads), bounds(right, heads)
            return (min(a[0], b[0]), max(a[1], b[1])) if a and b else None
    return None


def _combined(op: str, a: Bounds, b: Bounds) -> Bounds | None:
    match op:
        case "+":
            return a[0] + b[0], a[1] + b[1]
        case "-":
            return a[0] - b[1], a[1] - b[0]
        case "*" if math.inf not in (*map(abs, a), *map(abs, b)):
            ends = [x * y for x in a for y in b]
            return min(ends), max(ends)
        case "*":
            return (0, math.inf) if a[0] >= 0 and b[0] >= 0 else (-math.inf, math.inf)
        case "//" if b[0] == b[1] and 0 < b[0] < math.inf:
            low, high = (x // b[0] if abs(x) != math.inf else x for x in a)
            return low, high
        case "%" if b[0] == b[1] and 0 < b[0] < math.inf:
            return 0, b[0] - 1
        case _:
            return None
