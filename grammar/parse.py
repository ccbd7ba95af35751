"""Text in, syntax tree out.

`parse` reads a whole `.loom` text, `parse_expression` one expression (a YAML scalar, say)
that stands at some offset of a larger text. Both raise `LoomError`, never anything else:
the size of a text and the depth of its nesting are bounded here, for every later stage.

    >>> parse("block a { heads = 8 }").items[0].name
    'a'
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from lark import Lark, Token, UnexpectedInput, v_args
from lark.exceptions import UnexpectedCharacters, VisitError
from lark.tree import Meta
from lark.visitors import Transformer_NonRecursive

from . import syntax
from .comments import attach
from .diagnostics import Diagnostic, LoomError, did_you_mean, error
from .source import NOWHERE, Source, Span

E = TypeVar("E", bound=syntax.Expr)
H = TypeVar("H", syntax.Block, syntax.Model)

MAX_BYTES = 1 << 18
MAX_DEPTH = 64
_MAX_REPORTED = 20
_END = "nothing follows"
_SUFFIX = {"K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def read(path: str | Path) -> Source:
    """Read a file as a source. Raises `LoomError` (L001) if it is missing, huge or not text."""
    path = Path(path)
    here = Span(Source(str(path), ""), 0, 0)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise error("L001", f"`{path}` is too large to be a description", here,
                        f"{size:,} bytes, the limit is {MAX_BYTES:,}")  # fmt: skip
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
    _bounded(source)
    found: list[Diagnostic] = []
    remaining = source.text
    while len(found) < _MAX_REPORTED:
        try:
            file = _build(source, remaining, 0, "start")
        except UnexpectedInput as problem:
            diagnostic = _explain(problem, source, 0, len(source.text))
            if diagnostic.label == _END and found:
                break
            found.append(diagnostic)
            if diagnostic.label == _END:
                break
            remaining, changed = _blank_statement(remaining, diagnostic.span.start)
            if not changed or len(source.text) > MAX_BYTES // 8:
                break
        else:
            if found:
                break
            assert isinstance(file, syntax.File)
            return attach(file)
    raise LoomError(found)


def parse_expression(text: str, source: Source | None = None, offset: int = 0) -> syntax.Expr:
    """Parse one expression or pipeline whose text begins at `offset` of `source`."""
    source = source or Source("<expression>", text)
    _bounded(Source(source.name, text), Span(source, offset, offset + 1))
    try:
        expr: syntax.Expr = _build(source, text, offset, "expression")
    except UnexpectedInput as problem:
        raise LoomError([_explain(problem, source, offset, len(text))]) from None
    return expr


def _build(source: Source, text: str, offset: int, start: str) -> Any:
    tree = _lark().parse(text, start=start)
    try:
        return _ToSyntax(source, offset).transform(tree)
    except VisitError as problem:
        raise problem.orig_exc from None


@cache
def _lark() -> Lark:
    grammar = files(__package__).joinpath("loom.lark").read_text(encoding="utf-8")
    return Lark(
        grammar,
        parser="lalr",
        start=["start", "expression"],
        postlex=_LineEnds(),
        propagate_positions=True,
        maybe_placeholders=False,
    )


class _LineEnds:
    """Drop the line ends that do not end a statement.

    They do not inside ( ) and [ ] and after an operator; the grammar itself passes over those
    that stand before a `|`, `or`, `and` or `where`.
    """

    always_accept = ("NEWLINE",)
    _unfinished = frozenset(
        "OR AND NOT COMPARE PLUS MINUS STAR SLASH SLASHES PERCENT AT POWER "
        "EQUAL VBAR COMMA COLON _BECOMES".split()
    )

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        depth = 0
        last = ""
        for token in stream:
            if token.type == "NEWLINE":
                if depth == 0 and last not in self._unfinished:
                    yield token
                continue
            if token.type in ("LPAR", "LSQB"):
                depth += 1
            elif token.type in ("RPAR", "RSQB"):
                depth = max(0, depth - 1)
            last = token.type
            yield token


@v_args(meta=True)
class _ToSyntax(Transformer_NonRecursive[Token, Any]):
    """One method a grammar rule; refuses trees that recursion could not walk later."""

    def __init__(self, source: Source, offset: int) -> None:
        super().__init__()
        self._source = source
        self._offset = offset
        self._depth: dict[int, int] = {}

    def _span(self, meta: Meta) -> Span:
        if meta.empty:
            return Span(self._source, self._offset, self._offset)
        return Span(self._source, self._offset + meta.start_pos, self._offset + meta.end_pos)

    def _at(self, token: Token) -> Span:
        assert token.start_pos is not None and token.end_pos is not None
        return Span(self._source, self._offset + token.start_pos, self._offset + token.end_pos)

    def _node(self, node: E, *below: Any) -> E:
        depth = 1 + max((self._depth.get(id(each), 0) for each in below), default=0)
        if depth > MAX_DEPTH:
            label = f"more than {MAX_DEPTH} levels"
            raise error("L103", "this is nested too deeply", node.span, label)
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
        node = replace(args[0], span=self._span(meta))
        return self._node(node, args[0])

    def unary(self, meta: Meta, args: list[Any]) -> syntax.Expr:
        return self._node(syntax.Unary(str(args[0]), args[1], self._span(meta)), args[1])

    def binary(self, meta: Meta, args: list[Any]) -> syntax.Expr:
        left, op, right = args
        return self._node(syntax.Binary(str(op), left, right, self._span(meta)), left, right)

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

    # statements

    def setting(self, meta: Meta, args: list[Any]) -> syntax.Setting:
        return syntax.Setting(str(args[0]), args[1], span=self._span(meta))

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
        return syntax.State(*self._declared(args), span=self._span(meta))

    def update(self, meta: Meta, args: list[Any]) -> syntax.Update:
        return syntax.Update(str(args[0]), args[1], span=self._span(meta))

    def result(self, meta: Meta, args: list[Any]) -> syntax.Result:
        where = args[1] if len(args) == 2 else None
        return syntax.Result(args[0], where, span=self._span(meta))

    def branch(self, meta: Meta, args: list[Any]) -> syntax.Branch:
        return syntax.Branch(str(args[0]), args[1], span=self._span(meta))

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

    def _headed(self, kind: type[H], meta: Meta, args: list[Any]) -> H:
        params = next((tuple(each) for each in args if isinstance(each, _Params)), ())
        base = next((each.expr for each in args if isinstance(each, _Base)), None)
        return kind(str(args[0]), params, base, args[-1], span=self._span(meta))

    def block(self, meta: Meta, args: list[Any]) -> syntax.Block:
        return self._headed(syntax.Block, meta, args)

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
        whole = Span(self._source, 0, len(self._source.text))
        return syntax.File(items, span=whole)


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


# ── what went wrong ──────────────────────────────────────────────────────────────────────


def _bounded(source: Source, at: Span = NOWHERE) -> None:
    size = len(source.text)
    if size > MAX_BYTES:
        span = at if at is not NOWHERE else Span(Source(source.name, ""), 0, 0)
        raise error("L001", "this text is too large to be a description", span,
                    f"{size:,} characters, the limit is {MAX_BYTES:,}")  # fmt: skip


_STARTS = {
    "block": "block NAME { … }", "model": "model NAME { … }", "search": "search { … }",
    "mask": "mask NAME = …", "score": "score NAME = …", "normalize": "normalize NAME = …",
    "mix": "mix NAME { … }", "stage": "stage NAME = | …", "let": "let NAME = …",
}  # fmt: skip


def _explain(problem: UnexpectedInput, source: Source, offset: int, size: int) -> Diagnostic:
    """Turn a lexer's or parser's complaint into a diagnostic in the user's terms."""
    if isinstance(problem, UnexpectedCharacters):
        at = offset + (problem.pos_in_stream or 0)
        char = problem.char
        span = Span(source, at, at + 1)
        if char == '"':
            return Diagnostic("L102", "this string does not end", span, "", "close it with `\"`")
        return Diagnostic("L102", f"{char!r} does not belong in a description", span)
    token: Token | None = getattr(problem, "token", None)
    expected: set[str] = set(getattr(problem, "expected", ()) or getattr(problem, "accepts", ()))
    if token is None or token.type == "$END":
        at = offset + max(0, len(source.text.rstrip()) - 1 if not offset else size - 1)
        return Diagnostic("L101", "the text ends too early", Span(source, at, at + 1),
                          _END, _wanted(expected))  # fmt: skip
    start = offset + (token.start_pos or 0)
    span = Span(source, start, start + max(1, len(token)))
    if token.type == "NEWLINE":
        return Diagnostic("L101", "the line ends too early", span, "", _wanted(expected))
    help = _wanted(expected)
    if "BLOCK" in expected:
        close = did_you_mean(str(token), _STARTS)
        help = close or "at the top level stand: " + ", ".join(f"`{e}`" for e in _STARTS.values())
    return Diagnostic("L101", f"`{token}` is not expected here", span, "", help)


def _wanted(expected: set[str]) -> str:
    for terminal, text in (
        ("RBRACE", "close the `{`"), ("RPAR", "close the `(`"), ("RSQB", "close the `[`"),
        ("NUMBER", "an expression belongs here"), ("EQUAL", "write `name = expression`"),
        ("LBRACE", "write `{ … }`"), ("NAME", "a name belongs here"),
    ):  # fmt: skip
        if terminal in expected:
            return text
    return ""


def _blank_statement(text: str, at: int) -> tuple[str, bool]:
    """Replace the statement around an offset by spaces, so that the rest can be read too."""
    at = min(at, max(0, len(text) - 1))
    start = max(text.rfind(mark, 0, at) for mark in "\n;{}") + 1
    ends = [end for mark in "\n;}" if (end := text.find(mark, at)) >= 0]
    end = min(ends, default=len(text))
    middle = text[start:end]
    if not middle.strip() or "{" in middle:
        return text, False
    return text[:start] + " " * (end - start) + text[end:], True
