"""Whether an expression rises or falls with a name everywhere.

    relu(s - tau) ** 2         falls with tau, from inf to 0
    relu(s - tau) * exp(b)     falls
    relu(s - tau) * b          `Unclear`: b may have either sign
    relu(s - tau) ** -2        `Unclear`: it is infinite where relu(s - tau) is 0

It is found from the parts of an expression, and holds for every value of every name.
"""

from __future__ import annotations

from ...grammar.expr import names
from ...grammar.ranges import LEAST, RISING, between
from ...grammar.syntax import Binary, Call, Expr, Name, Number, Unary


class Unclear(Exception):
    """An expression may rise as well as fall, jump, or be infinite; `expr` is the part."""

    def __init__(self, expr: Expr, reason: str) -> None:
        super().__init__(reason)
        self.expr, self.reason = expr, reason


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
            below = between(right)
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
    sign = between(factor).sign
    if sign is None:
        raise Unclear(factor, "it may have either sign")
    return along * sign


def _of_power(expr: Expr, base: Expr, exponent: Expr, of: str) -> int:
    from_, by = between(base), between(exponent)
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
    raise Unclear(
        expr,
        "it is infinite where its base is 0"
        if by.high < 0
        else "its exponent may have either sign",
    )


def _of_call(expr: Expr, name: str, args: tuple[Expr, ...], of: str) -> int:
    match name, args:
        case "log" | "sqrt", (arg,) if between(arg).low < (LEAST if name == "log" else 0):
            raise Unclear(expr, "it is not defined everywhere")
        case _, (arg,) if name in RISING:
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
