"""The tree as text again: canonical Loom, canonical YAML, and single expressions.

    block local {               one setting a line, `=` aligned among neighbours
      heads = 8
      mask  = causal and window(256)
    }

What is read back is the same tree with the same comments, and formatting it once more
changes nothing. Where a form cannot say something directly, it is said another way that
reads the same: `(state + 1)` for a result that begins like a declaration, a list of
mappings where YAML would need a key twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from . import syntax
from .comments import Bodied, Node
from .keys import HEADED, KINDS, meant
from .show import POSTFIX, declared, head, initial, one_result, result, show, statement, within
from .syntax import Branch, Definition, File, Let, Param, Result, Search, Setting, State

__all__ = ["format_loom", "format_yaml", "show"]

WIDTH = 100
_UNEVEN = 12  # names whose lengths differ by this much are not aligned

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
    lines = [(margin + comment).rstrip() for comment in node.comments.above]
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
            kind = node.kind if isinstance(node, syntax.Block) else "model"
            base = "" if node.base is None else f" : {within(node.base, POSTFIX)}"
            return f"{kind} {head(node.name, node.params)}{base}"


# ── long lines ───────────────────────────────────────────────────────────────────────────

_MARK = re.compile(
    r'"[^"]*"|[(\[]|[)\]]|,[ ]|[ ](?=(?:or|and)[ ])|[ ](?=\|[ ])'
    r"|[ ](?:=|<-)[ ]|[ ](?:[-+*/%@]|//)[ ]"
)
_LOOSE = {",": 1, "|": 2, "o": 3, "a": 4, "+": 5, "-": 5}  # the others bind more tightly
_TIGHT, _DEEPER = 6, 10
_LONG, _LONG_HEAD = 24, 32  # a line that ends before is short; and one that ends with `=`
_INDEX, _SHORT = 500, 1000  # better not: the indices of `t[i, h]` apart, `k =` alone on a line


def broken(text: str, indent: int) -> list[str]:
    """Break a line that is too long: before its stages, then where it is held most loosely."""
    if indent + len(text) <= WIDTH:
        return [" " * indent + text]
    stages = [at for at, mark, rank in _marks(text) if mark == "|" and rank < _DEEPER]
    cuts = [0, *stages, len(text)]
    parts = [text[a:b].strip() for a, b in pairwise(cuts)]
    lines = _filled(parts[0], indent)
    for part in parts[1:]:
        lines += _filled(part, indent + 2)
    return lines


def _marks(text: str) -> Iterable[tuple[int, str, int]]:
    """Yield where a line may go on below: the offset, what stands there, and its rank.

    The rank says how tightly the two sides are held together: by the open brackets first, then
    by the operator.
    """
    open_: list[str] = []
    for match in _MARK.finditer(text):
        word = match[0]
        if word in ("(", "["):
            index = word == "[" and match.start() > 0 and text[match.start() - 1] not in " (["
            open_.append("index" if index else word)
        elif word in (")", "]"):
            open_.pop()
        elif word[0] in ", ":
            mark = word.strip()[:1] or text[match.end()]
            rank = len(open_) * _DEEPER + _LOOSE.get(mark, _TIGHT)
            if mark in "=<":
                if open_:
                    continue
                rank = 0 if match.start() >= _LONG_HEAD else _SHORT
            yield match.end(), mark, rank + _INDEX * ("index" in open_)


def _filled(text: str, indent: int) -> list[str]:
    """Fill lines up to the width, each ending where the text is held together most loosely."""
    marks = [(at, rank) for at, _, rank in _marks(text)]
    lines: list[str] = []
    start, margin = 0, indent
    while margin + len(text) - start > WIDTH:
        rest = [(at, rank) for at, rank in marks if at > start]
        fits = [
            (at, rank + _SHORT * (at - start < _LONG))
            for at, rank in rest
            if margin + len(text[start:at].rstrip()) <= WIDTH
        ]
        if not rest:
            break
        least = min((rank for _, rank in fits), default=0)
        end = max((at for at, rank in fits if rank == least), default=rest[0][0])
        lines.append(" " * margin + text[start:end].rstrip())
        start, margin = end, indent + 4
    return [*lines, " " * margin + text[start:]]


# ── YAML ─────────────────────────────────────────────────────────────────────────────────

_GROUPS = {kind: group for group, kind in KINDS.items()}
_HEADED = {kind: group for group, kind in HEADED.items()}
_UNPLAIN = re.compile(
    r"[\s,\[\]{}#&*!|>'\"%@`]|[-?:](?!\S)"  # what a plain scalar cannot begin with
)
_UNPLAIN_INSIDE = re.compile(r": |:\Z| #|[^ -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd]")
_KEY_LIMIT = 1000  # YAML finds no longer keys without `?`


def format_yaml(file: File) -> str:
    """Return the file as YAML text, in the form that `from_yaml` reads."""
    lines = _mapping([_entry(item, "file") for item in file.items], airy=True)
    if file.closing and lines:
        lines.append("")
    lines += file.closing
    return "".join(f"{line}\n" for line in lines)


@dataclass(frozen=True, slots=True)
class _Entry:
    """The lines of one node: below its group's key, below its own, or (no key) a list's element."""

    group: str
    key: str
    lines: tuple[str, ...]
    above: tuple[str, ...] = ()


def _entry(node: Node, owner: str) -> _Entry:
    above, beside = node.comments.above, _beside(node)
    if isinstance(node, Bodied):
        return _bodied_entry(node)
    match node:
        case Let(name, value):
            group, key, text = "let", name, _value(value)
        case Param(name, dims, value, learned):
            group, key = "param" if learned else "const", declared(name, dims)
            text = _value(value)
        case State(name, dims, value, weights):
            group, key = "state", declared(name, dims)
            text = _value(value) if weights is None else _scalar(initial(node))
        case Setting(name, value, where) if name not in meant(owner):
            group, key = "", name
            text = _value(value) if where is None else _scalar(result(node))
        case Result() if owner == "definition":
            group, key, text = "", "value", _scalar(result(node))
        case _:
            owner = "mix"
    if owner == "mix":
        return _Entry("", "", (_scalar(statement(node)) + beside,), above)
    return _Entry(group, key, _pair(key, [text + beside]), above)


def _bodied_entry(node: Bodied) -> _Entry:
    above, beside = node.comments.above, _beside(node)
    match node:
        case Search():
            group, key, owner = "", "search", "search"
        case Branch(name):
            group, key, owner = "branches", name, "branch"
        case Definition(kind, name, params):
            group, key = _GROUPS[kind], head(name, params)
            owner = "mix" if kind == "mix" else "definition"
            if (only := one_result(node)) is not None:
                return _Entry(group, key, _pair(key, [_scalar(result(only)) + beside]), above)
        case syntax.Block(name, params):
            group, key, owner = _HEADED[node.kind], head(name, params), node.kind
        case syntax.Model(name, params):
            group, key, owner = "models", head(name, params), "model"
    entries = [_entry(each, owner) for each in node.body]
    if isinstance(node, syntax.Block | syntax.Model) and node.base is not None:
        entries.insert(0, _Entry("", "base", _pair("base", [_value(node.base)])))
    body = _mapping(entries)
    opening = beside if body else "{}" + beside
    return _Entry(group, key, _pair(key, [opening, *_indented([*body, *node.closing])]), above)


def _pair(key: str, value: list[str]) -> tuple[str, ...]:
    """Return the lines of `key: value`; a value that goes on below begins empty."""
    key = _scalar(key)
    mark = [key + ":"] if len(key) <= _KEY_LIMIT else ["? " + key, ":"]
    space = "" if not value[0] or value[0].startswith("  ") else " "
    return (*mark[:-1], mark[-1] + space + value[0], *value[1:])


def _mapping(entries: list[_Entry], airy: bool = False) -> list[str]:
    """Return a body: one mapping, or a list of them where a key would come twice."""
    sections = _sections(entries)
    if len(sections) == 1 and sections[0][0].key:
        return _section(sections[0], airy)
    lines: list[str] = []
    for section in sections:
        if airy and lines:
            lines.append("")
        below = _section(section, airy)
        # Comment lines above the first entry stay above the dash.
        dash = next(at for at, line in enumerate(below) if not line.startswith("#"))
        lines += [*below[:dash], "- " + below[dash], *_indented(below[dash + 1 :])]
    return lines


def _sections(entries: list[_Entry]) -> list[list[_Entry]]:
    sections: list[list[_Entry]] = []
    taken: set[tuple[str, str]] = set()
    for entry in entries:
        above = sections[-1][-1] if sections else None
        goes_on = above is not None and bool(above.key and entry.key)
        if entry.group and above is not None and above.group == entry.group:
            goes_on = goes_on and (entry.group, entry.key) not in taken
        else:
            goes_on = goes_on and ("", entry.group or entry.key) not in taken
        if not goes_on:
            sections.append([])
            taken = set()
        sections[-1].append(entry)
        taken |= {("", entry.group or entry.key), (entry.group, entry.key)}
    return sections


def _section(entries: list[_Entry], airy: bool) -> list[str]:
    lines: list[str] = []
    group = ""
    for at, entry in enumerate(entries):
        opens = not entry.group or entry.group != group
        long = len(entry.lines) > 1 or (at > 0 and len(entries[at - 1].lines) > 1)
        if airy and at and (opens or long):
            lines.append("")
        group = entry.group
        inside = [*entry.above, *entry.lines]
        if opens and group:
            lines += [*entry.above, f"{group}:", *_indented(entry.lines)]
        else:
            lines += _indented(inside) if group else inside
    return lines


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" if line else "" for line in lines]


def _value(expr: syntax.Expr) -> str:
    """Return an expression as a scalar, or as a list where its items are plain."""
    if isinstance(expr, syntax.ListOf):
        items = [show(each) for each in expr.items]
        if all(_is_plain(each) and not re.search(r"[,\[\]{}?:]", each) for each in items):
            return f"[{', '.join(items)}]"
    return _scalar(show(expr))


def _is_plain(text: str) -> bool:
    return not (_UNPLAIN.match(text) or _UNPLAIN_INSIDE.search(text))


def _scalar(text: str) -> str:
    """Return a scalar, in quotes only where YAML would read it otherwise."""
    if _is_plain(text):
        return text
    if all(char.isprintable() for char in text):
        if '"' not in text and "\\" not in text:
            return f'"{text}"'
        return "'" + text.replace("'", "''") + "'"
    escaped = (char if char.isprintable() and char not in '"\\' else _escape(char) for char in text)
    return '"' + "".join(escaped) + '"'


def _escape(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    code = ord(char)
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"
