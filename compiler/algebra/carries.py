"""What a token does to the keys before it, as one product that is added.

carry = k - 2 * b * w * dot(w, k)    →    along = -(2 * b * w),  by = w:  k + along · (by · k)
"""

from __future__ import annotations

from ...grammar.expr import names
from ...grammar.show import show
from ...grammar.syntax import Binary, Call, Expr, Name, Unary
from .affine import RefusedError

KEY = "k"
Products = tuple[Expr | None, Expr]  # what `dot(by, k)` is multiplied by, None for nothing; by


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
        if along is None:
            raise RefusedError(f"`{show(term)}` is a number, and no vector")
        found = (along if sign == "+" else Unary("-", along)), by
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


def _product(expr: Expr) -> Products | None:
    """Return a term as a product with `dot(by, k)`, None where it is none."""
    match expr:
        case Call("dot", (Name("k"), by)) | Call("dot", (by, Name("k"))) if KEY not in names(by):
            return None, by
        case Binary("@", Call("outer", (along, by)), Name("k")) if not _reads_key(along, by):
            return along, by
        case Binary("*", left, right) if KEY not in names(left):
            return _times(left, _product(right))
        case Binary("*", left, right) if KEY not in names(right):
            return _times(right, _product(left))
        case Binary("/", left, right) if KEY not in names(right):
            made = _product(left)
            return (
                None if made is None or made[0] is None else (Binary("/", made[0], right), made[1])
            )
        case Unary("-", inner):
            made = _product(inner)
            return None if made is None or made[0] is None else (Unary("-", made[0]), made[1])
    return None


def _times(factor: Expr, made: Products | None) -> Products | None:
    if made is None:
        return None
    along, by = made
    return (factor if along is None else Binary("*", factor, along)), by


def _reads_key(*exprs: Expr) -> bool:
    return any(KEY in names(each) for each in exprs)
