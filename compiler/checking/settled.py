"""Expressions folded once and for all: a constant without a value is an error (L219).

score = s / (heads - 1)     with one head:   `s / 0`: division by zero
mask  = (i - j) % h == 0                     `(i - j) % 0` in head 0: division by zero
"""

from __future__ import annotations

from ...grammar.constants import decisive, infinite, settle
from ...grammar.diagnostics import LoomError, error
from ...grammar.expr import NotConstant, names, number, substitute
from ...grammar.show import show
from ...grammar.syntax import Expr, walk
from .scope import MAX_PLACES


def settled(expr: Expr, heads: int = 0) -> Expr:
    """Fold an expression, which may read `h`, of so many heads (L219)."""
    try:
        done = settle(expr)
    except NotConstant as problem:
        raise _without_value(problem) from None
    if any("h" in names(each) for node in walk(done) for each in decisive(node)):
        for h in range(min(heads, MAX_PLACES)):
            try:
                settle(substitute(done, {"h": number(h)}))
            except NotConstant as problem:
                raise _without_value(problem, f" in head {h}") from None
    return done


def _without_value(problem: NotConstant, where: str = "") -> LoomError:
    label = f"`{show(problem.node)}`{where}: {problem.reason}"
    return error("L219", "this constant has no value", problem.node.span, label)


def weighs_nothing(expr: Expr, reads: frozenset[str] = frozenset()) -> bool:
    """Say whether a settled expression may be minus infinity, as what it `reads` may (L219)."""
    try:
        return infinite(expr, reads)
    except NotConstant as problem:
        help = "it can be added, compared, chosen by `where`, and times a positive number"
        raise error(
            "L219",
            "minus infinity has no place here",
            problem.node.span,
            f"`{show(problem.node)}`",
            help,
        ) from None


def finite(expr: Expr, reads: frozenset[str] = frozenset()) -> Expr:
    """Return a settled expression that is never minus infinity (L219)."""
    if weighs_nothing(expr, reads):
        raise error(
            "L219",
            "this may be minus infinity",
            expr.span,
            f"`{show(expr)}`",
            "only a score may be: such a logit weighs nothing",
        )
    return expr
