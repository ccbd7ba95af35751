"""Updates of states that are kept in levels: what each level becomes, and what the token adds.

    S <- alpha * (S - beta * outer(k, k @ S)) + beta * outer(k, v)

is  alpha * (S - beta * outer(k, k @ S))  of every level, and  beta * outer(k, v)  for the first.
"""

from __future__ import annotations

from collections.abc import Callable

from ...grammar.expr import names
from ...grammar.syntax import Binary, Call, Expr, Name, Unary

MAX_LEVELS = 62  # a token's number has 63 bits
Parts = tuple[Expr | None, Expr | None]


class NotAffineError(Exception):
    """Its argument is the part of an expression that is not affine in the state."""


def affine_parts(expr: Expr, state: str, rank: Callable[[Expr], int]) -> Parts:
    """Return what an expression makes of a state, linear in it, and the rest; None for nothing.

    `rank` says how many dimensions a value has. Raises `NotAffineError`.
    """
    if state not in names(expr):
        return None, expr

    def below(each: Expr) -> Parts:
        return affine_parts(each, state, rank)

    def whole(each: Expr) -> Parts:
        """Take apart what is contracted: a number added to a matrix counts once an element."""
        parts = below(each)
        if None not in parts and len({rank(part) for part in parts if part is not None}) > 1:
            raise NotAffineError(each)
        return parts

    match expr:
        case Name():
            return expr, None
        case Unary("-", operand):
            linear, rest = below(operand)
            return _mapped(lambda each: Unary("-", each), linear, rest)
        case Binary("+" | "-" as op, left, right):
            (one, plain), (two, other) = below(left), below(right)
            return _joined(op, one, two), _joined(op, plain, other)
        case Binary("*", left, right) if state not in names(left):
            return _mapped(lambda each: Binary("*", left, each), *below(right))
        case Binary("*" | "/" as op, left, right) if state not in names(right):
            return _mapped(lambda each: Binary(op, each, right), *below(left))
        case Binary("@", left, right) if state not in names(left):
            return _mapped(lambda each: Binary("@", left, each), *whole(right))
        case Binary("@", left, right) if state not in names(right):
            return _mapped(lambda each: Binary("@", each, right), *whole(left))
        case Call("outer" | "dot" as name, (left, right)) if state not in names(left):
            return _mapped(lambda each: Call(name, (left, each)), *whole(right))
        case Call("outer" | "dot" as name, (left, right)) if state not in names(right):
            return _mapped(lambda each: Call(name, (each, right)), *whole(left))
        case Call("sum" | "mean" as name, (operand,)):
            return _mapped(lambda each: Call(name, (each,)), *whole(operand))
    raise NotAffineError(expr)


def _mapped(change: Callable[[Expr], Expr], linear: Expr | None, rest: Expr | None) -> Parts:
    return (None if linear is None else change(linear), None if rest is None else change(rest))


def _joined(op: str, left: Expr | None, right: Expr | None) -> Expr | None:
    if right is None:
        return left
    if left is None:
        return Unary("-", right) if op == "-" else right
    return Binary(op, left, right)
