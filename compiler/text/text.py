"""Small things about Python text: names, parentheses, lines that are not too long."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from symtable import symtable

from ..model import elsewhere
from ..pieces import FILES

LIMIT = 96
_DEFINED = re.compile(  # where a piece begins: it ends before the next
    r"^(?:def |class |(?=\w+(?:: .+)? = ))(\w+)", re.MULTILINE
)
STANDARD = {  # what a file may import, and the names that each line brings
    "import copy": ("copy",),
    "import math": ("math",),
    "from collections.abc import {}": ("Callable", "Iterator"),
    "from itertools import {}": ("pairwise",),
    "from typing import {}": ("Any", "NamedTuple"),
}
INSTALLED = {
    "import torch": ("torch",),
    "import torch.nn.functional as F": ("F",),
    "import triton": ("triton",),
    "import triton.language as tl": ("tl",),
    "from torch import {}": ("Tensor", "nn"),
}
_IMPORTED = frozenset(
    name for rows in (STANDARD, INSTALLED) for names in rows.values() for name in names
)
_OURS = frozenset((
    "self", "x", "b", "n", "m", "i", "j", "h", "s", "p", "f", "context", "segments", "positions",
    "cache", "context_positions", "start", "visible", "seen", "step", "width", "rows", "added",
    "outputs", "plain", "wide", "weight", "given", "places", "state", "last", "anew", "fresh",
    "finite", "tau", "device", "o", "before", "shared", "place", "attention_mask", "context_mask",
    "cu_seqlens", "batch", "far", "outer", "run", "context_run", "own", "other", "idle", "known",
    "spoilt", "part", "counted", "token", "taken_up", "answered", "states", "streams", "bias",
    "line", "past", "total", "made", "exact", "some", "weights", "loss", "again",
    # of a choice
    "pairs", "always", "free", "group", "first", "count", "row", "begun", "e", "chosen", "score",
    "sees", "keeps", "offers", "forced", "groups",
))  # fmt: skip
_MADE = re.compile(  # what the text calls its own
    r"_$|__(?:\d+|next)$|_[ghijt]$|_cache$|^side_\d+$|^repeated_\d+$|(?:run|starts)_\d+$|^previous_|^below_|^layer_|^shared_|^lent_"
    r"|_(?:added|asked|before|decay|key|level|given|past|query|read|start|value|written|held|exact)s?(?:_\d+)?$"
)


def ident(name: str) -> str:
    """Return a variable for a stream or state, away from the names the text itself uses."""
    if (found := elsewhere(name)) is not None:
        step, own = found
        place = "previous" if step == -1 else f"below_{-step}" if step < 0 else f"layer_{step}"
        return f"{place}_{ident(own)}"
    if "." in name or name in ("x", "context"):
        return name.replace(".", "__")
    ours = name in _OURS or name in _IMPORTED or name in pieces()
    taken = ours or keyword.iskeyword(name) or hasattr(builtins, name) or _MADE.search(name)
    return f"{name}_" if taken else name


def shared_text(name: str, label: str = "") -> str:
    """Return the text of what another layer gave: a stream by its name here, or what is beside."""
    found = elsewhere(name)
    assert found is not None
    step, own = found
    before, dot, last = own.rpartition(".")
    return f'shared[{step}]["{before}{dot}{label or last}"]'


def shared_name(name: str) -> str:
    """Return what a stream of another layer is called in its block."""
    found = elsewhere(name)
    return name if found is None else found[1].rpartition(".")[2]


def class_name(name: str) -> str:
    """Return `tiny_gemma` as `TinyGemma`, away from the classes the text itself uses."""
    made = "".join(part[:1].upper() + part[1:] for part in name.split("_") if part)
    made = made if made[:1].isalpha() else f"Block{made}"
    taken = made in _IMPORTED or made in pieces()
    return f"{made}Block" if taken or keyword.iskeyword(made) or hasattr(builtins, made) else made


def atomic(text: str) -> str:
    """Return the text in parentheses unless it is one name, number, call or attribute."""
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:
        return f"({text})"
    simple = ast.Name | ast.Constant | ast.Call | ast.Attribute | ast.Subscript
    return text if isinstance(node, simple) else f"({text})"


def indent(lines: list[str], by: int = 1) -> list[str]:
    return [f"{'    ' * by}{line}" if line else "" for line in lines]


def comment(line: str, note: str) -> list[str]:
    """Put a comment beside a line, or above it where there is no room."""
    if not note:
        return [line]
    if len(line) + len(note) + 4 <= LIMIT + 4:
        return [f"{line}  # {note}"]
    return [f"# {note}", line]


def call(head: str, args: list[str], tail: str = ")") -> list[str]:
    """Return `head(args)` on one line, or with one argument a line."""
    line = f"{head}({', '.join(args)}{tail}"
    if len(line) <= LIMIT - 8:
        return [line]
    inside = ", ".join(args)
    if len(inside) <= LIMIT - 12:
        return [f"{head}(", f"    {inside}", tail]
    return [f"{head}(", *(f"    {arg}," for arg in args), tail]


def tupled(items: Collection[str]) -> str:
    """Write a tuple."""
    return f"({', '.join(items)}{',' * (len(items) == 1)})"


def braced(head: str, items: Sequence[str]) -> list[str]:
    """Return `head{item}` on one line, or with one item a line."""
    line = f"{head}{{{', '.join(items)}}}"
    if len(line) <= LIMIT - 16:
        return [line]
    return [f"{head}{{", *(f"    {each}," for each in items), "}"]


@cache
def pieces() -> dict[str, str]:
    """Return the source text of all that `pieces` defines, in its order."""
    found = {}
    for file in FILES:
        source = (Path(__file__).parent.parent / "pieces" / f"{file}.py").read_text("utf-8")
        begun = list(_DEFINED.finditer(source))
        ends = [*(each.start() for each in begun[1:]), len(source)]
        for each, end in zip(begun, ends, strict=True):
            text = source[each.start() : end].rstrip()
            found[each[1]] = text.replace("  # fmt: skip", "")
    return found


def names_read(lines: Iterable[str]) -> frozenset[str]:
    """Return the names that a text reads: what must be defined or imported before it."""
    found: set[str] = set()
    tables = [symtable("\n".join(lines), "<text>", "exec")]
    for table in tables:
        found.update(each.get_name() for each in table.get_symbols() if each.is_referenced())
        tables += table.get_children()
    return frozenset(found)


@cache
def read_by_piece(piece: str) -> frozenset[str]:
    return names_read([pieces()[piece]])


def needed_pieces(read: Collection[str]) -> list[str]:
    """Return the pieces among the names that a text reads, and those they read, in their order."""
    wanted: set[str] = set()
    found = pieces().keys() & read
    while found:
        wanted |= found
        found = {each for name in found for each in pieces().keys() & read_by_piece(name)} - wanted
    return [name for name in pieces() if name in wanted]


def imports(rows: Mapping[str, Collection[str]], read: Collection[str]) -> list[str]:
    """Return those of the import lines that bring a name that is read."""
    used = {line: [name for name in names if name in read] for line, names in rows.items()}
    return [line.format(", ".join(names)) for line, names in used.items() if names]
