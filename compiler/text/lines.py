"""Lines that are too long, broken as a formatter would: inside brackets, before operators.

o = (k_t[..., None, :] @ S).squeeze(-2) / (k_t * z).sum(-1)[..., None]

o = (
    (k_t[..., None, :] @ S).squeeze(-2)
    / (k_t * z).sum(-1)[..., None]
)
"""

from __future__ import annotations

import re

WIDTH = 100
_OPERATORS = (  # the loosest first
    ("==", "!=", "<=", ">=", "<", ">"), ("|",), ("&",), ("+", "-"), ("*", "/", "//", "%", "@"),
)  # fmt: skip
_HEAD = re.compile(r"(\s*)((?:return |[\w., ]+ = )?)(.*)", re.DOTALL)


def wrap(lines: list[str]) -> list[str]:
    """Return the lines of a program, statements that are too long broken over several."""
    return [each for line in lines for each in _wrapped(line)]


def _wrapped(line: str) -> list[str]:
    code, mark, note = line.partition("  # ")
    found = _HEAD.fullmatch(code)
    if len(line) <= WIDTH or '"' in line or found is None:
        return [line]
    pad, head, text = found.groups()
    above = [f"{pad}# {note}"] if mark else []
    return [*above, *_broken(pad, head, text, "")]


def _broken(pad: str, head: str, text: str, tail: str) -> list[str]:
    line = f"{pad}{head}{text}{tail}"
    if len(line) <= WIDTH:
        return [line]
    inner = pad + "    "
    if (parts := _by_operator(text)) is not None:
        body = [each for op, part in parts for each in _broken(inner, op, part, "")]
        return [f"{pad}{head}(", *body, f"{pad}){tail}"]
    group = _longest_group(text)
    if group is None:
        return [line]
    start, end = group
    first, inside, rest = text[: start + 1], text[start + 1 : end], text[end:] + tail
    arguments = _split(inside, (",",))
    if len(arguments) > 1:
        joined = inner + inside
        listed = [each for _, part in arguments for each in _broken(inner, "", part.strip(), ",")]
        body = [joined] if len(joined) <= WIDTH else listed
    else:
        body = _flat(inner, inside)
    return [f"{pad}{head}{first}", *body, f"{pad}{rest}"]


def _flat(pad: str, text: str) -> list[str]:
    """Break a text that stands in brackets already."""
    parts = _by_operator(text) if len(pad + text) > WIDTH else None
    if parts is None:
        return _broken(pad, "", text, "")
    return [each for op, part in parts for each in _broken(pad, op, part, "")]


def _by_operator(text: str) -> list[tuple[str, str]] | None:
    """Split before the loosest operators outside of brackets; None where there are none."""
    for row in _OPERATORS:
        parts = _split(text, tuple(f" {op} " for op in row))
        if len(parts) > 1:
            return [(f"{op.strip()} " if op else "", part) for op, part in parts]
    return None


def _split(text: str, marks: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return the parts between marks outside of brackets, each with the mark before it."""
    parts, depth, start, before, at = [], 0, 0, "", 0
    while at < len(text):
        depth += (text[at] in "([{") - (text[at] in ")]}")
        mark = next((each for each in marks if text.startswith(each, at)), None)
        if depth == 0 and mark is not None:
            parts.append((before, text[start:at]))
            at += len(mark)
            start, before = at, mark
            continue
        at += 1
    return [*parts, (before, text[start:])]


def _longest_group(text: str) -> tuple[int, int] | None:
    """Return where the longest bracket outside of others opens and closes."""
    groups, depth, start = [], 0, 0
    for at, char in enumerate(text):
        if char in "([{":
            start = at if depth == 0 else start
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth == 0:
                groups.append((start, at))
    return max(groups, key=lambda each: each[1] - each[0], default=None)
