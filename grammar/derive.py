"""Symbolic derivatives of scalar expressions.

    >>> show(derivative(parse_expression("50 * tanh(s / 50)"), Name("s")))
    '1 - tanh(s / 50) ** 2'

Piecewise functions get the derivative of the piece; at a kink, one of the two sides, as
automatic differentiation does. Indices, masks and rounding have derivative zero.
"""

from __future__ import annotations

from functools import cache

from .expr import fold, substitute
from .functions import FUNCTIONS
from .parse import parse_expression
from .syntax import Binary, Call, Compare, Expr, Index, Name, Number, Unary

_ZERO, _ONE = Number(0, "0"), Number(1, "1")


def derivative(expr: Expr, target: Expr) -> Expr:
    """Return d expr / d target, where the target is a name or an indexed tensor, folded."""
    return fold(_derive(expr, target))


def _derive(expr: Expr, target: Expr) -> Expr:
    if expr == target:
        return _ONE
    match expr:
        case Number() | Name() | Compare() | Index():
            return _ZERO
        case Unary("-", operand):
            return _negate(_derive(operand, target))
        case Binary("+" | "-" as op, left, right):
            return _sum(op, _derive(left, target), _derive(right, target))
        case Binary("*", left, right):
            return _sum(
                "+",
                _product(_derive(left, target), right),
                _product(left, _derive(right, target)),
            )
        case Binary("/", left, right):
            over = _derive(right, target)
            first = _quotient(_derive(left, target), right)
            if over == _ZERO:
                return first
            return _sum("-", first, _quotient(_product(expr, over), right))
        case Binary("**", base, exponent):
            return _power(base, exponent, target)
        case Call("sqrt", (Call("relu") as base,), ()):
            return _power(base, Number(0.5, "0.5"), target)
        case Call(function, args, ()) if function in FUNCTIONS:
            total: Expr = _ZERO
            for arg, partial in zip(args, _partials(function), strict=True):
                inner = _ZERO if partial is None else _derive(arg, target)
                if partial is None or inner == _ZERO:
                    continue
                outer = substitute(partial, dict(zip("abc", args, strict=False)))
                total = _sum("+", total, _product(outer, inner))
            return total
        case _:
            return _ZERO


def _power(base: Expr, exponent: Expr, target: Expr) -> Expr:
    of_base, of_exponent = _derive(base, target), _derive(exponent, target)
    lower = fold(Binary("-", exponent, _ONE))
    match base:
        case Call("relu", (arg,)) if not (isinstance(lower, Number) and lower.value >= 0):
            # relu(x) ** 0.5 is infinitely steep at 0, and flat where x is less
            inside = Compare((arg, _ZERO), (">",))
            steep = Binary("**", Call("where", (inside, arg, _ONE)), lower)
            part = _product(_product(exponent, steep), _derive(arg, target))
            first: Expr = Call("where", (inside, part, _ZERO)) if of_base != _ZERO else _ZERO
        case _:
            first = _product(_product(exponent, fold(Binary("**", base, lower))), of_base)
    if of_exponent == _ZERO:
        return first
    positive = base  # 0 ** e does not change with e: no logarithm of zero
    if not isinstance(base, Number):
        positive = Call("where", (Compare((base, _ZERO), ("==",)), _ONE, base))
    log = Call("log", (positive,))
    return _sum("+", first, _product(_product(Binary("**", base, exponent), log), of_exponent))


@cache
def _partials(function: str) -> tuple[Expr | None, ...]:
    return tuple(
        None if text is None else parse_expression(text) for text in FUNCTIONS[function].partials
    )


def _negate(expr: Expr) -> Expr:
    return expr if expr == _ZERO else Unary("-", expr)


def _sum(op: str, left: Expr, right: Expr) -> Expr:
    if right == _ZERO:
        return left
    if left == _ZERO:
        return right if op == "+" else _negate(right)
    return Binary(op, left, right)


def _product(left: Expr, right: Expr) -> Expr:
    if _ZERO in (left, right):
        return _ZERO
    if left == _ONE:
        return right
    return left if right == _ONE else Binary("*", left, right)


def _quotient(left: Expr, right: Expr) -> Expr:
    return _ZERO if left == _ZERO else Binary("/", left, right)
