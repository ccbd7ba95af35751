"""A configuration of theirs as it is read: every field that is asked for is noted.

What a text is made of stands in its comments, and what nobody asked for is an error, so that
no field is passed over in silence:

    >>> config = read({"model_type": "llama", "hidden_size": 32})
    >>> config.get("hidden_size"), config.taken()
    (32, ('hidden_size',))
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..grammar.diagnostics import Diagnostic, LoomError
from ..grammar.source import Source, Span
from .inert import DERIVED, INERT

PIP = "pip install 'headloom[hf]'"


@dataclass
class Config:
    """Fields by their names, dots between levels.

    `names` is what a kind calls them, `fixed` what it says in their place, `seen` which were read.
    """

    source: Source
    kind: str
    fields: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    usual: Mapping[str, Any] | None = None  # what the class says by itself; None without a class
    names: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    lately: list[str] = field(default_factory=list)

    def of(self, names: Mapping[str, str], fixed: Mapping[str, Any]) -> Config:
        """Return this configuration with what a kind calls its fields; what was read is shared."""
        return replace(self, names=names, fixed=fixed)

    def get(self, name: str) -> Any:
        """Return a field, or what the kind says in its place. Raises `LoomError` (L604)."""
        if self.fixed.get(name) is not None:
            return self.fixed[name]
        where = self.where(name)
        try:
            found = _at(self.fields, where)
        except LookupError:
            raise self.missing(where) from None
        whole = re.sub(r"\.\d+$", "", where)  # of one of a list
        self.seen.add(whole)
        self.lately.append(whole)
        return found

    def knows(self, name: str) -> bool:
        """Return whether a field is there, whatever it says."""
        try:
            _at(self.fields, self.where(name))
        except LookupError:
            return False
        return True

    def has(self, name: str) -> bool:
        """Return whether a field is there and says anything."""
        if self.fixed.get(name) is not None:
            return True
        return self.knows(name) and _at(self.fields, self.where(name)) is not None

    def where(self, name: str) -> str:
        """Return what a field is called in this configuration."""
        name = self.names.get(name, name)
        if name not in self.fields:
            first, dot, rest = name.partition(".")
            name = self.aliases.get(first, first) + dot + rest
        return name

    def note(self, name: str) -> None:
        """Mark a field as read that says nothing here."""
        self.seen.add(self.where(name))

    def taken(self) -> tuple[str, ...]:
        """Return which fields were read since this was asked last."""
        found = tuple(dict.fromkeys(self.lately))
        self.lately.clear()
        return found

    def missing(self, name: str) -> LoomError:
        """Return the error for a field that is not there."""
        help = "" if self.usual is not None else f"its default is known to transformers: {PIP}"
        return self.error("L604", f"`{name}` is needed", name, help=help)

    def needs_transformers(self, why: str) -> LoomError:
        """Return the error for what only transformers knows."""
        return self.error("L604", f"{why} need transformers", help=PIP)

    def unsupported(self, name: str, supported: str) -> LoomError:
        """Return the error for a value that cannot be said; `supported` is what can be."""
        name = self.where(name)
        message = f"`{name}` = {_shown(_at(self.fields, name))} is not supported"
        return self.error("L602", message, name, help=supported)

    def error(self, code: str, message: str, name: str = "", help: str = "") -> LoomError:
        """Return an error that points at a field."""
        return LoomError([Diagnostic(code, message, self.span(name), f"of `{self.kind}`", help)])

    def span(self, name: str) -> Span:
        """Return where a field stands in the text of the configuration."""
        key = f'"{name.rpartition(".")[2]}"'
        at = self.source.text.find(key) if name else -1
        return Span(self.source, at, at + len(key)) if at >= 0 else Span(self.source, 0, 0)

    def unread(self) -> list[str]:
        """Return the fields that nobody read, that say something, and that are not inert."""
        usual = dict(_leaves(self.usual or {}))
        found = []
        for name, value in _leaves(self.fields):
            first = name.partition(".")[0]
            known = {name, first} & (self.seen | INERT) or self.seen & {*DERIVED.get(name, ())}
            said = value not in (None, False, [], {}) and value != usual.get(name)
            if said and not known and not first.startswith("_"):
                found.append(name)
        return found


def _at(fields: Mapping[str, Any], name: str) -> Any:
    found: Any = fields
    for part in name.split("."):
        if isinstance(found, list | tuple):
            found = found[int(part)]
        elif isinstance(found, Mapping):
            found = found[part]
        else:
            raise LookupError(name)
    return found


def _leaves(fields: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def read(what: Any, name: str = "config") -> Config:
    """Read a dict, a `PretrainedConfig` or a folder. Raises `LoomError`, `FileNotFoundError`.

    Where transformers is there, its class completes and translates the fields as it would.
    """
    if isinstance(what, str | Path):
        path = Path(what) / "config.json" if Path(what).is_dir() else Path(what)
        return read(json.loads(path.read_text(encoding="utf-8")), str(path))
    said = dict(what) if isinstance(what, Mapping) else what.to_dict()
    kind = said.get("model_type", "")
    source = Source(name, json.dumps(said, indent=2, default=str))
    if find_spec("transformers") is None:
        return Config(source, kind, said)
    made = _classed(kind, said, source) if isinstance(what, Mapping) else what
    if made is None:
        return Config(source, kind, said)
    return Config(source, kind, made.to_dict(), made.attribute_map, _usual(made))


def _classed(kind: str, said: Mapping[str, Any], source: Source) -> Any:
    """Return the object of the class that belongs to a kind; None where there is no class."""
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        return None
    try:
        return CONFIG_MAPPING[kind](**{key: it for key, it in said.items() if key != "model_type"})
    except Exception as problem:  # what their classes raise of a field is of many types
        message = f"transformers does not take this configuration: {problem}"
        raise LoomError([Diagnostic("L605", message, Span(source, 0, 0))]) from problem


def _usual(made: Any) -> Mapping[str, Any]:
    """Return what a class says where nothing is said."""
    try:
        found: Mapping[str, Any] = type(made)().to_dict()
    except Exception:  # a class may need a field: then everything counts as said
        return {}
    return found
