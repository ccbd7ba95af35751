"""Where text comes from, and where in it something stands.

Every syntax node carries a `Span`, so that any later stage can point at the words that
caused a problem. Spans never take part in comparisons: two trees are equal when they say
the same thing, wherever they were written.

    >>> source = Source("gqa.loom", "block a {\\n  heads = 8\\n}\\n")
    >>> Span(source, 12, 17).where
    'gqa.loom:2:3'
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Source:
    """A named text; offsets are characters from its start, lines and columns count from 1."""

    name: str
    text: str = field(repr=False)

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        starts.extend(at + 1 for at, char in enumerate(self.text) if char == "\n")
        return starts

    def position(self, offset: int) -> tuple[int, int]:
        """Return the line and column of a character offset."""
        line = bisect_right(self._starts, offset)
        return line, offset - self._starts[line - 1] + 1

    def line(self, number: int) -> str:
        """Return the text of a line, without its end."""
        start = self._starts[number - 1]
        end = self._starts[number] if number < len(self._starts) else len(self.text) + 1
        return self.text[start : end - 1].rstrip("\r")


@dataclass(frozen=True, slots=True)
class Span:
    """The half-open range of characters [start, end) of a source."""

    source: Source
    start: int
    end: int

    @property
    def where(self) -> str:
        line, column = self.source.position(self.start)
        return f"{self.source.name}:{line}:{column}"

    def to(self, other: Span) -> Span:
        """Return the range from the start of this span to the end of another."""
        return Span(self.source, self.start, other.end)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a source that is read on its own: all of it, or one scalar of a YAML file.

    `exact` says that `text` stands there letter by letter; where it does not (a YAML string
    with escapes), everything in it is said to stand at [start, end).
    """

    source: Source
    start: int
    end: int
    text: str
    exact: bool = True

    def span(self, start: int, end: int) -> Span:
        """Return where the characters [start, end) of the text stand in the source."""
        if self.exact:
            return Span(self.source, self.start + start, self.start + end)
        return Span(self.source, self.start, self.end)


NOWHERE = Span(Source("<built>", ""), 0, 0)
