"""The standing tables: rows as data in `suites/*.yaml`, measured in one command, resumable.

    standing = measured(read_suite("cpu"), machine("cpu"), path, measure, date="2030-01-31")

A row that is done is written at once; a second run goes on with those that are missing, or were
measured with other sources of the package. A row that was begun and never ended goes last.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .case import SHOWN, Case
from .cells import Cell, Row, geometric_mean, over
from .machine import Machine

SUITES = ("cpu", "gpu")
NOT_YET = "not measured yet"
_FOLDER = Path(__file__).parent / "suites"


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of a table. `target` is the ratio asked for, or, of a `limit`, the seconds.

    `instead` is the text of the block that peers compute which cannot say this one; the ratio of
    a row in a `group` counts in the group's geometric mean.
    """

    title: str
    case: Case
    against: tuple[str, ...] = ()
    instead: str = ""
    number: str = "seconds"
    target: float | None = None
    group: str = ""
    weigh: bool = False

    @property
    def key(self) -> str:
        most = ", optimize max" if self.case.optimize == "max" else ""
        return f"{self.title}; {self.case.tokens:,} tokens, {SHOWN[self.case.run]}{most}"


@dataclass(frozen=True, slots=True)
class Suite:
    """A table: its rows, the most important first, and the targets of its groups."""

    name: str
    about: str
    threads: int | None
    entries: tuple[Entry, ...]
    groups: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Measured:
    """An entry with its row, or why it has none."""

    entry: Entry
    row: Row | None = None
    reason: str = NOT_YET

    @property
    def best(self) -> Cell | None:
        """The peer that counts: the best of them."""
        number = "memory" if self.entry.number == "memory" else "seconds"
        return None if self.row is None else self.row.best(number)

    @property
    def value(self) -> float | None:
        """What the target asks about: a ratio of the best peer to ours, or our seconds."""
        if self.row is None:
            return None
        match self.entry.number:
            case "limit":
                return self.row.ours.seconds
            case "memory":
                ours = None if self.row.ours.wrong else self.row.ours.memory
                return over(self.best.memory if self.best else None, ours)
            case _:
                return over(self.best.seconds if self.best else None, self.row.ours.seconds)

    @property
    def met(self) -> bool | None:
        """Whether the target is met, None where there is none or no number."""
        if self.value is None or self.entry.target is None:
            return None
        limit = self.entry.number == "limit"
        return self.value <= self.entry.target if limit else self.value >= self.entry.target


@dataclass(frozen=True, slots=True)
class Standing:
    """A suite measured on a machine, as far as it got."""

    suite: Suite
    machine: Machine
    date: str
    rows: tuple[Measured, ...]

    def group(self, name: str) -> float | None:
        """Return the geometric mean of a group's ratios, None while one is missing."""
        values = [each.value for each in self.rows if each.entry.group == name]
        known = [each for each in values if each is not None]
        return geometric_mean(known) if len(known) == len(values) else None

    def to_json(self) -> dict[str, Any]:
        groups = [
            {"group": name, "asked": target, "measured": self.group(name)}
            for name, target in self.suite.groups.items()
        ]
        rows = [_json(each, self.machine) for each in self.rows]
        return {
            "suite": self.suite.name,
            "about": self.suite.about,
            "date": self.date,
            "machine": self.machine.to_json(),
            "groups": groups,
            "rows": rows,
        }


def _json(each: Measured, machine: Machine) -> dict[str, Any]:
    """Return a row as plain data; its digest says what it was measured of."""
    return {
        "key": each.entry.key,
        "title": each.entry.title,
        "digest": digest(each.entry, machine),
        "asked": each.entry.target,
        "of": each.entry.number,
        "measured": each.value,
        "met": each.met,
        "against": each.best.peer if each.best else None,
        "reason": each.reason,
        "row": each.row.to_json() if each.row else None,
    }


# ── reading ──────────────────────────────────────────────────────────────────────────────

_SUITE = {"about", "threads", "block", "settings", "groups", "rows"}
_ROW = {"title", "define", "block", "text", "tokens", "run", "against", "instead", "number",
        "target", "group", "weigh", "documents", "batch", "dtype", "device", "width",
        "optimize"}  # fmt: skip


