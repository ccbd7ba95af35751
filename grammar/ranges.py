"""Between what an expression lies, for all values of its names.

    clip(i - j, -4, 4) + 4         0 … 8, whole
    exp(s) + 1                     1 … inf
    1 / sigmoid(s)                 above 0, to inf

Bounds may be wider than need be and never too narrow. Those over rectangles of a mask, which
keep its arrays apart and know of gaps, are `compiler/algebra/intervals.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from .domain import Domain, interpret
from .functions import FUNCTIONS
from .syntax import Binary, Expr, Name, Number, Unary

INF = math.inf
LEAST = 5e-324  # what is positive but may be as small as one likes

RISING = (
    "exp", "log", "sqrt", "tanh", "sigmoid", "log_sigmoid", "relu", "softplus", "elu", "erf",
)  # fmt: skip
_POSITIVE = ("exp", "sigmoid", "softplus")


@dataclass(frozen=True, slots=True)
class Range:
    """All values lie from low to high; `whole`: they are certainly whole numbers."""

    low: float
    high: float
    whole: bool = field(default=False, compare=False)

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def sign(self) -> int | None:
        """1 where nothing is negative, -1 where nothing is positive."""
        return 1 if self.low >= 0 else -1 if self.high <= 0 else None

    @property
    def above_zero(self) -> bool:
        return self.low > 0


ANYTHING = Range(-INF, INF)
Known = Mapping[Expr, Range]
LENGTHS: Known = {Name(id): Range(1, INF, whole=True) for id in ("n", "m", "seen")}


def between(expr: Expr, known: Known = LENGTHS) -> Range:
    """Return bounds of an expression, some parts of which have known ones.

    >>> between(parse_expression("relu(s) + 1"))
    Range(low=1, high=inf, whole=False)
    """
    domain = Domain(_number, lambda _: ANYTHING, _applied, lambda each: _known(each, known))
    return interpret(expr, domain)


def _number(value: int | float) -> Range:
    truth = isinstance(value, bool)
    return ANYTHING if truth else Range(value, value, whole=isinstance(value, int))


def _known(expr: Expr, known: Known) -> Range | None:
    """Return what is known beforehand, and the bounds of a sum: its terms are added together."""
    sums = isinstance(expr, Binary) and expr.op in ("+", "-")
    return known.get(expr) or (_sum(expr, known) if sums else None)


def _sum(expr: Expr, known: Known) -> Range:
    """Add up the terms, numbers first: (1 + sigmoid(t)) - 1 stays above zero."""
    low: float = 0
    high: float = 0
    whole = True
    terms = sorted(_terms(expr, 1), key=lambda each: not isinstance(each[1], Number))
    for sign, term in terms:
        found = between(term, known)
        a, b = found.ends if sign > 0 else (-found.high, -found.low)
        low = -INF if -INF in (low, a) else low + a
        high = INF if INF in (high, b) else high + b
        whole = whole and found.whole
    return Range(low, high, whole)


def _applied(op: str, values: tuple[Range, ...], _: Expr) -> Range:
    if op in RISING:
        return _rising(op, *values)
    if op not in _OPERATIONS:
        return ANYTHING
    found = _OPERATIONS[op](*values)
    counted = values[1:] if op == "where" else values
    return replace(found, whole=op in _WHOLE and all(each.whole for each in counted))


def _terms(expr: Expr, sign: int) -> Iterator[tuple[int, Expr]]:
    match expr:
        case Binary("+" | "-" as op, left, right):
            yield from _terms(left, sign)
            yield from _terms(right, sign if op == "+" else -sign)
        case Unary("-", operand):
            yield from _terms(operand, -sign)
        case _:
            yield sign, expr


# ── operations ───────────────────────────────────────────────────────────────────────────


def _times(a: float, b: float) -> float:
    """Return a product: 0 · inf is 0, and no two positive numbers make zero."""
    if 0 in (a, b):
        return 0
    return a * b or math.copysign(LEAST, a) * math.copysign(1, b)


def _product(a: Range, b: Range) -> Range:
    corners = [_times(x, y) for x in a.ends for y in b.ends]
    return Range(min(corners), max(corners))


def _inverse(a: Range) -> Range:
    if not (a.low > 0 or a.high < 0):
        return ANYTHING
    low, high = (0.0 if abs(x) == INF else 1 / x for x in (a.high, a.low))
    if low == 0 and a.low < a.high:
        low = LEAST
    return Range(low, high)


def _floored(a: Range, by: Range) -> Range:
    """Return a // by, of whole numbers and one positive divisor."""
    if not (a.whole and by.whole and by.low == by.high and by.low > 0):
        return ANYTHING
    low, high = (end if abs(end) == INF else end // by.low for end in a.ends)
    return Range(low, high)


def _modulo(a: Range, by: Range) -> Range:
    one = a.whole and by.whole and by.low == by.high and by.low > 0
    return Range(0, by.low - 1) if one else ANYTHING


def _power(base: Range, exponent: Range) -> Range:
    if exponent.low == exponent.high and exponent.low % 2 == 0:
        base = _absolute(base)
    if exponent.high < 0 and base.above_zero:
        return _inverse(_power(base, Range(-exponent.high, -exponent.low)))
    if base.low < 0 or exponent.low < 0:
        return ANYTHING
    corners = [_at(math.pow, x, y) for x in base.ends for y in exponent.ends]
    low = min(corners)
    return Range(LEAST if low == 0 and base.above_zero else low, max(corners))


def _at(function: Callable[..., float], *values: float) -> float:
    try:
        return function(*values)
    except OverflowError:
        return INF
    except ValueError:  # the logarithm of zero or less, a root of less than zero
        return -INF


def _absolute(a: Range) -> Range:
    least = 0 if a.low <= 0 <= a.high else min(abs(a.low), abs(a.high))
    return Range(least, max(abs(a.low), abs(a.high)))


def _rising(name: str, a: Range) -> Range:
    function = FUNCTIONS[name].value
    first, last = _at(function, a.low), _at(function, a.high)
    inside = a.low < a.high or a.low > -INF
    low = LEAST if name in _POSITIVE and first == 0 and inside else first
    return Range(low, last, a.whole and name == "relu")


def _least(a: Range, b: Range) -> Range:
    return Range(min(a.low, b.low), min(a.high, b.high))


def _most(a: Range, b: Range) -> Range:
    return Range(max(a.low, b.low), max(a.high, b.high))


_OPERATIONS: dict[str, Callable[..., Range]] = {
    "negative": lambda a: Range(-a.high, -a.low),
    "*": _product,
    "/": lambda a, b: _product(a, _inverse(b)),
    "//": _floored,
    "%": _modulo,
    "**": _power,
    "abs": _absolute,
    "detach": lambda a: a,
    "min": _least,
    "max": _most,
    "clip": lambda a, b, c: _least(_most(a, b), c),
    "where": lambda _, a, b: Range(min(a.low, b.low), max(a.high, b.high)),
}
_WHOLE = ("negative", "*", "//", "%", "abs", "min", "max", "clip", "where")
