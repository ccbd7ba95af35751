"""YAML text as a plain tree that remembers where everything stands, comments included.

PyYAML's events carry positions but no comments: those are what stands behind a `#` between
its scalars. What a description has no use for is refused at the first event of its kind
(anchors, aliases, tags, several documents), so no alias ever multiplies.

    heads: 8   # as the paper      Mapping([(Scalar("heads"), Scalar("8"))]), [Found(11, "# as …")]
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from .comments import Found
from .diagnostics import Diagnostic, LoomError, error
from .parse import MAX_DEPTH, MAX_REPORTED
from .source import Piece, Source, Span

_COMMENT = re.compile(r"#[^\n\r\x85\u2028\u2029]*")
_LOOM_COMMENT = re.compile(r'"[^"\n]*"|#[^\n]*')
_LINE_ENDS = re.compile(r"[\n\r\x85\u2028\u2029]")


@dataclass(frozen=True, slots=True)
class Scalar:
    """A key or a value, at [start, end) with its quotes; `column` counts from 0."""

    piece: Piece
    start: int
    end: int
    column: int

    @property
    def text(self) -> str:
        return self.piece.text


@dataclass(frozen=True, slots=True)
class Sequence:
    items: tuple[Node, ...]
    start: int
    end: int
    flow: bool


@dataclass(frozen=True, slots=True)
class Mapping:
    entries: tuple[tuple[Scalar, Node], ...]
    start: int
    end: int
    flow: bool


Node = Scalar | Sequence | Mapping


@dataclass(frozen=True, slots=True)
class Document:
    """The root (None in an empty text), the comments, and the keys that came twice."""

    root: Node | None
    comments: tuple[Found, ...]
    problems: tuple[Diagnostic, ...]


def load(source: Source) -> Document:
    """Read a YAML text as a tree. Raises `LoomError` (L103, L111, L112) where it cannot."""
    builder = _Builder(source)
    for event in _events(source):
        builder.take(event)
    comments = sorted(_comments(source, builder.scalars), key=lambda each: each.start)
    return Document(builder.root, tuple(comments), tuple(builder.problems))


def _events(source: Source) -> Iterator[yaml.Event]:
    try:
        yield from yaml.parse(source.text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        at = min(mark.index if mark else 0, max(0, len(source.text) - 1))
        what = problem.problem or problem.context or "this is not yaml"
        quotable = what.startswith(("mapping values", "expected ','", "found character"))
        help = "put the expression in quotes" if quotable else ""
        help = "indent with spaces" if "'\\t'" in what else help
        raise error("L111", f"yaml: {what}", Span(source, at, at + 1), "", help) from None
    except yaml.reader.ReaderError as problem:
        at = problem.position
        what = f"{source.text[at]!r} does not belong in a yaml text"
        raise error("L111", what, Span(source, at, at + 1)) from None
    except (ValueError, OverflowError):  # PyYAML hands what an escape says to `chr`
        raise error("L111", "yaml: an escape names no character", Span(source, 0, 1)) from None


class _Builder:
    """Stack up the events; one open collection a level."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.root: Node | None = None
        self.scalars: list[tuple[Scalar, str | None]] = []
        self.problems: list[Diagnostic] = []
        self._open: list[tuple[yaml.CollectionStartEvent, list[Node]]] = []
        self._documents = 0

    def take(self, event: yaml.Event) -> None:
        if getattr(event, "anchor", None) is not None:
            self._refuse(event, "yaml anchors and aliases", "write the value again")
        if getattr(event, "tag", None) is not None:
            self._refuse(event, "yaml tags", "leave the tag away")
        match event:
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    self._refuse(event, "several yaml documents", "use a file for each")
            case yaml.ScalarEvent():
                self._add(self._scalar(event))
            case yaml.CollectionStartEvent():
                if len(self._open) >= MAX_DEPTH:
                    span = self._span(event)
                    label = f"more than {MAX_DEPTH} levels"
                    raise error("L103", "this is nested too deeply", span, label)
                self._open.append((event, []))
            case yaml.CollectionEndEvent():
                self._add(self._collection(event))

    def _scalar(self, event: yaml.ScalarEvent) -> Scalar:
        start, end = event.start_mark.index, event.end_mark.index
        inset = 0 if event.style is None else 1
        exact = self.source.text[start + inset : end - inset] == event.value
        if exact:
            piece = Piece(self.source, start + inset, end - inset, event.value)
        else:
            piece = Piece(self.source, start, end, event.value.strip(), exact=False)
        scalar = Scalar(piece, start, end, event.start_mark.column)
        self.scalars.append((scalar, event.style))
        return scalar

    def _collection(self, event: yaml.CollectionEndEvent) -> Node:
        opened, nodes = self._open.pop()
        start = opened.start_mark.index
        # The end of a block collection is only noticed at the next token, lines below.
        end = event.end_mark.index if opened.flow_style else nodes[-1].end if nodes else start
        if isinstance(event, yaml.SequenceEndEvent):
            return Sequence(tuple(nodes), start, end, bool(opened.flow_style))
        keys = [each for each in nodes[::2] if isinstance(each, Scalar)]
        self._find_twice(keys)
        entries = tuple(zip(keys, nodes[1::2], strict=True))
        return Mapping(entries, start, end, bool(opened.flow_style))

    def _add(self, node: Node) -> None:
        if not self._open:
            self.root = node
            return
        opened, nodes = self._open[-1]
        is_key = isinstance(opened, yaml.MappingStartEvent) and len(nodes) % 2 == 0
        if is_key and not isinstance(node, Scalar):
            span = Span(self.source, node.start, max(node.end, node.start + 1))
            raise error("L112", "a key must be a name", span, "", "put the key in quotes")
        nodes.append(node)

    def _find_twice(self, keys: list[Scalar]) -> None:
        seen: dict[str, Scalar] = {}
        for key in keys:
            if (first := seen.get(key.text)) and len(self.problems) < MAX_REPORTED:
                line, _ = self.source.position(first.start)
                help = "to write statements in any order, use a list of mappings"
                span = Span(self.source, key.start, key.end)
                message, label = f"the key `{key.text}` comes twice", f"first in line {line}"
                self.problems.append(Diagnostic("L113", message, span, label, help))
            seen.setdefault(key.text, key)

    def _span(self, event: yaml.Event) -> Span:
        start, end = event.start_mark.index, event.end_mark.index
        return Span(self.source, start, max(end, start + 1))

    def _refuse(self, event: yaml.Event, what: str, help: str) -> None:
        message = f"{what} are not allowed in a description"
        raise LoomError([Diagnostic("L112", message, self._span(event), "", help)])


def _comments(source: Source, scalars: list[tuple[Scalar, str | None]]) -> Iterator[Found]:
    """Find what YAML calls a comment, and what Loom calls one inside a scalar."""
    at = 0
    for scalar, style in scalars:
        yield from _between(source.text, at, scalar.start)
        if style in ("|", ">"):  # its first line may end in a comment
            line_end = _LINE_ENDS.search(source.text, scalar.start)
            end = line_end.start() if line_end else scalar.end
            yield from _between(source.text, scalar.start, end)
        for match in _LOOM_COMMENT.finditer(scalar.text):
            if match[0][0] == "#":
                yield Found(scalar.start, match[0])
        at = scalar.end
    yield from _between(source.text, at, len(source.text))


def _between(text: str, start: int, end: int) -> Iterator[Found]:
    for match in _COMMENT.finditer(text, start, end):
        yield Found(match.start(), match[0])
