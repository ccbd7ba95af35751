"""YAML in, the same syntax tree out.

The keys of the file are the kinds of the language, the keys below them the heads of Loom
(`window(w)`, `local(w = 64)`), a value is an expression as Loom writes it, and a YAML list
is a list of the language:

    masks:
      near(w): abs(i - j) < w           # mask near(w) = abs(i - j) < w
    blocks:
      local:
        heads: 8
        let: {g: x | linear | sigmoid}
      global:                           # block global : local { … }
        base: local
    mixers:
      sum:                              # statements, each in the words of Loom
        - state S[head_dim, value_dim] = 0
        - S <- S + outer(k, v)
        - o <- q @ S

Top-level keys: `let`, `masks`, `similarities`, `scores`, `normalizers`, `weights`, `mixers`,
`stages`, `ffns`, `layers`, `blocks`, `models` and `search`. In a body `let`, `param`, `const` and
`state` group what is declared (`param: {"z[heads]": 0}`), `branches` holds sub-blocks, `base`
names what a block, layer or model inherits from, `value` is the result of a definition
(`value: s - z where …`), and every other key is a setting. A mapping is read from top to bottom;
where a key would have to come twice, the file or body is a list of mappings, read in order. An
element of a body's list may also be one statement in the words of Loom, which is how a setting
that is called like one of these keys is said. `format.format_yaml` writes exactly this.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import TypeVar

from . import syntax
from .comments import Extent, Found, place
from .comments import Node as SyntaxNode
from .diagnostics import Diagnostic, LoomError, did_you_mean
from .keys import GROUPS, HEADED, KINDS, meant
from .parse import MAX_DEPTH, MAX_REPORTED, Part, check_size, parse_piece
from .source import Source, Span
from .yaml_tree import Mapping, Node, Scalar, Sequence, load

T = TypeVar("T")
M = TypeVar("M", bound=SyntaxNode)
Entry = tuple[Scalar, Node]

_NAME = re.compile(r"(?!(?:or|and|not|branch)\Z)[A-Za-z_][A-Za-z0-9_]*\Z")
_NOTHING = syntax.Name("")


def parse_yaml(text: str | Source, name: str = "<text>") -> syntax.File:
    """Parse a description in YAML. Raises `LoomError` with every error that was found."""
    source = text if isinstance(text, Source) else Source(name, text)
    check_size(source)
    document = load(source)
    reader = _Reader(source, document.comments, list(document.problems))
    items = reader.items(document.root)
    if reader.problems:
        raise reader.failure()
    file = syntax.File(items, span=Span(source, 0, len(source.text)))
    return place(file, document.comments, lambda node: reader.extents[id(node)])


class _Reader:
    """Turn the nodes of YAML into those of the syntax; problems are gathered on the way."""

    def __init__(
        self, source: Source, comments: tuple[Found, ...], problems: list[Diagnostic]
    ) -> None:
        self.problems = problems
        self.extents: dict[int, Extent] = {}  # of the nodes made so far, by their identity
        self._source = source
        self._comments = comments

    def failure(self) -> LoomError:
        return LoomError(sorted(self.problems, key=lambda each: each.span.start)[:MAX_REPORTED])

    # the file

    def items(self, root: Node | None) -> tuple[syntax.Item, ...]:
        if root is None or (isinstance(root, Scalar) and not root.text):
            return ()
        items: list[syntax.Item] = []
        for entry in self._entries(root, "a description"):
            if isinstance(entry, Scalar):
                self._wrong(
                    entry,
                    "this is not a mapping",
                    _as_mapping(entry, "write `blocks:`, `models:` …"),
                )
                continue
            key, value = entry
            if key.text == "search":
                body, closing = self._body(value, "search"), self._opened(key, value)
                items.append(self._made(syntax.Search(body, span=_over(*entry)), closing))
            elif key.text not in GROUPS:
                help = did_you_mean(key.text, GROUPS, f"the keys are {', '.join(GROUPS)}")
                self._unknown(key, help)
            else:
                items += [self._item(key.text, *each) for each in self._members(key, value)]
        return tuple(items)

    def _item(self, group: str, key: Scalar, value: Node) -> syntax.Item:
        span = _over(key, value)
        if group == "let":
            return self._let(key, value)
        head: tuple[str, tuple[syntax.Parameter, ...]] = self._parse(key, "head", ("", ()))
        if group in KINDS:
            if isinstance(value, Scalar):
                result = self._result(value)
                body: tuple[syntax.Statement, ...] = (result,)
                extent = Extent(span.start, span.end)
            else:
                body, extent = self._body(value, "definition"), self._opened(key, value)
            definition = syntax.Definition(KINDS[group], *head, body, span=span)
            return self._made(definition, extent)
        base, kind = self._base(value), HEADED.get(group, "model")
        body = self._body(value, kind)
        if kind == "model":
            return self._made(syntax.Model(*head, base, body, span=span), self._opened(key, value))
        block = syntax.Block(*head, base, body, kind, span=span)
        return self._made(block, self._opened(key, value))

    def _base(self, body: Node) -> syntax.Expr | None:
        bases = [each for each in self._entries(body, "") if _key(each) == "base"]
        for key, _ in (each for each in bases[1:] if isinstance(each, tuple)):
            self._add("L113", "the key `base` comes twice", key)
        return self._expression(bases[0][1]) if bases and isinstance(bases[0], tuple) else None

    # bodies

    def _body(self, node: Node, owner: str) -> tuple[syntax.Statement, ...]:
        found: list[syntax.Statement] = []
        for entry in self._entries(node, "a body"):
            found += self._statements(entry, owner)
        return tuple(found)

    def _statements(self, entry: Scalar | Entry, owner: str) -> Iterator[syntax.Statement]:
        if isinstance(entry, Scalar):
            blank = syntax.Result(_NOTHING)
            statement: syntax.Statement = self._parse(entry, "statement", blank)
            yield self._made(statement, Extent(entry.start, entry.end))
            return
        key, value = entry
        name = key.text if key.text in meant(owner) else ""
        match name:
            case "let":
                yield from (self._let(*each) for each in self._members(key, value))
            case "param" | "const" | "state":
                for each in self._members(key, value):
                    yield self._declared(name, *each)
            case "branches":
                for each in self._members(key, value):
                    yield self._branch(*each)
            case "value":
                span = _over(key, value)
                yield self._made(self._result(value), Extent(span.start, span.end))
            case "base":
                return  # read by `_base`
            case "where":
                self._unknown(key, "write `value: … where …`")
            case _:
                yield self._setting(key, value)

    def _let(self, key: Scalar, value: Node) -> syntax.Let:
        span = _over(key, value)
        name, dims = self._declaration(key)
        if dims:
            self._wrong(key, f"`{name}` of `let` has no dimensions", "use `param` or `const`")
        let = syntax.Let(name, self._expression(value), span=span)
        return self._made(let, Extent(span.start, span.end))

    def _declared(self, group: str, key: Scalar, value: Node) -> syntax.Statement:
        span = _over(key, value)
        name, dims = self._declaration(key)
        node: syntax.Statement
        if group == "state":
            node = syntax.State(name, dims, *self._initial(value), span=span)
        else:
            learned = group == "param"
            node = syntax.Param(name, dims, self._expression(value), learned, span=span)
        return self._made(node, Extent(span.start, span.end))

    def _initial(self, value: Node) -> tuple[syntax.Expr, syntax.Expr | None]:
        if not isinstance(value, Scalar):
            return self._expression(value), None
        found: tuple[syntax.Expr, syntax.Expr | None]
        found = self._parse(value, "initial", (_NOTHING, None))
        return found

    def _declaration(self, key: Scalar) -> tuple[str, tuple[syntax.Expr, ...]]:
        declared: tuple[str, tuple[syntax.Expr, ...]] = self._parse(key, "declared", ("", ()))
        return declared

    def _branch(self, key: Scalar, value: Node) -> syntax.Branch:
        name, dims = self._declaration(key)
        if dims:
            self._wrong(key, f"`{name}` of `branches` has no dimensions", "write its name alone")
        branch = syntax.Branch(name, self._body(value, "branch"), span=_over(key, value))
        return self._made(branch, self._opened(key, value))

    def _setting(self, key: Scalar, value: Node) -> syntax.Setting:
        if not _NAME.match(key.text):
            self._unknown(key, did_you_mean(key.text, ("branches",), "a name belongs here"))
        span, result = _over(key, value), self._result(value)
        setting = syntax.Setting(key.text, result.value, result.where, span=span)
        return self._made(setting, Extent(span.start, span.end))

    def _result(self, value: Node) -> syntax.Result:
        if not isinstance(value, Scalar):
            return syntax.Result(self._expression(value))
        result: syntax.Result = self._parse(value, "result", syntax.Result(_NOTHING))
        return result

    # values

    def _expression(self, node: Node) -> syntax.Expr:
        expr = self._listed(node)
        if not isinstance(node, Scalar) and syntax.depth(expr) > MAX_DEPTH:
            self._add("L103", "this is nested too deeply", node, f"more than {MAX_DEPTH} levels")
        return expr

    def _listed(self, node: Node) -> syntax.Expr:
        match node:
            case Scalar():
                expr: syntax.Expr = self._parse(node, "expression", _NOTHING)
                return expr
            case Sequence(items):
                listed = tuple(self._listed(each) for each in items)
                return syntax.ListOf(listed, Span(self._source, node.start, node.end))
            case Mapping():
                help = "write an expression, in quotes if it begins with `{`"
                self._wrong(node, "a value cannot be a mapping", help)
                return _NOTHING

    def _parse(self, scalar: Scalar, part: Part, otherwise: T) -> T:
        if not scalar.text:
            self._wrong(scalar, "this has no value", "write one, or leave the key away")
            return otherwise
        try:
            parsed: T = parse_piece(scalar.piece, part)
        except LoomError as problem:
            self._found(*problem.diagnostics)
            return otherwise
        return parsed

    # shapes

    def _entries(self, node: Node, what: str) -> Iterator[Scalar | Entry]:
        """Yield the entries of a mapping, or of the mappings and strings of a list, in order."""
        if isinstance(node, Mapping):
            yield from node.entries
        elif isinstance(node, Sequence):
            for item in node.items:
                if isinstance(item, Scalar):
                    yield item
                elif isinstance(item, Mapping):
                    yield from item.entries
                elif what:
                    self._wrong(item, "a list of lists cannot be read here", "write mappings")
        elif what:
            help = _as_mapping(node, "write a mapping, `{}` where there is nothing to say")
            self._wrong(node, f"{what} must be a mapping or a list", help)

    def _members(self, key: Scalar, value: Node) -> tuple[Entry, ...]:
        if isinstance(value, Mapping):
            return value.entries
        help = f"write `{key.text}: {{name: …}}`"
        self._wrong(value, f"`{key.text}` must be a mapping", help)
        return ()

    def _made(self, node: M, extent: Extent) -> M:
        self.extents[id(node)] = extent
        return node

    def _opened(self, key: Scalar, value: Node) -> Extent:
        """Return where a body stands, with the comment lines below that are indented as it is."""
        at, end = value.end, value.end
        last_line = self._source.position(max(0, at - 1))[0]
        first = bisect_left(self._comments, at, key=lambda each: each.start)
        for comment in self._comments[first:]:
            line, column = self._source.position(comment.start)
            between = self._source.text[at : comment.start]
            if (between and not between.isspace()) or (
                line != last_line and column - 1 <= key.column
            ):
                break
            at = comment.start + len(comment.text)
            if line != last_line or (not isinstance(value, Scalar) and not value.flow):
                end = at
        return Extent(key.start, end, key.end)

    # problems

    def _wrong(self, node: Node, message: str, help: str) -> None:
        self._add("L114", message, node, help=help)

    def _unknown(self, key: Scalar, help: str) -> None:
        self._add("L115", f"`{key.text}` has no meaning here", key, help=help)

    def _add(self, code: str, message: str, node: Node, label: str = "", help: str = "") -> None:
        span = Span(self._source, node.start, max(node.end, node.start + 1))
        self._found(Diagnostic(code, message, span, label, help))

    def _found(self, *diagnostics: Diagnostic) -> None:
        self.problems += diagnostics
        if len(self.problems) >= MAX_REPORTED:
            raise self.failure()


def _as_mapping(node: Node, otherwise: str) -> str:
    """Return what to write where Loom stands in place of a mapping."""
    text = node.text if isinstance(node, Scalar) else ""
    if re.match(r"(block|layer|ffn|model|search|let|mask)\b[^:=]*[{=]", text):
        return "this is Loom: let the file's name end in `.loom`"
    if (setting := re.match(r"(\w+) *=(?!=) *(\S.*)", text)) and "=" not in setting[2]:
        return f"YAML writes `{setting[1]}: {setting[2]}`"
    return otherwise


def _key(entry: Scalar | Entry) -> str:
    return "" if isinstance(entry, Scalar) else entry[0].text


def _over(key: Scalar, value: Node) -> Span:
    return Span(key.piece.source, key.start, max(key.end, value.end))
