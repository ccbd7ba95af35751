"""Working on expressions: names, substitution, folding, numeric values.

Everything is a pure function on the frozen nodes of `syntax`. `fold` knows the identities
that are safe for every argument (`x + 0`, `1 * x`, `2 * 3`, `a and true`); it never
reorders what a float could tell apart.

    >>> fold(parse_expression("s * 1 + (4 - 4)"))
    Name(id='s')
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from . import syntax
from .domain import Domain, interpret
from .functions import FUNCTIONS
from .syntax import Binary, Call, Compare, Expr, Index, Name, Number, Unary

Value = int | float | bool
LIMIT = 2**62  # larger whole numbers than this are refused: no tensor has such a size

TRUE, FALSE = Name("true"), Name("false")
PLACES = frozenset(("i", "j", "h", "n", "m"))  # of a pair: tokens, head, and how many there are


class NotConstant(Exception):
    """The expression reads something that has no number; `node` is that part."""

    def __init__(self, node: Expr, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


def number(value: Value, like: Expr | None = None) -> Expr:
    """Return the literal for a value, standing where `like` stands."""
    span = like.span if like is not None else Number(0).span
    if isinstance(value, bool):
        return Name("true" if value else "false", span)
    return Number(value, "log(0)" if value == -math.inf else repr(value), span)


def rebuild(expr: Expr, visit: Callable[[Expr], Expr]) -> Expr:
    """Return the node with `visit` applied to each direct subexpression."""
    match expr:
        case Unary(_, operand):
            return replace(expr, operand=visit(operand))
        case Binary(_, left, right):
            return replace(expr, left=visit(left), right=visit(right))
        case Compare(operands):
            return replace(expr, operands=tuple(visit(each) for each in operands))
        case Call(_, args, keywords):
            return replace(
                expr,
                args=tuple(visit(each) for each in args),
                keywords=tuple(replace(each, value=visit(each.value)) for each in keywords),
            )
        case Index(base, items):
            return replace(expr, base=visit(base), items=tuple(visit(each) for each in items))
        case syntax.Attribute(base):
            return replace(expr, base=visit(base))
        case syntax.ListOf(items):
            return replace(expr, items=tuple(visit(each) for each in items))
        case syntax.Range(low, high):
            return replace(expr, low=visit(low), high=visit(high))
        case syntax.Pipe(head, stages):
            return replace(
                expr,
                head=None if head is None else visit(head),
                stages=tuple(visit(each) for each in stages),
            )
        case _:
            return expr


def substitute(expr: Expr, values: Mapping[str, Expr]) -> Expr:
    """Replace names by expressions; a called name is renamed when its value is a name."""
    if isinstance(expr, Name):
        return values.get(expr.id, expr)
    expr = rebuild(expr, lambda each: substitute(each, values))
    if isinstance(expr, Call) and isinstance(new := values.get(expr.function), Name):
        return replace(expr, function=new.id)
    return expr


def names(expr: Expr) -> set[str]:
    """Return every name that is read, called functions not included."""
    return {node.id for node in syntax.walk(expr) if isinstance(node, Name)}


def calls(expr: Expr, function: str) -> bool:
    """Say whether a function is called anywhere in the expression."""
    return any(isinstance(node, Call) and node.function == function for node in syntax.walk(expr))


def evaluate(expr: Expr, values: Mapping[str, Value]) -> Value:
    """Return the number (or truth) of an expression. Raises `NotConstant` where it has none."""

    def named(leaf: Expr) -> Value:
        if not isinstance(leaf, Name):
            raise NotConstant(leaf, "this is not a number")
        if leaf.id not in values:
            raise NotConstant(leaf, f"`{leaf.id}` has no value here")
        return values[leaf.id]

    return interpret(expr, Domain(lambda each: each, named, _applied, _refused, _settled))


def _refused(expr: Expr) -> None:
    if isinstance(expr, Call) and (expr.function not in FUNCTIONS or expr.keywords):
        raise NotConstant(expr, "this is not a number")


def _settled(op: str, left: Value) -> Value | None:
    """Return what `false and …` is, whatever the rest."""
    return bool(left) if op == ("or" if left else "and") else None


def _applied(op: str, values: tuple[Value, ...], expr: Expr) -> Value:
    if op in _TRUTHS:
        return _TRUTHS[op](*values)
    if op == "negative":
        return _finite(-values[0], expr)
    if op in FUNCTIONS:
        return _called(op, values, expr)
    return _arithmetic(op, values[0], values[1], expr)


_TRUTHS: dict[str, Callable[..., bool]] = {
    "not": lambda a: not a,
    "and": lambda a, b: bool(a) and bool(b),
    "or": lambda a, b: bool(a) or bool(b),
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def _called(function: str, values: tuple[Value, ...], expr: Expr) -> Value:
    try:
        return _finite(FUNCTIONS[function].value(*values), expr)
    except OverflowError:
        raise NotConstant(expr, "the result is too large") from None
    except (ArithmeticError, ValueError, TypeError):
        raise NotConstant(expr, f"`{function}` has no value there") from None


def _arithmetic(op: str, a: Value, b: Value, expr: Expr) -> Value:
    try:
        match op:
            case "+":
                result: Value = a + b
            case "-":
                result = a - b
            case "*":
                result = a * b
            case "/":
                result = a / b
                if isinstance(a, int) and isinstance(b, int) and a % b == 0:
                    result = a // b
            case "//":
                result = a // b
            case "%":
                result = a % b
            case "**":
                if isinstance(b, int) and abs(b) > 1024:
                    raise OverflowError("the exponent is too large")
                result = a**b
            case _:
                raise NotConstant(expr, f"`{op}` has no number")
    except ZeroDivisionError:
        raise NotConstant(expr, "division by zero") from None
    except (ArithmeticError, ValueError):
        raise NotConstant(expr, "the result is too large") from None
    if isinstance(result, complex):
        raise NotConstant(expr, "a negative number has no such root")
    if isinstance(result, int) and abs(result) > LIMIT:
        raise NotConstant(expr, "the result is too large")
    return _finite(result, expr)


def _finite(result: Value, expr: Expr) -> Value:
    """Return a result that is finite, or the minus infinity of a logarithm of 0."""
    if isinstance(result, float) and not math.isfinite(result) and result != -math.inf:
        raise NotConstant(expr, "the result is not a finite number")
    return result


def fold(expr: Expr) -> Expr:
    """Evaluate what is constant and drop neutral elements."""
    return simplified(rebuild(expr, fold))


def simplified(expr: Expr) -> Expr:
    """Fold an expression whose parts are folded."""
    match expr:
        case Number() | Name() | syntax.String():
            return expr
        case Unary("not", Name("true")):
            return FALSE
        case Unary("not", Name("false")):
            return TRUE
        case Unary("-", Unary("-", inner)):
            return inner
        case Binary("and", Name("true"), other) | Binary("and", other, Name("true")):
            return other
        case Binary("and", Name("false"), _) | Binary("and", _, Name("false")):
            return FALSE
        case Binary("or", Name("false"), other) | Binary("or", other, Name("false")):
            return other
        case Binary("or", Name("true"), _) | Binary("or", _, Name("true")):
            return TRUE
        case Binary("and" | "or", left, right) if left == right:
            return left
        case Binary("+", Number(0), other) | Binary("+" | "-", other, Number(0)):
            return other
        case Binary("*", Number(1), other) | Binary("*" | "/" | "**", other, Number(1)):
            return other
        case Binary("//", Name(place) as whole, Number(1)) if place in PLACES:
            return whole
        case Binary("*", Number(0) as zero, _) | Binary("*", _, Number(0) as zero):
            return zero
        case Binary("-", Number(0), other) if not isinstance(other, Number):
            return Unary("-", other, expr.span)
        case Call("where", (Name("true"), chosen, _), ()):
            return chosen
        case Call("where", (Name("false"), _, chosen), ()):
            return chosen
    if isinstance(expr, Unary | Binary | Compare | Call):
        try:
            return number(evaluate(expr, {}), expr)
        except NotConstant:
            return expr
    return expr
