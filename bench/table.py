"""What was measured as a table: one row of it a peer, or, of a suite, one a case.

headloom     12.3 ms          1.62 TFLOP/s   71 %   0.2 GB   0.4 s   3e-07
flex         20.1 ms   1.63   0.99 TFLOP/s   44 %   0.2 GB   9.1 s   4e-07
reference    wrong: error 0.2 over 1e-04
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .case import SHOWN
from .cells import Cell, Row
from .suite import Measured, Standing

_COLUMNS = ("", "median", "quartiles", "over ours", "rate", "of ceiling", "memory", "ready",
            "error")  # fmt: skip
WIDTH = 110  # of a table that no terminal shows


def title(row: Row) -> str:
    """Say in a line what a row is."""
    case = row.case
    name = case.name or case.what.name
    parts = [f"{case.tokens:,} tokens", SHOWN[case.run], f"batch {case.batch}", case.dtype]
    return f"{name} ({row.path}): {', '.join(parts)}"


def console() -> Console:
    """Return where tables are printed."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)


def table(row: Row) -> Group:
    """Return a case as a table, ours first; below it what stood in the way of the others."""
    made = Table(box=SIMPLE, padding=(0, 1))
    for name in _COLUMNS:
        made.add_column(name, justify="right" if name else "left", no_wrap=True)
    for cell in row.cells:
        if cell.wrong or not cell.reason:
            made.add_row(*cells(row, cell))
    notes = [
        Text(f"  {cell.peer}: {cell.obstacle}", style="red" if cell.wrong else "dim")
        for cell in row.cells
        if cell.obstacle
    ]
    return Group(Text(title(row), style="bold"), made, *notes)


def cells(row: Row, cell: Cell) -> list[str]:
    """Return what a table shows of a peer."""
    spread, share = cell.spread, row.share(cell)
    return [
        cell.peer,
        "wrong" if cell.wrong else seconds(cell.seconds),
        "" if spread is None else quartiles(*spread),
        "" if cell is row.ours else ratio(row.ratio(cell)),
        rate(row.rate(cell)),
        "" if share is None else f"{100 * share:.0f} %",
        "" if cell.wrong else size(cell.memory),
        seconds(cell.ready),
        "" if cell.error is None else f"{cell.error:.0e}",
    ]


def seconds(value: float | None) -> str:
    """Write a time in the unit that fits."""
    if value is None:
        return ""
    factor, unit = _unit(value)
    return f"{value * factor:.3g} {unit}" if value < 1e3 else f"{value:.0f} s"


def quartiles(low: float, high: float) -> str:
    """Write two times in one unit."""
    factor, unit = _unit(high)
    return f"{low * factor:.3g}–{high * factor:.3g} {unit}"


def _unit(value: float) -> tuple[float, str]:
    return (1.0, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "µs")


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def rate(value: float | None) -> str:
    """Write operations a second."""
    if value is None:
        return ""
    return f"{value / 1e12:.3g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP/s"


def size(value: int | None) -> str:
    """Write bytes."""
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def legend(rows: Iterable[Row]) -> str:
    """Say what the columns mean that no heading can."""
    found = list(rows)
    tops = {f"{rate(each.ceiling)}" for each in found if each.ceiling}
    compared = {each.compared for row in found for each in row.cells if each.compared}
    return "\n".join(
        (
            "medians of interleaved runs; over ours: above 1, ours is faster",
            f"rate: by the pairs that see each other; ceiling: a matrix product, {', '.join(tops)}",
            ", ".join(("error: root mean square, relative", *sorted(compared))),
        )
    )


def standing_table(standing: Standing) -> Group:
    """Return a suite as a table: asked for, measured; below it what is missing, and why."""
    made = Table(box=SIMPLE, padding=(0, 1))
    for name in ("", "tokens", "run", "ours", "best peer", "measured", "asked"):
        made.add_column(name, justify="left" if name in ("", "run", "best peer") else "right")
    for each in standing.rows:
        made.add_row(*_summary(each))
    for name, target in standing.suite.groups.items():
        found = standing.group(name)
        value = _judged(ratio(found), None if found is None else found >= target)
        made.add_row(
            Text(f"geometric mean: {name}", style="bold"), "", "", "", "", value, f"{target:g}"
        )
    notes = [
        Text(f"  {each.entry.key}: {without(each)}", style="dim")
        for each in standing.rows
        if without(each)
    ]
    if any(each.best is not None and each.best.computes for each in standing.rows):
        notes.insert(0, Text("  * of another block: it cannot say this one", style="dim"))
    head = Text(f"{standing.suite.name}: {standing.machine.device}", style="bold")
    return Group(head, made, *notes)


def _summary(each: Measured) -> list[Text]:
    entry, row, best = each.entry, each.row, each.best
    run = {"backward": "+ backward", "compiling": "compiling"}.get(entry.case.run, entry.case.run)
    texts = [Text(entry.title), Text(f"{entry.case.tokens:,}"), Text(run)]
    if row is None:
        return [*texts, Text(), Text(), Text(), Text(_target(each))]
    number = "memory" if entry.number == "memory" else "seconds"
    ours = "wrong" if row.ours.wrong else _number(getattr(row.ours, number), number)
    peer = ""
    if best is not None:
        mark = "*" if best.computes else ""
        peer = f"{best.peer} {_number(getattr(best, number), number)}{mark}"
    return [*texts, Text(ours), Text(peer), _judged(value(each), each.met), Text(_target(each))]


def value(each: Measured) -> str:
    """Write what was measured of a row."""
    return seconds(each.value) if each.entry.number == "limit" else ratio(each.value)


def without(each: Measured) -> str:
    """Say why a row has no number, "" where it has one."""
    if each.value is not None:
        return ""
    if each.row is None:
        return each.reason
    whys = [f"{cell.peer}: {cell.obstacle}" for cell in each.row.cells if cell.obstacle]
    return "; ".join(whys) or "no number"


def _number(value: float | None, number: str) -> str:
    if value is None:
        return ""
    return size(int(value)) if number == "memory" else seconds(value)


def _target(each: Measured) -> str:
    if each.entry.target is None:
        return ""
    return (
        f"≤ {each.entry.target:g} s" if each.entry.number == "limit" else f"{each.entry.target:g}"
    )


def _judged(text: str, met: bool | None) -> Text:
    return Text(text, style="" if met is None else "green" if met else "red")


def line(each: Measured) -> str:
    """Say in one line how a row of a suite ended."""
    if each.value is None:
        return f"{each.entry.key}: {without(each)}"
    asked = f", asked {_target(each)}" if _target(each) else ""
    return f"{each.entry.key}: {value(each)}{asked}"
