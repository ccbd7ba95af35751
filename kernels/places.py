"""Where an index lands: which reads need no help to stay inside their tensor.

The language rounds an index down, and what lies outside takes the nearest end. A kernel says
so with `nearest(index, size)`, and leaves that out where it changes nothing: for `h`, `i` and
`j` on an axis that runs along heads, queries or keys, and for what intervals prove.

    table[h, clip(i - j, -16, 16) + 16], of 33 columns    every index is inside
    table[h, i - j]                                       i - j needs `nearest`
"""

from __future__ import annotations

from ..grammar.ranges import INF, LENGTHS, Range, between
from ..grammar.syntax import Expr, Name, Number

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
    ends = {"i": INF, "j": INF, "h": INF if heads is None else heads - 1}
    places: dict[Expr, Range] = {Name(id): Range(0, end, whole=True) for id, end in ends.items()}
    found = between(expr, {**LENGTHS, **places})
    return found.ends if found.whole else None
