"""Whether an expression rises or falls with a name everywhere, and what it lies between.

    relu(s - tau) ** 2         falls with tau, from inf to 0
    relu(s - tau) * exp(b)     falls
    relu(s - tau) * b          `Unclear`: b may have either sign
    relu(s - tau) ** -2        `Unclear`: it is infinite where relu(s - tau) is 0

Both are found from the parts of an expression, and hold for every value of every name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from ...grammar.expr import names
from ...grammar.functions import FUNCTIONS
from ...grammar.syntax import Binary, Call, Expr, Name, Number, Unary

INF = math.inf
_LEAST = 5e-324  # what is positive but may be as small as one likes

_RISING = ("exp", "log", "sqrt", "tanh", "sigmoid", "relu", "softplus", "elu", "erf")
_POSITIVE = ("exp", "sigmoid", "softplus")
_AT_LEAST_ONE = ("n", "m", "seen")


class Unclear(Exception):
    """An expression may rise as well as fall, jump, or be infinite; `expr` is the part."""

    def __init__(self, expr: Expr, reason: str) -> None:
        super().__init__(reason)
        self.expr, self.reason = expr, reason


class Range(NamedTuple):
    """All values lie from low to high."""

    low: float
    high: float

    @property
    def sign(self) -> int | None:
        """1 where nothing is negative, -1 where nothing is positive."""
        return 1 if self.low >= 0 else -1 if self.high <= 0 else None

    @property
    def above_zero(self) -> bool:
        return self.low > 0


ANYTHING = Range(-INF, INF)
Known = Mapping[Expr, Range]


# ── between what an expression lies ──────────────────────────────────────────────────────


def between(expr: Expr, known: Known) -> Range:
    """Return bounds of an expression, some parts of which have known ones."""
    if expr in known:
        return known[expr]
    match expr:
        case Number(value):
            return Range(value, value)
        case Name(id) if id in _AT_LEAST_ONE:
            return Range(1, INF)
        case Unary("-", operand):
            low, high = between(operand, known)
            return Range(-high, -low)
        case Binary("+" | "-"):
            return _sum(expr, known)
        case Binary("*", left, right):
            return _product(between(left, known), between(right, known))
        case Binary("/", left, right):
            return _product(between(left, known), _inverse(between(right, known)))
        case Binary("**", base, exponent):
            return _power(between(base, known), between(exponent, known), exponent)
        case Call(name, args, ()):
            return _called(name, [between(arg, known) for arg in args])
    return ANYTHING


def _sum(expr: Expr, known: Known) -> Range:
    """Add up the terms, numbers first: (1 + sigmoid(t)) - 1 stays above zero."""
    low = high = 0.0
    terms = sorted(_terms(expr, 1), key=lambda each: not isinstance(each[1], Number))
    for sign, term in terms:
        a, b = between(term, known)
        a, b = (a, b) if sign > 0 else (-b, -a)
        low = -INF if -INF in (low, a) else low + a
        high = INF if INF in (high, b) else high + b
    return Range(low, high)


def _terms(expr: Expr, sign: int) -> Iterator[tuple[int, Expr]]:
    match expr:
        case Binary("+" | "-" as op, left, right):
            yield from _terms(left, sign)
            yield from _terms(right, sign if op == "+" else -sign)
        case Unary("-", operand):
            yield from _terms(operand, -sign)
        case _:
            yield sign, expr


def _times(a: float, b: float) -> float:
    """Return a product: 0 · inf is 0, and no two positive numbers make zero."""
    if 0 in (a, b):
        return 0.0
    return a * b or math.copysign(_LEAST, a) * math.copysign(1, b)


def _product(a: Range, b: Range) -> Range:
    corners = [_times(x, y) for x in a for y in b]
    return Range(min(corners), max(corners))


def _inverse(a: Range) -> Range:
    if not (a.low > 0 or a.high < 0):
        return ANYTHING
    low, high = (0.0 if abs(x) == INF else 1 / x for x in (a.high, a.low))
    if low == 0 and a.low < a.high:
        low = _LEAST
    return Range(low, high)


def _power(base: Range, exponent: Range, written: Expr) -> Range:
    if isinstance(written, Number) and written.value % 2 == 0:
        a, b = abs(base.low), abs(base.high)
        base = Range(0 if base.low <= 0 <= base.high else min(a, b), max(a, b))
    if exponent.high < 0 and base.above_zero:
        return _inverse(_power(base, Range(-exponent.high, -exponent.low), Number(1)))
    if base.low < 0 or exponent.low < 0:
        return ANYTHING
    corners = [_at(math.pow, x, y) for x in base for y in exponent]
    low = min(corners)
    return Range(_LEAST if low == 0 and base.above_zero else low, max(corners))


def _at(function: Callable[..., float], *values: float) -> float:
    try:
        return function(*values)
    except OverflowError:
        return INF
    except ValueError:  # the logarithm of zero or less, a root of less than zero
        return -INF


def _called(name: str, args: list[Range]) -> Range:
    match name, args:
        case _, [Range(low, high)] if name in _RISING:
            value = FUNCTIONS[name].value
            first, last = _at(value, low), _at(value, high)
            inside = low < high or low > -INF
            return Range(_LEAST if name in _POSITIVE and first == 0 and inside else first, last)
        case "abs", [Range(low, high)]:
            least = 0 if low <= 0 <= high else min(abs(low), abs(high))
            return Range(least, max(abs(low), abs(high)))
        case "detach", [a]:
            return a
        case "min" | "max", [a, b]:
            pick = min if name == "min" else max
            return Range(pick(a.low, b.low), pick(a.high, b.high))
        case "clip", [a, b, c]:
            return _called("min", [_called("max", [a, b]), c])
        case "where", [_, a, b]:
            return Range(min(a.low, b.low), max(a.high, b.high))
    return ANYTHING


# ── whether it rises or falls ────────────────────────────────────────────────────────────


def trend(expr: Expr, of: str) -> int:
    """Return 1 where an expression rises with a name, -1 where it falls, 0 without it."""
    if of not in names(expr):
        return 0
    match expr:
        case Name():
            return 1
        case Unary("-", operand):
            return -trend(operand, of)
        case Binary("+", left, right):
            return _both(expr, trend(left, of), trend(right, of))
        case Binary("-", left, right):
            return _both(expr, trend(left, of), -trend(right, of))
        case Binary("*", left, right):
            return _both(expr, _scaled(left, right, of), _scaled(right, left, of))
        case Binary("/", left, right):
            below = between(right, {})
            if trend(right, of) and not (below.low > 0 or below.high < 0):
                raise Unclear(expr, "it may divide by zero")
            return _both(expr, _scaled(left, right, of), -_scaled(right, left, of))
        case Binary("**", base, exponent):
            return _of_power(expr, base, exponent, of)
        case Call(name, args, ()):
            return _of_call(expr, name, args, of)
    raise Unclear(expr, "it jumps")


def _both(expr: Expr, a: int, b: int) -> int:
    if a * b < 0:
        raise Unclear(expr, "one part of it rises, another falls")
    return a or b


def _scaled(varying: Expr, factor: Expr, of: str) -> int:
    """Return the trend that a product has by one of its factors."""
    along = trend(varying, of)
    if not along:
        return 0
    sign = between(factor, {}).sign
    if sign is None:
        raise Unclear(factor, "it may have either sign")
    return along * sign


def _of_power(expr: Expr, base: Expr, exponent: Expr, of: str) -> int:
    from_, by = between(base, {}), between(exponent, {})
    if along := trend(exponent, of):
        if trend(base, of) or not from_.above_zero or from_.low < 1 < from_.high:
            raise Unclear(expr, "a power with a varying exponent may rise or fall")
        return along if from_.low >= 1 else -along
    along = trend(base, of)
    match exponent:
        case Number(value) if value > 0 and value % 2 == 1:
            return along
        case Number(value) if value > 0 and value % 2 == 0 and from_.sign is not None:
            return along * from_.sign
    if from_.low >= 0 and by.above_zero:
        return along
    if from_.above_zero and by.high <= 0:
        return -along
    if from_.low < 0:
        raise Unclear(expr, "its base may be negative")
    raise Unclear(expr, "it is infinite where its base is 0" if by.high < 0
                  else "its exponent may have either sign")  # fmt: skip


def _of_call(expr: Expr, name: str, args: tuple[Expr, ...], of: str) -> int:
    match name, args:
        case "log" | "sqrt", (arg,) if between(arg, {}).low < (_LEAST if name == "log" else 0):
            raise Unclear(expr, "it is not defined everywhere")
        case _, (arg,) if name in _RISING:
            return trend(arg, of)
        case "abs", (arg,):
            return _scaled(arg, arg, of)
        case "min" | "max" | "clip", _:
            first, *rest = (trend(arg, of) for arg in args)
            for each in rest:
                first = _both(expr, first, each)
            return first
        case "where", (condition, a, b) if of not in names(condition):
            return _both(expr, trend(a, of), trend(b, of))
        case "gelu" | "silu" | "sin" | "cos", _:
            raise Unclear(expr, "it rises and falls")
        case "detach", _:
            raise Unclear(expr, "it has no gradient")
    raise Unclear(expr, "it jumps")
