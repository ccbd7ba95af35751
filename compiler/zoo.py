"""The zoo: known mechanisms, each a `.loom` file of its own in `examples/zoo`.

A file begins with what the mechanism is, in words, and then says three things by key, and a
fourth where it leaves something out. Lines after a key belong to it until the next one:

    # Multi-query attention: all query heads read one key head and one value head.
    # family: heads
    # source: Shazeer 2019, Fast Transformer Decoding
    # catalogue: #87 (its number in the project's catalogue, which form of it; or `none`)
    # without: what is not said here; `docs/zoo.md` says why

Everything else is the description itself: one block named like the file, or, where layers
differ or read each other, blocks and one model of that name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from math import gcd
from pathlib import Path
from typing import Any

from rich.console import Console

from ..grammar.diagnostics import did_you_mean
from ..grammar.source import Source
from .checking.check import check, find
from .facts.cost import Cost, cost
from .loading import Loaded, load
from .model import Block, Model
from .parse import parse_source

KEYS = ("family", "source", "catalogue")
_KEY = re.compile(rf"({'|'.join((*KEYS, 'without'))}): +(.*)")


@dataclass(frozen=True, slots=True, repr=False)
class Entry:
    """A mechanism: the text of its file, and what the comment at its head says."""

    name: str
    text: str
    about: str
    family: str
    source: str
    catalogue: str
    without: str = ""

    @property
    def number(self) -> str:
        """Its catalogue number as `#87` or `#D8`; "" where it has none."""
        found = re.match(r"#D?\d+", self.catalogue)
        return found[0] if found else ""

    @property
    def arch(self) -> Loaded:
        """The checked file. Raises `LoomError`."""
        return load(self.text, "loom")

    def __repr__(self) -> str:
        return f"<{self.name} ({self.family}): {self.about}>"

    def __str__(self) -> str:
        return self.text

    def what(self) -> Block | Model:
        """Check the file and return the block or model of its name. Raises `LoomError`."""
        return find(check(parse_source(Source(f"{self.name}.loom", self.text))), self.name)


def folder() -> Path:
    """Return where the files lie: `examples/zoo` in a checkout, `zoo` where it is installed."""
    root = Path(__file__).parent.parent
    checkout = root / "examples" / "zoo"
    return checkout if checkout.is_dir() else root / "zoo"


def names() -> list[str]:
    """Return the names of all mechanisms."""
    return sorted(path.stem for path in folder().glob("*.loom"))


def entry(name: str) -> Entry:
    """Return one mechanism. Raises `LookupError` where there is none of this name."""
    path = folder() / f"{name}.loom"
    if path.stem != name or not path.is_file():
        help = did_you_mean(name, names(), "`headloom zoo` lists them")
        raise LookupError(f"there is no `{name}` in the zoo: {help}")
    return read(name, path.read_text(encoding="utf-8"))


def entries() -> list[Entry]:
    """Return all mechanisms, those of a family together."""
    return sorted(map(entry, names()), key=lambda each: (each.family, each.name))


def read(name: str, text: str) -> Entry:
    """Take the head of a file apart. Raises `ValueError` where a key is missing."""
    said = {"about": ""}
    key = "about"
    for line in takewhile(lambda line: line.startswith("#"), text.splitlines()):
        words = line.removeprefix("#").strip()
        if match := _KEY.fullmatch(words):
            key, words = match.groups()
        said[key] = f"{said.get(key, '')} {words}".strip()
    missing = [key for key in ("about", *KEYS) if not said.get(key)]
    if missing:
        raise ValueError(f"the head of `{name}.loom` does not say its {', '.join(missing)}")
    return Entry(name, text, **said)


def row(each: Entry, tokens: int) -> dict[str, Any]:
    """Return what the table says of a mechanism.

    `relative_flops` compares with plain attention of the same width and as many heads, in
    which every token sees all; of a model, its attention layers with as many of those.
    """
    what = each.what()
    layers = what.uses
    plain = sum(_plain(block.width, block.heads).flops(tokens) for block in layers)
    found = cost(what)
    return {
        "name": each.name,
        "catalogue": each.catalogue,
        "without": each.without,
        "family": each.family,
        "about": each.about,
        "source": each.source,
        "tokens": tokens,
        "params": found.params,
        "flops": found.flops(tokens),
        "relative_flops": sum(cost(block).flops(tokens) for block in layers) / plain,
        "cache_bytes": found.cache_bytes(tokens),
    }


@cache
def _plain(width: int, heads: int) -> Cost:
    """Return what plain attention costs."""
    heads = gcd(heads, width)  # a mixer may have more heads than there are features
    text = f"block plain {{ width = {width}; heads = {heads} }}"
    return cost(find(check(parse_source(Source("plain.loom", text))), "plain"))


def show_all(tokens: int, console: Console | None = None) -> None:
    """Print a table of all mechanisms."""
    from rich.box import SIMPLE
    from rich.table import Table

    console = console or Console(highlight=False)
    caption = (
        f"for {tokens:,} tokens, caches in float32; flops: in parts of those of plain "
        "attention, unmasked, of the same width and as many heads"
    )
    table = Table(box=SIMPLE, caption=caption)
    table.add_column("mechanism", no_wrap=True, min_width=max(map(len, names())))
    for title in ("#", "family"):
        table.add_column(title)
    for title in ("parameters", "flops", "cache bytes"):
        table.add_column(title, justify="right")
    family = ""
    for each in entries():
        if family and each.family != family:
            table.add_section()
        family = each.family
        said = row(each, tokens)
        table.add_row(
            each.name,
            each.number,
            family,
            f"{said['params']:,}",
            f"{said['relative_flops']:.3f}",
            f"{said['cache_bytes']:,}",
        )
    console.print(table)
