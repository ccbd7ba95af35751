"""Errors are data: a code, a message, the smallest span, the values that matter, and a fix.

Stages collect `Diagnostic`s and raise them together as one `LoomError`; rendering happens
here and nowhere else.

    error[L204]: `kv_heads` must divide `heads`
      --> gqa.loom:4:15
       |
     4 |   kv_heads  = 3
       |               ^ heads = 8, kv_heads = 3, remainder 2
       = help: use 1, 2, 4 or 8

`codes.CODES` holds one entry per code, each with an example that triggers it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .source import Span


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding; `label` stands under the marked text, `help` says what to do."""

    code: str
    message: str
    span: Span
    label: str = ""
    help: str = ""
    severity: str = "error"

    def render(self) -> str:
        """Return the finding as text, with the line it is about."""
        line, column = self.span.source.position(self.span.start)
        head = f"{self.severity}[{self.code}]: {self.message}"
        if not self.span.source.text:
            note = [f"   = note: {self.label}"] if self.label else []
            return "\n".join([head, *note, *self._help("  ")])
        text = self.span.source.line(line)
        shown, column = _window(text, column)
        width = max(1, min(self.span.end - self.span.start, len(shown) - column + 1))
        pad = " " * (len(str(line)) + 1)
        return "\n".join(
            [
                head,
                f"{pad}--> {self.span.where}",
                f"{pad} |",
                f" {line} | {shown}",
                f"{pad} | {' ' * (column - 1)}{'^' * width} {self.label}".rstrip(),
                *self._help(pad),
            ]
        )

    def _help(self, pad: str) -> list[str]:
        return [f"{pad} = help: {self.help}"] if self.help else []

    def to_json(self) -> dict[str, Any]:
        """Return the finding as plain data."""
        line, column = self.span.source.position(self.span.start)
        return {
            "code": self.code,
            "severity": self.severity,
            "message": self.message,
            "file": self.span.source.name,
            "line": line,
            "column": column,
            "start": self.span.start,
            "end": self.span.end,
            "label": self.label,
            "help": self.help,
        }


def _window(text: str, column: int, room: int = 100) -> tuple[str, int]:
    """Cut a very long line down to the part around a column; tabs become single spaces."""
    start = max(0, min(column - 1 - room // 2, len(text) - room))
    shown = text[start : start + room]
    return "".join(char if char.isprintable() else " " for char in shown), column - start


class LoomError(Exception):
    """What is wrong with a text, all of it: `diagnostics` holds at least one error."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n\n".join(each.render() for each in self.diagnostics))

    def __reduce__(self) -> tuple[Any, ...]:
        return (LoomError, (self.diagnostics,))


def error(code: str, message: str, span: Span, label: str = "", help: str = "") -> LoomError:
    """Return an exception that holds one diagnostic."""
    return LoomError([Diagnostic(code, message, span, label, help)])


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return a help line that names the closest known names, or `otherwise`."""
    from difflib import get_close_matches  # where nothing is wrong nobody asks

    close = get_close_matches(name, sorted(set(known)), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(f'`{each}`' for each in close)}?" if close else otherwise
