"""Constants within expressions: which have no value, and where minus infinity may stand.

    s / (heads - 1)                where heads = 1      `s / 0`: division by zero
    where(a > 1, 1 / (a - 1), 0)   where a = 1          0: what is not chosen needs no value
    where(i > 2, s, log(0))                             minus infinity, a logit that weighs nothing
    s * log(0)                                          it cannot be multiplied by what is no number

`settle` folds as `fold` does, and raises where something has no value. Minus infinity is the
logarithm of 0 and the only number that is not finite: it may be added, chosen and compared, and
times a positive number; else its product, or a gradient, would be no number.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .expr import FALSE, TRUE, NotConstant, evaluate, rebuild, simplified
from .functions import FUNCTIONS
from .syntax import Binary, Call, Compare, Expr, Index, Name, Number, Unary, children

_SWALLOWS = ("exp", "sigmoid", "tanh", "relu", "softplus", "elu", "step", "rank_keys")
_PASSES = ("detach", "max_keys", "max_queries")


def settle(expr: Expr) -> Expr:
    """Fold an expression. Raises `NotConstant` at the smallest part that has no value."""
    match expr:
        case Call("where", (condition, yes, no), ()):
            condition = settle(condition)
            if condition in (TRUE, FALSE):
                return settle(yes if condition == TRUE else no)
            expr = replace(expr, args=(condition, settle(yes), settle(no)))
        case Binary("and" | "or" as op, left, right):
            left = settle(left)
            if left == (FALSE if op == "and" else TRUE):
                return left
            expr = replace(expr, left=left, right=settle(right))
        case _:
            expr = rebuild(expr, settle)
    match expr:
        case Binary("/" | "//" | "%", _, Number(0)):
            raise NotConstant(expr, "division by zero")
        case Unary() | Binary() | Compare():
            known = True
        case Call(function):
            known = function in FUNCTIONS
        case _:
            known = False
    if known and all(isinstance(each, Number) or each in (TRUE, FALSE) for each in children(expr)):
        evaluate(expr, {})
    return simplified(expr)


def infinite(expr: Expr, names: frozenset[str] = frozenset()) -> bool:
    """Say whether a settled expression may be minus infinity; `names` may.

    Raises `NotConstant` where minus infinity meets what it cannot.
    """
    parts = [infinite(each, names) for each in children(expr)]
    if not any(parts):
        match expr:
            case Number(value):
                return value == -math.inf
            case Name(id):
                return id in names
        return False
    match expr:
        case Compare() | Index():
            return False
        case Binary("+"):
            return True
        case Binary("-") if not parts[1]:
            return True
        case Binary("*", Number(value), _) | Binary("*" | "/", _, Number(value)) if value > 0:
            return True
        case Call("where", (_, _, _)):
            return parts[1] or parts[2]
        case Call("max", _):
            return all(parts)
        case Call("min", _):
            return True
        case Call("clip", _) if not parts[2]:
            return parts[0] and parts[1]
        case Call(name) if name in _SWALLOWS:
            return False
        case Call(name) if name in _PASSES:
            return parts[0]
    raise NotConstant(expr, "minus infinity cannot stand here")


def decisive(expr: Expr) -> tuple[Expr, ...]:
    """Return the operands of one part on which it depends whether that part has a value."""
    match expr:
        case Binary("/" | "//" | "%", _, divisor):
            return (divisor,)
        case Binary("**", base, exponent):
            return (base, exponent)
        case Call(name, args) if name in ("log", "log2", "sqrt", "exp"):
            return args
    return ()
