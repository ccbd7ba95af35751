"""Text in, syntax tree out.

`parse` reads a whole `.loom` text, `parse_expression` one expression (a YAML scalar, say)
that stands at some offset of a larger text. Both raise `LoomError`, never anything else:
the size of a text and the depth of its nesting are bounded here, for every later stage.

    >>> parse("block a { heads = 8 }").items[0].name
    'a'
"""

# A rule's method is handed where the rule stands, whether it needs to know or not.
# ruff: noqa: ARG002

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import lark
from lark import Lark, Token, UnexpectedInput, v_args
from lark.exceptions import VisitError
from lark.tree import Meta
from lark.visitors import Transformer_NonRecursive

from . import syntax
from .chains import chain
from .comments import attach
from .complaints import APART, AS_YAML, END, explain, with_separator, without_statement
from .diagnostics import Diagnostic, LoomError, error
from .source import Piece, Source, Span
from .store import folder
from .tokens import LineEnds, TokenReader, TooDeepError

E = TypeVar("E", bound=syntax.Expr | syntax.Branch)
H = TypeVar("H", syntax.Block, syntax.Model)

Part = Literal["expression", "result", "statement", "head", "declared", "initial"]

MAX_BYTES = 1 << 18
MAX_DEPTH = 64
MAX_BRANCHES = 16  # so that the YAML form, three levels a branch, stays within MAX_DEPTH
_MAX_BRACKETS = 4 * MAX_DEPTH  # parentheses are no level of the tree, but cost time
MAX_REPORTED = 20
_RECOVERABLE = MAX_BYTES // 8  # reading a larger text again and again would take too long
_SUFFIX = {"K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def read(path: str | Path) -> Source:
    """Read a file as a source. Raises `LoomError` (L001) if it is missing, huge or not text."""
    path = Path(path)
    here = Span(Source(str(path), ""), 0, 0)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise error(
                "L001",
                f"`{path}` is too large to be a description",
                here,
                f"{size:,} bytes, the limit is {MAX_BYTES:,}",
            )
        return Source(str(path), path.read_text(encoding="utf-8"))
    except OSError as problem:
        reason = (problem.strerror or str(problem)).lower()
        raise error("L001", f"cannot read `{path}`", here, reason) from None
    except UnicodeDecodeError as problem:
        label = f"byte {problem.start} is not valid utf-8"
        raise error("L001", f"`{path}` is not text", here, label) from None


def parse(text: str | Source, name: str = "<text>") -> syntax.File:
    """Parse a `.loom` text. Raises `LoomError` with every syntax error that was found."""
    source = text if isinstance(text, Source) else Source(name, text)
    check_size(source)
    whole = Piece(source, 0, len(source.text), _without_mark(source.text))
    try:
        file: syntax.File = _build(whole, "start")
    except UnexpectedInput as problem:
        raise LoomError(_all_problems(problem, whole)) from None
    return attach(file)


def _all_problems(problem: UnexpectedInput, whole: Piece) -> list[Diagnostic]:
    """Explain the first problem, then read on without the statement it stands in."""
    found: list[Diagnostic] = []
    text = whole.text
    while True:
        diagnostic = explain(problem, replace(whole, text=text))
        ended = diagnostic.label == END
        # What is cut away can leave the rest unfinished: only a first error may say so.
        if not found or not (ended or _repeats(diagnostic, found)):
            found.append(diagnostic)
        mended = with_separator if diagnostic.label == APART else without_statement
        text, changed = mended(text, diagnostic.span.start)
        if ended or not changed or len(found) >= MAX_REPORTED or len(text) > _RECOVERABLE:
            return found
        try:
            _build(replace(whole, text=text), "start")
        except UnexpectedInput as another:
            problem = another
        except LoomError as others:
            return [*found, *others.diagnostics]
        else:
            return found


def _repeats(diagnostic: Diagnostic, found: list[Diagnostic]) -> bool:
    """Say whether an error stands where another does, or comes of the same open bracket."""
    return any(
        each.span == diagnostic.span
        or (each.help == diagnostic.help and (" of line " in each.help or each.help == AS_YAML))
        for each in found
    )


def _without_mark(text: str) -> str:
    """Replace the byte order mark some editors write; the offsets stay what they are."""
    return " " + text[1:] if text.startswith("\ufeff") else text


def parse_expression(text: str, source: Source | None = None, offset: int = 0) -> syntax.Expr:
    """Parse one expression or pipeline whose text begins at `offset` of `source`."""
    source = source or Source("<expression>", text)
    piece = Piece(source, offset, offset + len(text), text)
    check_size(Source(source.name, text), piece.span(0, 1))
    expr: syntax.Expr = parse_piece(piece, "expression")
    return expr


def parse_piece(piece: Piece, start: Part) -> Any:
    """Parse a piece of a larger text; `start` says what it holds.

    An `expression` gives an `Expr`, a `result` (`s where s == 1`) a `Result`, a `statement` a
    `Statement`, a `head` (`window(w = 8)`) a name and its parameters, a `declared`
    (`z[heads]`) a name and its dimensions, an `initial` (`0 by lam`) a value and the weights.
    """
    try:
        return _build(piece, start)
    except UnexpectedInput as problem:
        raise LoomError([explain(problem, piece)]) from None


def _build(piece: Piece, start: str) -> Any:
    try:
        tree = _lark().parse(piece.text, start=start)
        return _ToSyntax(piece).transform(tree)
    except VisitError as problem:
        raise problem.orig_exc from None
    except TooDeepError as problem:
        label = f"more than {_MAX_BRACKETS} open brackets"
        at = problem.args[0].start_pos
        span = piece.span(at, at + 1)
        raise error("L103", "this is nested too deeply", span, label) from None


@cache
def _lark() -> Lark:
    """Return the parser; its tables are kept, as building them takes longer than a check.

    Lark makes them anew when the grammar or its own version is another.
    """
    where = folder()
    grammar = Path(__file__).with_name("loom.lark").read_text(encoding="utf-8")
    return Lark(
        grammar,
        parser="lalr",
        start=["start", *get_args(Part)],
        lexer=TokenReader,
        postlex=LineEnds(_MAX_BRACKETS),
        propagate_positions=True,
        maybe_placeholders=False,
        cache=str(where / f"grammar-{lark.__version__}.pickle") if where else False,
    )


@v_args(meta=True)
class _ToSyntax(Transformer_NonRecursive[Token, Any]):
    """One method a grammar rule; refuses trees that recursion could not walk later."""

    def __init__(self, piece: Piece) -> None:
        super().__init__()
        self._piece = piece
        self._depth: dict[int, int] = {}

    def _span(self, meta: Meta) -> Span:
        return (
            self._piece.span(0, 0) if meta.empty else self._piece.span(meta.start_pos, meta.end_pos)
        )

    def _node(self, node: E, *below: Any, limit: int = MAX_DEPTH) -> E:
        depth = 1 + max((self._depth.get(id(each), 0) for each in below), default=0)
        if depth > limit:
            label = f"more than {limit} levels"
            help = "" if isinstance(node, syntax.Branch) else "name a part of it with `let`"
            raise error("L103", "this is nested too deeply", node.span, label, help)
        self._depth[id(node)] = depth
        return node

    # expressions

    def number(self, meta: Meta, args: list[Token]) -> syntax.Expr:
        text = str(args[0])
        return self._node(syntax.Number(_number(text, self._span(meta)), text, self._span(meta)))

    def string(self, meta: Meta, args: list[Token]) -> syntax.Expr:
        return self._node(syntax.String(str(args[0])[1:-1], self._span(meta)))

    def name(self, meta: Meta, args: list[Token]) -> syntax.Expr:
        return self._node(syntax.Name(str(args[0]), self._span(meta)))

    def group(self, meta: Meta, args: list[Any]) -> syntax.Expr:
        node: syntax.Expr = replace(args[0], span=self._span(meta))
        self._depth[id(node)] = self._depth[id(args[0])]  # parentheses are no level of the tree
        return node

    def unary(self, meta: Meta, args: list[Any]) -> syntax.Expr:
        return self._node(syntax.Unary(str(args[0]), args[1], self._span(meta)), args[1])

    def binary(self, meta: Meta, args: list[Any]) -> syntax.Expr:
        left, op, right = args
        return self._joined(str(op), left, right)

    def _joined(self, op: str, left: syntax.Expr, right: syntax.Expr) -> syntax.Expr:
        return self._node(syntax.Binary(op, left, right, left.span.to(right.span)), left, right)

    def chain(self, meta: Meta, args: list[Any]) -> syntax.Expr:
        done: syntax.Expr = args[0]
        for op, run in groupby(zip(args[1::2], args[2::2], strict=True), lambda each: str(each[0])):
            done = chain(op, [done, *(term for _, term in run)], self._joined)
        return done

    def compare(self, meta: Meta, args: list[Any]) -> syntax.Expr:
        operands, ops = tuple(args[::2]), tuple(str(op) for op in args[1::2])
        return self._node(syntax.Compare(operands, ops, self._span(meta)), *operands)

    def range_(self, meta: Meta, args: list[Any]) -> syntax.Expr:
        return self._node(syntax.Range(args[0], args[1], self._span(meta)), *args)

    def pipe(self, meta: Meta, args: list[Any]) -> syntax.Expr:
        node = syntax.Pipe(args[0], tuple(args[1:]), self._span(meta))
        return self._node(node, *args)

    def headless(self, meta: Meta, args: list[Any]) -> syntax.Expr:
        return self._node(syntax.Pipe(None, tuple(args), self._span(meta)), *args)

    def keyword(self, meta: Meta, args: list[Any]) -> syntax.Keyword:
        node = syntax.Keyword(str(args[0]), args[1], self._span(meta))
        self._depth[id(node)] = self._depth.get(id(args[1]), 0)
        return node

    def call(self, meta: Meta, args: list[Any]) -> syntax.Expr:
        keywords = tuple(each for each in args[1:] if isinstance(each, syntax.Keyword))
        plain = tuple(each for each in args[1:] if not isinstance(each, syntax.Keyword))
        node = syntax.Call(str(args[0]), plain, keywords, self._span(meta))
        return self._node(node, *args[1:])

    def index(self, meta: Meta, args: list[Any]) -> syntax.Expr:
        node = syntax.Index(args[0], tuple(args[1:]), self._span(meta))
        return self._node(node, *args)

    def attribute(self, meta: Meta, args: list[Any]) -> syntax.Expr:
        return self._node(syntax.Attribute(args[0], str(args[1]), self._span(meta)), args[0])

    def list_(self, meta: Meta, args: list[Any]) -> syntax.Expr:
        return self._node(syntax.ListOf(tuple(args), self._span(meta)), *args)

    def expression(self, meta: Meta, args: list[Any]) -> syntax.Expr:
        expr: syntax.Expr = args[0]
        return expr

    # pieces

    def statement(self, meta: Meta, args: list[Any]) -> syntax.Statement:
        statement: syntax.Statement = args[0]
        return statement

    def head(self, meta: Meta, args: list[Any]) -> tuple[str, tuple[syntax.Parameter, ...]]:
        return str(args[0]), tuple(args[1]) if len(args) == 2 else ()

    def declared(self, meta: Meta, args: list[Any]) -> tuple[str, tuple[syntax.Expr, ...]]:
        return str(args[0]), args[1] if len(args) == 2 else ()

    def initial(self, meta: Meta, args: list[Any]) -> tuple[syntax.Expr, syntax.Expr | None]:
        return args[0], args[1] if len(args) == 2 else None

    # statements

    def setting(self, meta: Meta, args: list[Any]) -> syntax.Setting:
        where = args[2] if len(args) == 3 else None
        return syntax.Setting(str(args[0]), args[1], where, span=self._span(meta))

    def let(self, meta: Meta, args: list[Any]) -> syntax.Let:
        return syntax.Let(str(args[0]), args[1], span=self._span(meta))

    def dims(self, meta: Meta, args: list[Any]) -> tuple[Any, ...]:
        return tuple(args)

    def _declared(self, args: list[Any]) -> tuple[str, tuple[Any, ...], Any]:
        return str(args[0]), args[1] if len(args) == 3 else (), args[-1]

    def param(self, meta: Meta, args: list[Any]) -> syntax.Param:
        return syntax.Param(*self._declared(args), learned=True, span=self._span(meta))

    def const(self, meta: Meta, args: list[Any]) -> syntax.Param:
        return syntax.Param(*self._declared(args), learned=False, span=self._span(meta))

    def state(self, meta: Meta, args: list[Any]) -> syntax.State:
        name, dims, (init, weights) = self._declared(args)
        return syntax.State(name, dims, init, weights, span=self._span(meta))

    def update(self, meta: Meta, args: list[Any]) -> syntax.Update:
        return syntax.Update(str(args[0]), args[1], span=self._span(meta))

    def result(self, meta: Meta, args: list[Any]) -> syntax.Result:
        where = args[1] if len(args) == 2 else None
        return syntax.Result(args[0], where, span=self._span(meta))

    def branch(self, meta: Meta, args: list[Any]) -> syntax.Branch:
        node = syntax.Branch(str(args[0]), args[1], span=self._span(meta))
        below = (each for each in args[1] if isinstance(each, syntax.Branch))
        return self._node(node, *below, limit=MAX_BRANCHES)

    def body(self, meta: Meta, args: list[Any]) -> tuple[Any, ...]:
        return tuple(each for each in args if not isinstance(each, Token))

    # items

    def parameter(self, meta: Meta, args: list[Any]) -> syntax.Parameter:
        default = args[1] if len(args) == 2 else None
        return syntax.Parameter(str(args[0]), default, self._span(meta))

    def params(self, meta: Meta, args: list[Any]) -> _Params:
        return _Params(args)

    def base(self, meta: Meta, args: list[Any]) -> _Base:
        return _Base(args[0])

    def _headed(self, made: type[H], meta: Meta, args: list[Any]) -> H:
        params = next((tuple(each) for each in args if isinstance(each, _Params)), ())
        base = next((each.expr for each in args if isinstance(each, _Base)), None)
        return made(str(args[0]), params, base, args[-1], span=self._span(meta))

    def block(self, meta: Meta, args: list[Any]) -> syntax.Block:
        return self._headed(syntax.Block, meta, args)

    def part(self, meta: Meta, args: list[Any]) -> syntax.Block:
        return replace(self._headed(syntax.Block, meta, args[1:]), kind=str(args[0]))

    def model(self, meta: Meta, args: list[Any]) -> syntax.Model:
        return self._headed(syntax.Model, meta, args)

    def search(self, meta: Meta, args: list[Any]) -> syntax.Search:
        return syntax.Search(args[0], span=self._span(meta))

    def definition(self, meta: Meta, args: list[Any]) -> syntax.Definition:
        params = next((tuple(each) for each in args if isinstance(each, _Params)), ())
        body = args[-1] if isinstance(args[-1], tuple) else (args[-1],)
        return syntax.Definition(str(args[0]), str(args[1]), params, body, span=self._span(meta))

    definition_body = definition

    def start(self, meta: Meta, args: list[Any]) -> syntax.File:
        items = tuple(each for each in args if not isinstance(each, Token))
        return syntax.File(items, span=self._piece.span(0, len(self._piece.text)))


class _Params(list[syntax.Parameter]):
    pass


class _Base:
    def __init__(self, expr: syntax.Expr) -> None:
        self.expr = expr


def _number(text: str, span: Span) -> int | float:
    digits = text.rstrip("KMGi")
    factor = _SUFFIX.get(text[len(digits) :], 1)
    plain = digits.replace("_", "")
    if len(plain) > 30:
        raise error("L104", "this number has too many digits", span, f"{len(plain)} characters")
    try:
        return int(plain) * factor
    except ValueError:
        value = float(plain) * factor
    if value in (float("inf"), float("-inf")):
        raise error("L104", "this number is too large", span)
    return int(value) if factor > 1 and value == int(value) else value


def check_size(source: Source, at: Span | None = None) -> None:
    """Refuse a text that is too large to be a description (L001)."""
    size = len(source.text)
    if size > MAX_BYTES:
        raise error(
            "L001",
            "this text is too large to be a description",
            at or Span(Source(source.name, ""), 0, 0),
            f"{size:,} characters, the limit is {MAX_BYTES:,}",
        )
