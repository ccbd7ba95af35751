"""One walk over a scalar expression, for every kind of thing it may stand for.

    min(i, 4) + 1   as a number, with i = 7         5              `evaluate` in `expr`
                    as a range, with i at least 0   1 … 5          `between` in `ranges`
                    over arrays of positions        [1, 2, 3, …]   `numbers` of the mask algebra
                    as a sum of terms               {min(i, 4): 1}, 1

A domain says what a number, a name and each operation is. The reference has an evaluator of
its own (`ops/pointwise.py`), so that what is compared with it shares no code with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Generic, TypeVar

from .syntax import Binary, Call, Compare, Expr, Name, Number, Unary

V = TypeVar("V")


@dataclass(frozen=True)
class Domain(Generic[V]):
    """What the parts of an expression stand for.

    `leaf` takes what is no arithmetic: a name, an index. `apply` takes the symbol of an operator
    (that of a sign is `negative`) or the name of a function, the values, and the part itself.
    `known` may say what a part stands for as a whole, `settled` what its left side alone makes of
    an `and` or `or`; None leaves it to the parts.
    """

    number: Callable[[int | float], V]
    leaf: Callable[[Expr], V]
    apply: Callable[[str, tuple[V, ...], Expr], V]
    known: Callable[[Expr], V | None] = lambda _: None
    settled: Callable[[str, V], V | None] = lambda _op, _left: None


def interpret(expr: Expr, domain: Domain[V]) -> V:
    """Return what an expression stands for in a domain."""
    found = domain.known(expr)
    if found is not None:
        return found
    match expr:
        case Number(number):
            return domain.number(number)
        case Name("true" | "false" as id):
            return domain.number(id == "true")
        case Unary(op, operand):
            return domain.apply(
                "negative" if op == "-" else op, (interpret(operand, domain),), expr
            )
        case Binary(op, left, right):
            first = interpret(left, domain)
            if (found := domain.settled(op, first)) is not None:
                return found
            return domain.apply(op, (first, interpret(right, domain)), expr)
        case Compare(operands, ops):
            sides = [interpret(each, domain) for each in operands]
            links = zip(ops, sides, sides[1:], strict=False)
            parts = [domain.apply(op, (a, b), expr) for op, a, b in links]
            return reduce(lambda a, b: domain.apply("and", (a, b), expr), parts)
        case Call(function, args, ()):
            values = tuple([interpret(each, domain) for each in args])
            return domain.apply(function, values, expr)
    return domain.leaf(expr)
