"""What can be known of a mask without evaluating it at n × m points.

    causal and (window(256) or sink(4))
      extent: j < 4, or 0 <= i - j <= 255; never j > i
      sees_itself: yes, so no row is empty

Every answer is conservative: an extent may be too wide and never too narrow, and
`sees_itself` may say no where the truth is yes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil, floor, inf, isfinite

from ...grammar.domain import Domain, interpret
from ...grammar.expr import FALSE, PLACES, TRUE, calls, fold, names, number, rebuild, substitute
from ...grammar.functions import GROUPED
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
            return _negated(
                Binary(
                    "and", Compare((left, middle), (first,)), Compare((middle, right), (second,))
                )
            )
        case Name("true" | "false" as id):
            return TRUE if id == "false" else Name("false")
    return None


def remembered(mask: Expr, exprs: Iterable[Expr]) -> Expr:
    """Return the mask of what a cache must keep: some expressions read all keys, in order."""
    return TRUE if any(map(reads_others, exprs)) else mask


def of_distance(expr: Expr) -> bool:
    """Say whether i and j matter only through i - j, as in `j <= i`, wherever data is read."""
    if (line := linear(expr)) is not None:
        return line[0] + line[1] == 0
    match expr:
        case Compare(operands):
            return all(
                of_distance(Binary("-", a, b)) or (of_distance(a) and of_distance(b))
                for a, b in pairwise(operands)
            )
        case Index(_, items):
            return all(each in (Name("i"), Name("j")) or of_distance(each) for each in items)
    return expr not in (Name("i"), Name("j")) and all(map(of_distance, children(expr)))


def is_known(expr: Expr) -> bool:
    """Say whether an expression reads places alone, so that it is the same at every call."""
    return not reads_data(expr) and names(expr) <= PLACES | {"true", "false"}


def bound(expr: Expr, keeps: Callable[[Expr], bool], *, most: bool) -> Expr:
    """Return what holds wherever a condition does; for the least, what it surely holds in.

    Parts that `keeps` refuses are taken for true, or for the least for false.
    """
    match expr:
        case Binary("and" | "or" as op, left, right):
            return fold(Binary(op, bound(left, keeps, most=most), bound(right, keeps, most=most)))
        case Unary("not", operand):
            return fold(Unary("not", bound(operand, keeps, most=not most)))
    return expr if expr in (TRUE, FALSE) or keeps(expr) else TRUE if most else FALSE


def reads_others(expr: Expr) -> bool:
    """Say whether an expression reads of other keys' tokens than its own pair's."""
    if calls(expr, "convolve"):
        return True
    return any(
        isinstance(node, Index)
        and any(
            names(item) == {"j"} and item != Name("j") and not calls(item, POOLED)
            for item in node.items
        )
        for node in walk(expr)
    )


def in_order(expr: Expr) -> bool:
    """Say whether it matters to an expression which of its keys comes first."""
    return any(calls(expr, name) for name in ("running_keys", "rank_keys", *GROUPED))


def widest(extents: Iterable[Extent]) -> Extent:
    """Return bounds that hold for every one of several masks."""
    first, *others = [each for each in extents if not each.nothing] or [NOTHING]
    for each in others:
        first = Extent(
            max(first.prefix, each.prefix),
            min(first.low, each.low),
            max(first.high, each.high),
            max(first.ahead, each.ahead),
        )
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
    line = ci, cj, c = tuple(a - b for a, b in zip(one, two, strict=True))
    c += 1 if op == "<" and all(isinstance(part, int) for part in line) else 0
    more = 0 if all(part * FINEST % 1 == 0 for part in line) else 1  # for what is rounded
    if ci == -cj and ci > 0:  # i - j <= -c / ci
        return Extent(high=float(floor(-c / ci) + more))
    if ci == -cj and ci < 0:  # i - j >= c / cj
        low = float(ceil(c / cj) - more)
        return Extent(low=low, ahead=-low)
    if ci == 0 and cj > 0:  # j <= -c / cj
        return Extent(prefix=max(0, floor(-c / cj) + 1 + more), low=inf, high=-inf)
    return Extent()


def _same_block(left: Expr, right: Expr) -> int | None:
    match left, right:
        case Binary("//", Name(a), Number(b)), Binary("//", Name(c), Number(d)):
            if {a, c} == {"i", "j"} and b == d and isinstance(b, int) and b > 0:
                return b
    return None


FINEST = 16  # coefficients in sixteenths are exact in float32 up to a million positions
_OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
Terms = tuple[dict[Expr, int | float], int | float]  # coefficients, and a constant
Line = tuple[int | float, int | float, int | float]


def affine(expr: Expr) -> Terms:
    """Return coefficients and a constant: `2 * (i - j // 4) + 1` is {i: 2, j // 4: -2}, 1."""
    return interpret(expr, Domain(lambda each: ({}, each), _term, _combined))


def _term(expr: Expr) -> Terms:
    return {expr: 1}, 0


def _combined(op: str, values: tuple[Terms, ...], expr: Expr) -> Terms:
    match op, values:
        case "negative", (one,):
            return _times(one, -1)
        case "+" | "-", ((one, c), other):
            two, d = _times(other, 1 if op == "+" else -1)
            terms = {key: one.get(key, 0) + two.get(key, 0) for key in {**one, **two}}
            return {key: value for key, value in terms.items() if value}, c + d
        case "*", ((terms, factor), line) if not terms:
            return _times(line, factor)
        case "*", (line, (terms, factor)) if not terms:
            return _times(line, factor)
        case "/", (line, (terms, by)) if by and not terms:
            parts = (*line[0].values(), line[1])
            if all(float(each).is_integer() and each % by == 0 for each in parts):
                return {key: int(each // by) for key, each in line[0].items()}, int(line[1] // by)
            return _times(line, 1 / by)
    return _term(expr)


def _times(line: Terms, factor: int | float) -> Terms:
    if factor == 0:
        return {}, 0
    return {key: value * factor for key, value in line[0].items()}, line[1] * factor


def linear(expr: Expr) -> Line | None:
    """Return (a, b, c) where the expression is a · i + b · j + c, of finite numbers."""
    terms, c = affine(expr)
    if not terms.keys() <= {Name("i"), Name("j")} or not isfinite(c):
        return None
    return terms.get(Name("i"), 0), terms.get(Name("j"), 0), c


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
