"""The expressions of scores, masks, normalisers and mixers: names resolved, shapes known.

    dot(q, k) / (norm(q) * norm(k))          a number, of two vectors
    S <- alpha * (S - outer(k, k @ S))       a matrix, of a number, a matrix and a vector

A value is a number (), a vector (d) or a matrix (a, b), or is true or false. A number goes
with anything; a vector times a matrix scales its rows; `@` contracts the last dimension with
the first. What names and indices stand for, a subclass says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from ...grammar.diagnostics import error
from ...grammar.functions import FUNCTIONS, VECTOR_FUNCTIONS
from ...grammar.syntax import Binary, Call, Compare, Expr, Index, Name, Number, Unary
from .scope import Scope, inline_stage, suggest

Dims = tuple[int, ...]


class Value(NamedTuple):
    """A resolved expression, its dimensions, and whether it is true or false."""

    expr: Expr
    dims: Dims = ()
    truth: bool = False


class Resolver(ABC):
    """Resolves one expression; `what` is what a message calls it."""

    scope: Scope
    what: str

    @abstractmethod
    def name(self, expr: Name) -> Value:
        """Return what a name stands for."""

    @abstractmethod
    def index(self, expr: Index) -> Value:
        """Return what an index stands for."""

    def call(self, expr: Call) -> Value | None:  # noqa: ARG002
        """Return what a call stands for that only this kind of expression knows."""
        return None

    @abstractmethod
    def other(self, expr: Expr) -> Value:
        """Return the value of any other expression, or raise."""

    def as_truth(self, value: Value) -> Value | None:  # noqa: ARG002
        """Return what a number says where it stands for true or false, if it does."""
        return None

    def number(self, expr: Expr) -> Value:
        """Resolve an expression that must be a number, a vector or a matrix (L210)."""
        return self._want(expr, truth=False)

    def truth(self, expr: Expr) -> Value:
        """Resolve an expression that must be true or false (L210)."""
        return self._want(expr, truth=True)

    def _want(self, expr: Expr, *, truth: bool) -> Value:
        found = self.visit(expr)
        if truth and not found.truth:
            found = self.as_truth(found) or found
        if found.truth != truth:
            is_, needs = ("a number", "true or false") if truth else ("true or false", "a number")
            raise error("L210", f"this must be {needs}", expr.span, f"it is {is_}")
        return found

    def visit(self, expr: Expr) -> Value:
        match expr:
            case Number():
                return Value(expr)
            case Name("true" | "false"):
                return Value(expr, (), True)
            case Name():
                return self.name(expr)
            case Index():
                return self.index(expr)
            case Unary("not", operand):
                a = self.truth(operand)
                return Value(Unary("not", a.expr, expr.span), a.dims, True)
            case Unary(op, operand):
                a = self.number(operand)
                return Value(Unary(op, a.expr, expr.span), a.dims)
            case Binary("@", left, right):
                return self._contract(expr, self.number(left), self.number(right))
            case Binary("and" | "or" as op, left, right):
                a, b = self.truth(left), self.truth(right)
                return Value(Binary(op, a.expr, b.expr, expr.span), together(expr, a, b), True)
            case Binary(op, left, right):
                a, b = self.number(left), self.number(right)
                return Value(Binary(op, a.expr, b.expr, expr.span), together(expr, a, b))
            case Compare(operands, ops):
                sides = [self.number(each) for each in operands]
                done = Compare(tuple(each.expr for each in sides), ops, expr.span)
                return Value(done, together(expr, *sides), True)
            case Call():
                return self.call(expr) or self._function(expr)
            case _:
                return self.other(expr)

    def _contract(self, expr: Binary, a: Value, b: Value) -> Value:
        if not a.dims or not b.dims or a.dims[-1] != b.dims[0]:
            raise error(
                "L216",
                "`@` contracts the last dimension with the first",
                expr.span,
                f"{list(a.dims)} @ {list(b.dims)}",
            )
        return Value(Binary("@", a.expr, b.expr, expr.span), a.dims[:-1] + b.dims[1:])

    def _function(self, expr: Call) -> Value:
        name = expr.function
        if stage := self.scope.library.find("stage", name):
            with self.scope.inside(stage, expr.span):
                return self.visit(inline_stage(self.scope, stage, expr))
        arity = VECTOR_FUNCTIONS.get(name) or (FUNCTIONS[name].arity if name in FUNCTIONS else None)
        if arity is None:
            raise self.unknown(expr)
        if len(expr.args) != arity or expr.keywords:
            given = len(expr.args) + len(expr.keywords)
            raise error("L209", f"`{name}` takes {plain(arity)}", expr.span, f"{given} given")
        parts = [
            self._want(arg, truth=name == "where" and at == 0) for at, arg in enumerate(expr.args)
        ]
        done = Call(name, tuple(each.expr for each in parts), (), expr.span)
        shapes = [each.dims for each in parts]
        if name in ("sum", "mean", "norm"):
            return Value(done)
        if name in ("outer", "dot"):
            if any(len(dims) != 1 for dims in shapes) or (name == "dot" and shapes[0] != shapes[1]):
                raise error(
                    "L216",
                    f"`{name}` takes two vectors",
                    expr.span,
                    " and ".join(str(list(dims)) for dims in shapes),
                )
            return Value(done, () if name == "dot" else shapes[0] + shapes[1])
        return Value(done, together(expr, *parts), FUNCTIONS[name].boolean)

    def unknown(self, expr: Call) -> Exception:
        """Return the error for a call that nothing answers (L201)."""
        return error(
            "L201",
            f"`{expr.function}` is not a function",
            expr.span,
            "",
            suggest(expr.function, FUNCTIONS, VECTOR_FUNCTIONS),
        )


def plain(count: int) -> str:
    """Return how many arguments something takes, in words."""
    return "one plain argument" if count == 1 else f"{count or 'no'} plain arguments"


def together(expr: Expr, *values: Value) -> Dims:
    """Return the dimensions that elementwise work on these gives (L216)."""
    dims: Dims = ()
    for each in values:
        dims = _two(expr, dims, each.dims)
    return dims


def _two(expr: Expr, one: Dims, two: Dims) -> Dims:
    if one == two or two == ():
        return one
    if one == ():
        return two
    if len(one) != len(two):
        vector, matrix = (one, two) if len(one) < len(two) else (two, one)
        if vector[0] == matrix[0]:
            return matrix
    raise error(
        "L216", "these shapes do not go together", expr.span, f"{list(one)} and {list(two)}"
    )
