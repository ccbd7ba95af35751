"""Architectures as people load them: read and checked, their own text, drawn in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..grammar.parse import read
from ..grammar.source import Source
from .checking.check import check
from .model import Architecture, Block, Model
from .parse import parse_source
from .reports.drawn import Drawn


@dataclass(frozen=True, repr=False)
class Loaded(Drawn, Architecture):
    """A checked file that shows what it defines."""

    def __str__(self) -> str:
        return self.text

    def show(self, console: Console | None = None, tokens: int = 4096) -> None:
        """Draw its text, its models, and the blocks that no model has."""
        from .reports.show import show

        console = console or Console(highlight=False)
        console.print(self.text, markup=False, soft_wrap=True)
        layers = {block.name for model in self.models.values() for block in model.blocks}
        drawn: list[Block | Model] = list(self.models.values())
        drawn += [block for name, block in self.blocks.items() if name not in layers]
        for each in drawn:
            show(each, tokens, console)


def load(what: str | Path, format: str | None = None) -> Loaded:
    """Read and check a description: a path, or with a format ("loom", "yaml") its text.

    Raises `LoomError` with every finding; `.diagnostics` holds them as data.
    """
    if format not in (None, "loom", "yaml"):
        raise ValueError(f'format is "loom" or "yaml", not {format!r}')
    source = Source("<text>", str(what)) if format is not None else read(what)
    found = check(parse_source(source, format))
    return Loaded(found.file, found.blocks, found.models, found.warnings)