def read_suite(name: str, path: Path | None = None) -> Suite:
    """Read a table. Raises `ValueError` for a key or a title that cannot be."""
    import yaml

    text = (path or _FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    _only(data, _SUITE, name)
    entries = tuple(entry for row in data["rows"] for entry in _entries(row, data))
    keys = [each.key for each in entries]
    if twice := {each for each in keys if keys.count(each) > 1}:
        raise ValueError(f"{name} has two rows of {', '.join(sorted(twice))}")
    return Suite(name, data["about"], data.get("threads"), entries, data.get("groups", {}))


def _only(data: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(data) - known):
        raise ValueError(f"{where} has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")


def _entries(row: dict[str, Any], suite: dict[str, Any]) -> list[Entry]:
    """Return the rows of an item: one for every length and run it lists."""
    row = {**suite.get("settings", {}), **row}
    _only(row, _ROW, f"the row `{row.get('title')}`")
    define = row.get("define", "")
    text = row.get("text") or _block(suite["block"], row.get("block", ""), define)
    instead = _block(suite["block"], row["instead"], define) if "instead" in row else ""
    sizes = {
        name: row[name]
        for name in ("documents", "batch", "dtype", "device", "width", "optimize")
        if name in row
    }
    return [
        Entry(
            row["title"],
            Case(text, None, tokens, run, **sizes),
            tuple(row.get("against", ())),
            instead,
            row.get("number", "seconds"),
            row.get("target"),
            row.get("group", ""),
            row.get("weigh", False),
        )
        for run in _list(row.get("run", "forward"))
        for tokens in _list(row["tokens"])
    ]


def _block(usual: str, settings: str, define: str) -> str:
    head = f"{define.strip()}\n" if define else ""
    return f"{head}block b {{ {usual}; {settings} }}\n"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# ── measuring ────────────────────────────────────────────────────────────────────────────


@dataclass
class Kept:
    """The file of results: what is known by the entry's key, and how often one was begun."""

    path: Path
    rows: dict[str, dict[str, Any]]
    begun: dict[str, int]

    @staticmethod
    def read(path: Path) -> Kept:
        """Read the file, where there is one."""
        if not path.exists():
            return Kept(path, {}, {})
        data = json.loads(path.read_text(encoding="utf-8"))
        return Kept(path, {each["key"]: each for each in data["rows"]}, data["begun"])

    def measured(self, entry: Entry, machine: Machine) -> Measured:
        """Return what is known of an entry with these sources."""
        found = self.rows.get(entry.key)
        if found is None or found["digest"] != digest(entry, machine):
            return Measured(entry)
        row = None if found["row"] is None else Row.from_json(found["row"])
        return Measured(entry, row, found["reason"])

    def keep(self, each: Measured, machine: Machine) -> None:
        self.rows[each.entry.key] = _json(each, machine)

    def write(self, standing: Standing) -> None:
        """Write everything; a process killed meanwhile leaves the file as it was."""
        data = {**standing.to_json(), "begun": self.begun}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        half = self.path.with_suffix(".part")
        half.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        half.replace(self.path)


Measure = Callable[[Entry], Row]


def measured(
    suite: Suite,
    machine: Machine,
    path: Path,
    measure: Measure,
    *,
    date: str,
    budget: float | None = None,
    fresh: bool = False,
    ended: Callable[[Measured], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> Standing:
    """Measure what is missing of a suite, within `budget` seconds, and return where it stands.

    No row is begun after the budget; `measure` makes one, and what it raises is the row's reason.
    """
    kept, begun = Kept(path, {}, {}) if fresh else Kept.read(path), clock()

    def standing() -> Standing:
        rows = tuple(kept.measured(each, machine) for each in suite.entries)
        return Standing(suite, machine, date, rows)

    missing = [each.entry for each in standing().rows if each.reason == NOT_YET]
    for entry in sorted(missing, key=lambda each: kept.begun.get(each.key, 0)):
        if budget is not None and clock() - begun > budget:
            break
        kept.begun[entry.key] = kept.begun.get(entry.key, 0) + 1
        kept.write(standing())
        done = _measured(entry, measure)
        kept.keep(done, machine)
        del kept.begun[entry.key]
        kept.write(standing())
        ended(done)
    kept.write(standing())
    return standing()


def _measured(entry: Entry, measure: Measure) -> Measured:
    try:
        return Measured(entry, measure(entry), "")
    except Exception as problem:
        return Measured(entry, None, f"{type(problem).__name__}: {problem}"[:500])


def digest(entry: Entry, machine: Machine) -> str:
    """Return what a row depends on: its data, the versions, the sources of the package."""
    text = repr(replace(entry, target=None)) + repr(machine)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
