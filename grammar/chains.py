"""Chains of one operator: `a or b or c or …` is one row of terms, not a nesting of them.

    a + b + c           (a + b) + c, as arithmetic has it
    t1 or … or t40      (t1 or … or t20) or (t21 or … or t40)

A chain of more terms than `SHORT` is read in halves, so that a mask of some hundred windows
is no deeper than one of twenty and every later stage may recurse. `terms` is the inverse: it
gives what stands between the operators where such a tree is written without parentheses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from .syntax import Binary, Expr

T = TypeVar("T")

CHAINED = frozenset(("or", "and", "+", "*"))
SHORT = 16  # so many terms are taken from left to right


def chain(op: str, terms: Sequence[T], join: Callable[[str, T, T], T]) -> T:
    """Return the tree of `terms[0] op terms[1] op …`, made by `join(op, left, right)`."""
    if op in CHAINED and len(terms) > SHORT:
        half = len(terms) // 2
        return join(op, chain(op, terms[:half], join), chain(op, terms[half:], join))
    done, *others = terms
    for each in others:
        done = join(op, done, each)
    return done


def terms(expr: Binary) -> list[Expr]:
    """Return the terms of which `chain` makes this tree; the first may need parentheses."""
    leaves = _leaves(expr)
    if expr.op in CHAINED and len(leaves) > SHORT and chain(expr.op, leaves, Binary) == expr:
        return leaves
    most = SHORT - 1 if expr.op in CHAINED else len(leaves)
    first: Expr = expr
    others: list[Expr] = []
    while isinstance(first, Binary) and first.op == expr.op and len(others) < most:
        others.append(first.right)
        first = first.left
    return [first, *reversed(others)]


def _leaves(expr: Binary) -> list[Expr]:
    """Return all that is joined by the operator, on both sides, from left to right."""
    found: list[Expr] = []
    stack: list[Expr] = [expr]
    while stack:
        node = stack.pop()
        if isinstance(node, Binary) and node.op == expr.op:
            stack += (node.right, node.left)
        else:
            found.append(node)
    return found
