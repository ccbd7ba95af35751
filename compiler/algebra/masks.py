"""What can be known of a mask without evaluating it at n × m points.

    causal and (window(256) or sink(4))
      extent: j < 4, or 0 <= i - j <= 255; never j > i
      sees_itself: yes, so no row is empty

Every answer is conservative: an extent may be too wide and never too narrow, and
`sees_itself` may say no where the truth is yes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor, inf

from ...grammar.expr import TRUE, calls, fold, names, number, rebuild, substitute
from ...grammar.syntax import (
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


@dataclass(frozen=True, slots=True)
class Extent:
    """Visible implies j < prefix or low <= i - j <= high, and in any case j - i <= ahead."""

    prefix: int = 0
    low: float = -inf
    high: float = inf
    ahead: float = inf

    @property
    def nothing(self) -> bool:
        """Whether no pair is visible at all."""
        return self.prefix == 0 and self.low > self.high

    @property
    def causal(self) -> bool:
        return self.ahead <= 0

    @property
    def back(self) -> int | None:
        """How many positions back a key outside the prefix can be seen; None: all."""
        if self.low > self.high:  # the prefix is all there is
            return 0
        return None if self.high == inf else max(0, int(self.high))


NOTHING = Extent(0, inf, -inf, -inf)  # of a mask that shows nothing


@lru_cache(maxsize=4096)
def extent(mask: Expr) -> Extent:
    """Return bounds on the positions of visible keys."""
    match mask:
        case Binary("and", left, right):
            return _both(extent(left), extent(right))
        case Binary("or", left, right):
            return widest((extent(left), extent(right)))
        case Compare(operands, ops):
            found = Extent()
            for op, a_, b_ in zip(ops, operands, operands[1:], strict=False):
                found = _both(found, _comparison(op, a_, b_))
            return found
        case Call("ispow2", (arg,)) if (line := linear(arg)) and line[:2] == (1, -1):
            return Extent(low=1 - line[2], ahead=line[2] - 1)
        case Unary("not", inner) if (turned := _negated(inner)) is not None:
            return extent(turned)
        case Name("false"):
            return NOTHING
        case _:
            return Extent()


def _negated(mask: Expr) -> Expr | None:
    """Return `not mask` without its `not`, as far as it compares whole numbers; else None."""
    match mask:
        case Unary("not", inner):
            return inner
        case Binary("and" | "or" as op, left, right):
            return Binary("or" if op == "and" else "and", Unary("not", left), Unary("not", right))
        case Compare((left, right), (op,)) if linear(left) and linear(right):
            return Compare((left, right), (_OPPOSITE[op],))
        case Compare((left, middle, right), (first, second)):
            return _negated(Binary("and", Compare((left, middle), (first,)),
                                   Compare((middle, right), (second,))))  # fmt: skip
        case Name("true" | "false" as id):
            return TRUE if id == "false" else Name("false")
    return None


def remembered(mask: Expr, exprs: Iterable[Expr]) -> Expr:
    """Return the mask of what a cache must keep: some expressions read all keys, in order."""
    return TRUE if any(map(reads_others, exprs)) else mask


def of_distance(expr: Expr) -> bool:
    """Say whether i and j are read only as their difference, or compared with each other."""
    places = (Name("i"), Name("j"))
    match expr:
        case Binary("-", left, right) if left in places and right in places:
            return True
        case Compare(operands) if all(each in places for each in operands):
            return True
        case Index(_, items):
            return all(each in places or of_distance(each) for each in items)
    return expr not in places and all(map(of_distance, children(expr)))


def reads_others(expr: Expr) -> bool:
    """Say whether an expression reads of other keys' tokens than its own pair's."""
    if calls(expr, "convolve"):
        return True
    return any(
        isinstance(node, Index) and any(names(item) == {"j"} and item != Name("j")
                                        for item in node.items)
        for node in walk(expr)
    )  # fmt: skip


def widest(extents: Iterable[Extent]) -> Extent:
    """Return bounds that hold for every one of several masks."""
    first, *others = [each for each in extents if not each.nothing] or [NOTHING]
    for each in others:
        first = Extent(max(first.prefix, each.prefix), min(first.low, each.low),
                       max(first.high, each.high), max(first.ahead, each.ahead))  # fmt: skip
    return first


def _both(a: Extent, b: Extent) -> Extent:
    """Return bounds on what two masks let through together."""
    if a.nothing or b.nothing:
        return NOTHING
    prefix = max(a.prefix, b.prefix)
    found = Extent(prefix, max(a.low, b.low), min(a.high, b.high), min(a.ahead, b.ahead))
    return NOTHING if found.nothing else found


def _comparison(op: str, left: Expr, right: Expr) -> Extent:
    if op in (">", ">="):
        return _comparison({">": "<", ">=": "<="}[op], right, left)
    if op == "==":
        if _same_block(left, right) is not None:
            size = _same_block(left, right) or 1
            return Extent(low=1 - size, high=size - 1, ahead=size - 1)
        a, b = _comparison("<=", left, right), _comparison("<=", right, left)
        return _both(a, b)
    if op not in ("<", "<="):
        return Extent()
    match left:  # abs(i - j) < w
        case Call("abs", (inner,)):
            a, b = _comparison(op, inner, right), _comparison(op, Unary("-", inner), right)
            return _both(a, b)
    one, two = linear(left), linear(right)
    if one is None or two is None:
        return Extent()
    # left <= right  ⇔  ci · i + cj · j + c <= 0
    ci, cj, c = (a - b for a, b in zip(one, two, strict=True))
    c += 1 if op == "<" and all(isinstance(part, int) for part in (ci, cj, c)) else 0
    if ci == -cj and ci > 0:  # i - j <= -c / ci
        return Extent(high=float(floor(-c / ci)))
    if ci == -cj and ci < 0:  # i - j >= c / cj
        low = float(ceil(c / cj))
        return Extent(low=low, ahead=-low)
    if ci == 0 and cj > 0:  # j <= -c / cj
        return Extent(prefix=max(0, floor(-c / cj) + 1), low=inf, high=-inf)
    return Extent()


def _same_block(left: Expr, right: Expr) -> int | None:
    match left, right:
        case Binary("//", Name(a), Number(b)), Binary("//", Name(c), Number(d)):
            if {a, c} == {"i", "j"} and b == d and isinstance(b, int) and b > 0:
                return b
    return None


_OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
Line = tuple[int | float, int | float, int | float]


def linear(expr: Expr) -> Line | None:
    """Return (a, b, c) where the expression is a · i + b · j + c."""
    match expr:
        case Number(value) if value != -inf:
            return (0, 0, value)
        case Name("i"):
            return (1, 0, 0)
        case Name("j"):
            return (0, 1, 0)
        case Unary("-", operand) if line := linear(operand):
            return (-line[0], -line[1], -line[2])
        case Binary("+" | "-" as op, left, right):
            one, two = linear(left), linear(right)
            if one and two:
                sign = 1 if op == "+" else -1
                return (one[0] + sign * two[0], one[1] + sign * two[1], one[2] + sign * two[2])
        case Binary("*", Number(k), other) | Binary("*", other, Number(k)):
            if line := linear(other):
                return (k * line[0], k * line[1], k * line[2])
    return None


def sees_itself(mask: Expr) -> bool:
    """Say whether every query certainly sees the key at its own position."""
    return _settle(substitute(mask, {"j": Name("i")})) == TRUE


def _settle(expr: Expr) -> Expr:
    expr = rebuild(expr, _settle)
    match expr:
        case Binary("-", a, b) if a == b and not reads_data(a):
            return number(0)
        case Compare((a, b), ("==" | "<=" | ">=",)) if a == b:
            return TRUE
    return fold(expr)


def reads_data(expr: Expr) -> bool:
    return any(isinstance(node, Index) for node in walk(expr))


def reads(expr: Expr, tensor: str) -> bool:
    """Say whether an expression indexes a stream or tensor of this name."""
    return any(isinstance(node, Index) and node.base == Name(tensor) for node in walk(expr))
