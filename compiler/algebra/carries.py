"""What a token does to the keys before it, as one product that is added.

carry = k - 2 * b * w * dot(w, k)    →    along = -(2 * b * w),  by = w:  k + along · (by · k)
"""

from __future__ import annotations

from collections.abc import Callable

from ...grammar.expr import fold, names
from ...grammar.show import show
from ...grammar.syntax import Binary, Call, Expr, Name, Number, Unary
from .affine import RefusedError

KEY = "k"


def one_product(carry: Expr) -> tuple[Expr, Expr]:
    """Return `along` and `by` where a key k becomes k + along · (by · k).

    Raises `RefusedError`, which says which term is in the way.
    """
    found: tuple[Expr, Expr] | None = None
    kept = False
    for sign, term in _terms(carry, "+"):
        if term == Name(KEY) and sign == "+" and not kept:
            kept = True
            continue
        made = _product(term)
        if made is None:
            raise RefusedError(f"`{show(term)}` is neither the key nor `a * dot(c, k)`")
        if found is not None:
            raise RefusedError(f"`{show(carry)}` adds several products to a key")
        along, by = made
        found = (fold(along) if sign == "+" else Unary("-", fold(along))), by
    if not kept or found is None:
        raise RefusedError(f"`{show(carry)}` is not `k + a * dot(c, k)`")
    return found


def _terms(expr: Expr, sign: str) -> list[tuple[str, Expr]]:
    other = "-" if sign == "+" else "+"
    match expr:
        case Binary("+" | "-" as op, left, right):
            return [*_terms(left, sign), *_terms(right, sign if op == "+" else other)]
        case Unary("-", inner):
            return _terms(inner, other)
    return [(sign, expr)]


def _product(expr: Expr) -> tuple[Expr, Expr] | None:
    """Return a term as a product with `dot(by, k)`, and `by`; None where it is none."""

    def mapped(change: Callable[[Expr], Expr], inner: Expr) -> tuple[Expr, Expr] | None:
        made = _product(inner)
        return None if made is None else (change(made[0]), made[1])

    match expr:
        case Call("dot", (Name("k"), by)) | Call("dot", (by, Name("k"))) if KEY not in names(by):
            return Number(1, "1"), by
        case Call("outer", (along, by)) if not {KEY} & (names(along) | names(by)):
            return along, by
        case Binary("@", matrix, Name("k")):
            return _product(matrix)
        case Binary("*", left, right) if KEY not in names(left) and _product(right):
            return mapped(lambda each: Binary("*", left, each), right)
        case Binary("*" | "/" as op, left, right) if KEY not in names(right):
            return mapped(lambda each: Binary(op, each, right), left)
        case Unary("-", inner):
            return mapped(lambda each: Unary("-", each), inner)
    return None
