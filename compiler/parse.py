"""Text → syntax.File, Loom or YAML by the file's ending. The first station of the road."""

from __future__ import annotations

from pathlib import Path

from ..grammar.parse import parse, read
from ..grammar.source import Source
from ..grammar.syntax import File


def parse_source(source: Source, format: str | None = None) -> File:
    """Parse Loom or YAML, by the format said or the file's ending."""
    format = format or ("yaml" if source.name.endswith((".yaml", ".yml")) else "loom")
    if format == "yaml":
        from ..grammar.from_yaml import parse_yaml

        return parse_yaml(source)
    return parse(source)


def parse_path(path: str | Path) -> File:
    """Read and parse a file."""
    return parse_source(read(path))
