"""The tree as text again: canonical Loom, canonical YAML, and single expressions.

    block local {               one setting a line, `=` aligned among neighbours
      heads    = 8
      mask     = causal and window(256)
    }

What is read back is the same tree with the same comments, and formatting it once more
changes nothing. Where a form cannot say something directly, it is said another way that
reads the same: `(state + 1)` for a result that begins like a declaration, a list of
mappings where YAML would need a key twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from . import syntax
from .comments import Bodied, Node
from .syntax import Branch, Definition, Expr, File, Let, Param, Result, Search, Setting, State

N = TypeVar("N", bound=Node)

WIDTH = 100
_UNEVEN = 12  # names whose lengths differ by this much are not aligned

# ── expressions ──────────────────────────────────────────────────────────────────────────

_PIPE, _NOT, _COMPARE, _RANGE, _SUM, _UNARY, _POSTFIX, _ATOM = 0, 3, 4, 5, 6, 8, 10, 11
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
            return f"not {_within(operand, _NOT)}", _NOT
        case syntax.Unary(op, operand):
            return f"{op}{_within(operand, _UNARY)}", _UNARY
        case syntax.Binary("**", left, right):
            return f"{_within(left, _POSTFIX)} ** {_within(right, _UNARY)}", _BINARY["**"]
        case syntax.Binary(op, left, right):
            level = _BINARY[op]
            return f"{_within(left, level)} {op} {_within(right, level + 1)}", level
        case syntax.Compare(operands, ops):
            first, *others = (_within(each, _RANGE) for each in operands)
            rest = (f" {op} {other}" for op, other in zip(ops, others, strict=True))
            return first + "".join(rest), _COMPARE
        case syntax.Range(low, high):
            return f"{_within(low, _SUM)}..{_within(high, _SUM)}", _RANGE
        case syntax.Pipe(head, stages):
            stream = "" if head is None else _within(head, _PIPE + 1) + " "
            return stream + " ".join(f"| {_within(each, _PIPE + 1)}" for each in stages), _PIPE
        case _:
            return _postfix(expr), _POSTFIX


def _postfix(expr: Expr) -> str:
    match expr:
        case syntax.Call(function, args, keywords):
            named = [f"{each.name} = {show(each.value)}" for each in keywords]
            return f"{function}({', '.join([*map(show, args), *named])})"
        case syntax.Index(base, items):
            return f"{_within(base, _POSTFIX)}[{', '.join(map(show, items))}]"
        case syntax.Attribute(base, name):
            dotted = isinstance(base, syntax.Number)  # `1.a` would read as the number `1.`
            return f"({show(base)}).{name}" if dotted else f"{_within(base, _POSTFIX)}.{name}"
        case syntax.ListOf(items):
            return f"[{', '.join(map(show, items))}]"
        case _:
            raise TypeError(f"{type(expr).__name__} is not an expression")


def _within(expr: Expr, level: int) -> str:
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


def result(node: Result) -> str:
    """Return `value`, or `value where condition`."""
    return show(node.value) + (f" where {show(node.where)}" if node.where is not None else "")


def statement(node: Node, pad: int = 0) -> str:
    """Return a statement without a body as one line; `pad` is the width of its name."""
    match node:
        case Setting(name, value):
            return f"{name:{pad}} = {show(value)}"
        case Let(name, value):
            return f"let {name:{pad}} = {show(value)}"
        case Param(name, dims, init, learned):
            return f"{'param' if learned else 'const'} {declared(name, dims)} = {show(init)}"
        case State(name, dims, init):
            return f"state {declared(name, dims)} = {show(init)}"
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


# ── Loom ─────────────────────────────────────────────────────────────────────────────────


def format_loom(file: File) -> str:
    """Return the file as Loom text."""
    lines: list[str] = []
    pads = _pads(file.items)
    for above, item, pad in zip((None, *file.items), file.items, pads, strict=False):
        if above is not None and not _together(above, item):
            lines.append("")
        lines += _node(item, 0, pad)
    if file.closing and lines:
        lines.append("")
    lines += file.closing
    return "".join(f"{line}\n" for line in lines)


def _together(above: Node, below: Node) -> bool:
    """Say whether two items stand without a blank line between them."""
    if below.comments.above:
        return False
    if isinstance(above, Definition) and isinstance(below, Definition):
        return above.kind == below.kind and None not in (one_result(above), one_result(below))
    return isinstance(above, Let) and isinstance(below, Let)


def _pads(nodes: Sequence[Node]) -> list[int]:
    """Return the width each name is padded to: that of the longest one in its run."""
    pads = [0] * len(nodes)
    start = 0
    for end in range(1, len(nodes) + 1):
        if end < len(nodes) and type(nodes[end]) is type(nodes[start]):
            continue
        run = [node for node in nodes[start:end] if isinstance(node, Setting | Let)]
        widths = [len(node.name) for node in run]
        if run and max(widths) - min(widths) < _UNEVEN:
            pads[start:end] = [max(widths)] * (end - start)
        start = end
    return pads


def _node(node: Node, indent: int, pad: int) -> list[str]:
    """Return the lines of a node, its comments included."""
    margin = " " * indent
    lines = [margin + comment for comment in node.comments.above]
    if (only := one_result(node)) is not None and isinstance(node, Definition):
        text = f"{node.kind} {head(node.name, node.params)} = {result(only)}"
        lines += broken(text, indent)
    elif not isinstance(node, Bodied):
        lines += broken(statement(node, pad), indent)
    else:
        lines += broken(_header(node) + " {", indent)
        if not (node.body or node.closing or node.comments.beside):
            return [*lines[:-1], lines[-1] + "}"]
        lines[-1] += _beside(node)
        for each, width in zip(node.body, _pads(node.body), strict=True):
            lines += _node(each, indent + 2, width)
        return [*lines, *(f"{margin}  {comment}" for comment in node.closing), margin + "}"]
    lines[-1] += _beside(node)
    return lines


def _beside(node: Node) -> str:
    return f"  {node.comments.beside}" if node.comments.beside else ""


def _header(node: Bodied) -> str:
    match node:
        case Search():
            return "search"
        case Branch(name):
            return f"branch {name}"
        case Definition(kind, name, params):
            return f"{kind} {head(name, params)}"
        case _:
            kind = "block" if isinstance(node, syntax.Block) else "model"
            base = "" if node.base is None else f" : {_within(node.base, _POSTFIX)}"
            return f"{kind} {head(node.name, node.params)}{base}"


# ── long lines ───────────────────────────────────────────────────────────────────────────

_MARK = re.compile(r'"[^"]*"|[(\[]|[)\]]|, | (?=(?:or|and) )| (?=\| )')


def broken(text: str, indent: int) -> list[str]:
    """Break a line that is too long: before its stages, then inside brackets."""
    if indent + len(text) <= WIDTH:
        return [" " * indent + text]
    stages = [at for at, mark, depth in _marks(text) if mark == "|" and depth == 0]
    cuts = [0, *stages, len(text)]
    parts = [text[a:b].strip() for a, b in zip(cuts, cuts[1:], strict=False)]
    lines = _filled(parts[0], indent)
    for part in parts[1:]:
        lines += _filled(part, indent + 2)
    return lines


def _marks(text: str) -> Iterable[tuple[int, str, int]]:
    """Yield where a line may go on below: the offset, what stands there, the open brackets."""
    depth = 0
    for match in _MARK.finditer(text):
        if match[0] in ("(", "["):
            depth += 1
        elif match[0] in (")", "]"):
            depth -= 1
        elif match[0] == ", ":
            yield match.end(), ",", depth
        elif match[0] == " ":
            yield match.end(), text[match.end()], depth


def _filled(text: str, indent: int) -> list[str]:
    """Fill lines up to the width, each ending where the text may be broken."""
    lines: list[str] = []
    start, last = 0, 0
    margin = indent
    for at, mark, depth in [*_marks(text), (len(text), "", 0)]:
        if margin + at - start > WIDTH + 1 and last > start:
            lines.append(" " * margin + text[start:last].rstrip())
            start, margin = last, indent + 4
        if depth or mark in "oa":
            last = at
    return [*lines, " " * margin + text[start:]]
