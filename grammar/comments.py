"""Comments are part of a text: find them, and hang each one on the node it speaks about.

    # Layers with a window.          above the block
    block local {   # cheap          beside its header
      heads = 8     # as the paper   beside the setting
      # kv_heads = 2                 closing the block, nothing follows it there
    }

The rules: at the end of a line, a comment goes beside the node that ends there, and after an
opening brace beside the node it opens; inside an expression it moves above its statement;
on a line of its own it goes above the next node of the body it stands in, or closes it; empty
lines between such comments stay.
None is ever lost: where a place is taken, the comment goes to the next one.

`place` holds the rules for Loom and YAML alike; `attach` finds the comments of a Loom text.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TypeVar

from .source import Source
from .syntax import Block, Branch, Comments, Definition, File, Item, Model, Search, Statement

Node = Item | Statement
Bodied = Block | Model | Search | Definition | Branch
N = TypeVar("N", Item, Statement)

_TOKEN = re.compile(r'"[^"\n]*"|#[^\n]*|\{')


@dataclass(frozen=True, slots=True)
class Found:
    """A comment, `#` included, and the offset where it stands."""

    start: int
    text: str


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a node stands; `header` is where its body opens, None where it has none."""

    start: int
    end: int
    header: int | None = None


def attach(file: File) -> File:
    """Return the file with the comments of its Loom text on its nodes."""
    if file.span.source.text.find("#") < 0:
        return file
    found, braces = [], []
    for match in _TOKEN.finditer(file.span.source.text):
        if match[0][0] == "#":
            found.append(Found(match.start(), match[0]))
        elif match[0] == "{":
            braces.append(match.start())
    text = file.span.source.text

    def extent(node: Node) -> Extent:
        start, end = node.span.start, node.span.end
        # `mask causal = j <= i` has a body, but no braces that comments could stand in.
        opened = isinstance(node, Bodied) and text[end - 1] == "}"
        return Extent(start, end, braces[bisect_left(braces, start)] if opened else None)

    return place(file, found, extent)


def clean(comment: str) -> str:
    """Return a comment as both forms can write it: no line ends, no control characters."""
    if not comment.isprintable():
        comment = _unprintable().sub(" ", comment)
    return comment.rstrip()


@cache
def _unprintable() -> re.Pattern[str]:
    """Return what neither YAML nor a single line can hold.

    Control characters, halves of surrogate pairs and the line ends that only some programs take
    for such. It is compiled when it is first needed, as that takes longer than reading a file.
    """
    return re.compile("[^\t -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def place(file: File, found: Iterable[Found], extent: Callable[[Node], Extent]) -> File:
    """Hang comments on the nodes of a file; `extent` says where a node stands in its text."""
    whole = Extent(0, len(file.span.source.text), -1)
    root = _Place(whole, _places(file.items, extent))
    for comment in found:
        _put(root, comment, file.span.source)
    return replace(
        file,
        items=tuple(_rebuilt(*pair) for pair in zip(file.items, root.inner, strict=True)),
        closing=tuple(root.closing),
    )


@dataclass(slots=True)
class _Place:
    """Where the comments of one node are gathered, and those of the nodes in its body."""

    at: Extent
    inner: list[_Place]
    above: list[str] = field(default_factory=list)
    beside: str = ""
    closing: list[str] = field(default_factory=list)


def _places(body: Iterable[Node], extent: Callable[[Node], Extent]) -> list[_Place]:
    places = []
    for node in body:
        at = extent(node)
        below = node.body if isinstance(node, Bodied) and at.header is not None else ()
        places.append(_Place(at, _places(below, extent)))
    return places


def _put(owner: _Place, comment: Found, source: Source) -> None:
    """Put a comment that stands in the body of `owner` where it belongs."""
    text, line = clean(comment.text), source.position(comment.start)[0]
    while True:
        after = bisect_right(owner.inner, comment.start, key=lambda each: each.at.start)
        before = owner.inner[after - 1] if after else None
        if before is not None and comment.start < before.at.end:
            header = before.at.header
            if header is None or comment.start < header:
                before.above.append(text)
                return
            first = before.inner[0].at.start if before.inner else before.at.end
            if comment.start < first and source.position(header)[0] == line:
                _beside(before, text)
                return
            owner = before
            continue
        if before is not None and source.position(max(0, before.at.end - 1))[0] == line:
            _beside(before, text)
        elif after < len(owner.inner):
            _above(owner.inner[after], text, line, source)
        else:
            owner.closing.append(text)
        return


def _above(node: _Place, text: str, line: int, source: Source) -> None:
    """Add a comment line, and an empty one after it where the text has one or more."""
    node.above.append(text)
    last, _ = source.position(len(source.text))
    if line < last and not source.line(line + 1).strip():
        node.above.append("")


def _beside(node: _Place, text: str) -> None:
    if not node.beside:
        node.beside = text
    elif node.at.header is not None:
        node.closing.append(text)
    else:
        node.above.append(text)


def _rebuilt(node: N, place: _Place) -> N:
    comments = Comments(tuple(place.above), place.beside)
    if not isinstance(node, Bodied) or place.at.header is None:
        return replace(node, comments=comments)
    body = tuple(_rebuilt(*pair) for pair in zip(node.body, place.inner, strict=True))
    closing = tuple(place.closing)
    return replace(node, comments=comments, body=body, closing=closing)
