"""The syntax tree: what a `.loom` or YAML text says, before anything is checked.

`parse` and `from_yaml` make these nodes, `format` prints them, `compiler.checking` gives them
meaning. All nodes are frozen and compare without their spans and comments.

    mask = causal and window(256)

is  Setting("mask", Binary("and", Name("causal"), Call("window", (Number(256),))))
"""

# `_span()` and `_comments()` make a new `field` each time: a dataclass must not share one.
# ruff: noqa: RUF009

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .source import NOWHERE, Span


def _span() -> Span:
    return field(default=NOWHERE, compare=False, repr=False)


# ── expressions ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Number:
    """A literal; `text` keeps how it was written (`10_000`, `64Ki`)."""

    value: int | float
    text: str = field(default="", compare=False, repr=False)
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class String:
    value: str
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Name:
    id: str
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Unary:
    """`op` is `-` or `not`."""

    op: str
    operand: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Binary:
    """`op` is one of `or and + - * / // % @ **`."""

    op: str
    left: Expr
    right: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Compare:
    """A chain: `0 <= i - j < 256` has three operands and two ops."""

    operands: tuple[Expr, ...]
    ops: tuple[str, ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Keyword:
    name: str
    value: Expr
    span: Span = _span()


POOLED = "[pooled]"  # a call around the place at which a pooled stream is read; nobody writes it


@dataclass(frozen=True, slots=True)
class Call:
    function: str
    args: tuple[Expr, ...] = ()
    keywords: tuple[Keyword, ...] = ()
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Index:
    base: Expr
    items: tuple[Expr, ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Attribute:
    base: Expr
    name: str
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class ListOf:
    items: tuple[Expr, ...]
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Range:
    """`low..high`, both ends included."""

    low: Expr
    high: Expr
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Pipe:
    """`head | stage | stage`; a stage's body (`= | linear | silu`) has no head."""

    head: Expr | None
    stages: tuple[Expr, ...]
    span: Span = _span()


Expr = (
    Number
    | String
    | Name
    | Unary
    | Binary
    | Compare
    | Call
    | Index
    | Attribute
    | ListOf
    | Range
    | Pipe
)


def children(expr: Expr) -> tuple[Expr, ...]:
    """Return the direct subexpressions, in the order they are written."""
    match expr:
        case Number() | String() | Name():
            return ()
        case Unary(_, operand):
            return (operand,)
        case Binary(_, left, right):
            return (left, right)
        case Compare(operands):
            return operands
        case Call(_, args, keywords):
            return args + tuple(keyword.value for keyword in keywords)
        case Index(base, items):
            return (base, *items)
        case Attribute(base):
            return (base,)
        case ListOf(items):
            return items
        case Range(low, high):
            return (low, high)
        case Pipe(head, stages):
            return stages if head is None else (head, *stages)


def walk(expr: Expr) -> Iterator[Expr]:
    """Yield the expression and everything below it, parents first, without recursion."""
    stack: list[Expr] = [expr]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(children(node)))


def depth(expr: Expr) -> int:
    """Return how many levels the expression has; a name has one."""
    level, row = 0, [expr]
    while row:
        level, row = level + 1, [child for each in row for child in children(each)]
    return level


# ── statements ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Comments:
    """The comment lines above a statement, and the one at the end of its line (with `#`).

    An empty line above stands for a gap between paragraphs.
    """

    above: tuple[str, ...] = ()
    beside: str = ""


SILENT = Comments()


def _comments() -> Comments:
    return field(default=SILENT, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Setting:
    """`heads = 8`; `where` holds the condition that fixes `tau`, as in a `Result`."""

    name: str
    value: Expr
    where: Expr | None = None
    comments: Comments = _comments()
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Let:
    """`let gate = x | linear | sigmoid`"""

    name: str
    value: Expr
    comments: Comments = _comments()
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Param:
    """`param z[heads] = 0`; `const` where it is not learned."""

    name: str
    dims: tuple[Expr, ...]
    init: Expr
    learned: bool = True
    comments: Comments = _comments()
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class State:
    """`state S[head_dim, value_dim] = 0`; `by lam` keeps it in levels, and weighs them."""

    name: str
    dims: tuple[Expr, ...]
    init: Expr
    weights: Expr | None = None
    comments: Comments = _comments()
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Update:
    """`S <- S + outer(k, v)`"""

    name: str
    value: Expr
    comments: Comments = _comments()
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Result:
    """The value of a definition; `where` holds the condition that fixes `tau`."""

    value: Expr
    where: Expr | None = None
    comments: Comments = _comments()
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Branch:
    """`branch NAME { … }` inside a block."""

    name: str
    body: tuple[Statement, ...]
    closing: tuple[str, ...] = field(default=(), compare=False, repr=False)
    comments: Comments = _comments()
    span: Span = _span()


Statement = Setting | Let | Param | State | Update | Result | Branch


def declared(body: tuple[Statement, ...]) -> set[str]:
    """Return the names that statements introduce, those of branches included."""
    found: set[str] = set()
    for statement in body:
        match statement:
            case Let(name) | Param(name) | State(name) | Update(name):
                found.add(name)
            case Branch(name, inner):
                found |= {name} | declared(inner)
    return found


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a definition, with its default."""

    name: str
    default: Expr | None = None
    span: Span = _span()


PART_KINDS = ("layer", "ffn")


@dataclass(frozen=True, slots=True)
class Block:
    """`block NAME(params) : BASE { … }`; `closing` are the comments before the brace.

    A `layer` and an `ffn` are said as a block is; `kind` tells them apart.
    """

    name: str
    params: tuple[Parameter, ...]
    base: Expr | None
    body: tuple[Statement, ...]
    kind: str = "block"
    closing: tuple[str, ...] = field(default=(), compare=False, repr=False)
    comments: Comments = _comments()
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    params: tuple[Parameter, ...]
    base: Expr | None
    body: tuple[Statement, ...]
    closing: tuple[str, ...] = field(default=(), compare=False, repr=False)
    comments: Comments = _comments()
    span: Span = _span()


@dataclass(frozen=True, slots=True)
class Search:
    body: tuple[Statement, ...]
    closing: tuple[str, ...] = field(default=(), compare=False, repr=False)
    comments: Comments = _comments()
    span: Span = _span()


DEFINITION_KINDS = ("mask", "similarity", "score", "normalize", "weights", "mix", "stage")


@dataclass(frozen=True, slots=True)
class Definition:
    """`mask window(w) = abs(i - j) < w`, or with braces where it needs several statements.

    `= expression` is a body of one `Result`; a pipeline or scalar body alike.
    """

    kind: str
    name: str
    params: tuple[Parameter, ...]
    body: tuple[Statement, ...]
    closing: tuple[str, ...] = field(default=(), compare=False, repr=False)
    comments: Comments = _comments()
    span: Span = _span()


Item = Let | Definition | Block | Model | Search


@dataclass(frozen=True, slots=True)
class File:
    """A whole text; `closing` are the comments after its last item."""

    items: tuple[Item, ...]
    closing: tuple[str, ...] = field(default=(), compare=False, repr=False)
    span: Span = _span()


def expressions(node: Item | Statement | Parameter) -> Iterator[tuple[object, Expr]]:
    """Yield every whole expression in an item or statement, with what it stands in."""
    match node:
        case Let(_, value) | Update(_, value):
            yield node, value
        case Param(_, dims, init):
            yield from ((node, each) for each in (*dims, init))
        case State(_, dims, init, weights):
            more = () if weights is None else (weights,)
            yield from ((node, each) for each in (*dims, init, *more))
        case Setting(_, value, where) | Result(value, where):
            yield from ((node, each) for each in (value, where) if each is not None)
        case Parameter(_, default):
            yield from ((node, each) for each in (default,) if each is not None)
        case Branch() | Search():
            yield from _of_all(node.body)
        case Definition():
            yield from _of_all((*node.params, *node.body))
        case Block() | Model():
            yield from _of_all(node.params)
            if node.base is not None:
                yield node, node.base
            yield from _of_all(node.body)


def _of_all(nodes: tuple[Statement | Parameter, ...]) -> Iterator[tuple[object, Expr]]:
    for each in nodes:
        yield from expressions(each)
