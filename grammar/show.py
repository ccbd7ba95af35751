"""One expression or statement as Loom text, in one line.

    show(Binary("*", Name("a"), Binary("+", Name("b"), Number(1))))  ==  "a * (b + 1)"

Parentheses stand where the grammar needs them, numbers are written as they were.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from . import syntax
from .chains import terms
from .comments import Node
from .syntax import Definition, Expr, Let, Param, Result, Setting, State

# ── expressions ──────────────────────────────────────────────────────────────────────────

_PIPE, _NOT, _COMPARE, _RANGE, _SUM, _UNARY, POSTFIX, _ATOM = 0, 3, 4, 5, 6, 8, 10, 11
_BINARY = {
    "or": 1, "and": 2, "+": 6, "-": 6, "*": 7, "/": 7, "//": 7, "%": 7, "@": 7, "**": 9,
}  # fmt: skip


def show(expr: Expr) -> str:
    """Return an expression as Loom text, with no more parentheses than it needs.

    >>> show(parse_expression("((a * b)) + (2 ** (c + 1))"))
    'a * b + 2 ** (c + 1)'
    """
    return _shown(expr)[0]


def _shown(expr: Expr) -> tuple[str, int]:
    """Return the text and how tightly it binds."""
    match expr:
        case syntax.Number(value, text):
            return text or repr(value), _ATOM if value >= 0 else _UNARY
        case syntax.String(value):
            return f'"{value}"', _ATOM
        case syntax.Name(id):
            return id, _ATOM
        case syntax.Unary("not", operand):
            return f"not {within(operand, _NOT)}", _NOT
        case syntax.Unary(op, operand):
            return f"{op}{within(operand, _UNARY)}", _UNARY
        case syntax.Binary("**", left, right):
            return f"{within(left, POSTFIX)} ** {within(right, _UNARY)}", _BINARY["**"]
        case syntax.Binary(op):
            level = _BINARY[op]
            lead, *more = terms(expr)
            again = isinstance(lead, syntax.Binary) and lead.op == op
            row = [within(lead, level + again), *(within(each, level + 1) for each in more)]
            return f" {op} ".join(row), level
        case syntax.Compare(operands, ops):
            first, *others = (within(each, _RANGE) for each in operands)
            rest = (f" {op} {other}" for op, other in zip(ops, others, strict=True))
            return first + "".join(rest), _COMPARE
        case syntax.Range(low, high):
            return f"{within(low, _SUM)}..{within(high, _SUM)}", _RANGE
        case syntax.Pipe(head, stages):
            stream = "" if head is None else within(head, _PIPE + 1) + " "
            return stream + " ".join(f"| {within(each, _PIPE + 1)}" for each in stages), _PIPE
        case _:
            return _postfix(expr), POSTFIX


def _postfix(expr: Expr) -> str:
    match expr:
        case syntax.Call(syntax.POOLED, (place,)):
            return show(place)
        case syntax.Call(function, args, keywords):
            named = [f"{each.name} = {show(each.value)}" for each in keywords]
            return f"{function}({', '.join([*map(show, args), *named])})"
        case syntax.Index(base, items):
            return f"{within(base, POSTFIX)}[{', '.join(map(show, items))}]"
        case syntax.Attribute(base, name):
            dotted = isinstance(base, syntax.Number)  # `1.a` would read as the number `1.`
            return f"({show(base)}).{name}" if dotted else f"{within(base, POSTFIX)}.{name}"
        case syntax.ListOf(items):
            return f"[{', '.join(map(show, items))}]"
        case _:
            raise TypeError(f"{type(expr).__name__} is not an expression")


def within(expr: Expr, level: int) -> str:
    text, own = _shown(expr)
    return text if own >= level else f"({text})"


# ── statements, in one line ──────────────────────────────────────────────────────────────

# A result that begins like this would be read as another statement, or as the end of the
# statement above it.
_MISREAD = re.compile(r"\||(?:let|param|const|state|branch)\b|where\b(?!\s*\()")


def declared(name: str, dims: Iterable[Expr]) -> str:
    """Return `z[heads]`, or the name alone."""
    inside = ", ".join(map(show, dims))
    return f"{name}[{inside}]" if inside else name


def head(name: str, params: Iterable[syntax.Parameter]) -> str:
    """Return `window(w = 64)`, or the name alone."""
    inside = ", ".join(
        each.name if each.default is None else f"{each.name} = {show(each.default)}"
        for each in params
    )
    return f"{name}({inside})" if inside else name


def result(node: Result | Setting) -> str:
    """Return `value`, or `value where condition`."""
    return show(node.value) + (f" where {show(node.where)}" if node.where is not None else "")


def initial(node: State) -> str:
    """Return `value`, or `value by weights`."""
    return show(node.init) + (f" by {show(node.weights)}" if node.weights is not None else "")


def statement(node: Node, pad: int = 0) -> str:
    """Return a statement without a body as one line; `pad` is the width of its name."""
    match node:
        case Setting(name):
            return f"{name:{pad}} = {result(node)}"
        case Let(name, value):
            return f"let {name:{pad}} = {show(value)}"
        case Param(name, dims, init, learned):
            return f"{'param' if learned else 'const'} {declared(name, dims)} = {show(init)}"
        case State(name, dims):
            return f"state {declared(name, dims)} = {initial(node)}"
        case syntax.Update(name, value):
            return f"{name} <- {show(value)}"
        case Result(value) if _MISREAD.match(show(value)):
            rest = "" if node.where is None else f" where {show(node.where)}"
            return f"({show(value)}){rest}"
        case Result():
            return result(node)
        case _:
            raise TypeError(f"{type(node).__name__} has a body")


def one_result(node: Node) -> Result | None:
    """Return what `mask causal = …` is written with: the only statement of a definition."""
    match node:
        case Definition(body=(Result() as only,), closing=()) if only.comments == syntax.SILENT:
            return only
        case _:
            return None
