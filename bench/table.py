"""What was measured as a table: one row of it a peer, or, of a suite, one a case.

headloom     12.3 ms          1.62 TFLOP/s   71 %   0.2 GB   0.4 s   3e-07
flex         20.1 ms   1.63   0.99 TFLOP/s   44 %   0.2 GB   9.1 s   4e-07
reference    wrong: error 0.2 over 1e-04
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from .case import SHOWN
from .cells import Cell, Row
from .suite import Measured, Standing

_COLUMNS = ("", "median", "quartiles", "over ours", "rate", "of ceiling", "peak memory",
            "ready after", "error")  # fmt: skip


def title(row: Row) -> str:
    """Say in a line what a row is."""
    case = row.case
    name = case.name or case.what.name
    parts = [f"{case.tokens:,} tokens", SHOWN[case.run], f"batch {case.batch}", case.dtype]
    return f"{name} ({row.path}): {', '.join(parts)}"


def table(row: Row) -> Table:
    """Return a case as a table, ours first."""
    made = Table(title=title(row), title_justify="left", box=SIMPLE)
    for name in _COLUMNS:
        made.add_column(name, justify="left" if not name else "right", no_wrap=not name)
    for cell in row.cells:
        made.add_row(*cells(row, cell))
    return made


def cells(row: Row, cell: Cell) -> list[Text]:
    """Return what a table shows of a peer; its reason stands below its name."""
    name = Text(cell.peer, style="bold" if cell is row.ours else "")
    if cell.computes:
        name.append("\nof another block", style="dim")
    if cell.obstacle:
        name.append(f"\n{cell.obstacle}", style="red" if cell.wrong else "dim")
        return [name]
    spread = cell.spread
    texts = (
        seconds(cell.seconds),
        "" if spread is None else f"{seconds(spread[0])} – {seconds(spread[1])}",
        "" if cell is row.ours else ratio(row.ratio(cell)),
        rate(row.rate(cell)),
        "" if row.share(cell) is None else f"{100 * (row.share(cell) or 0):.0f} %",
        size(cell.memory),
        seconds(cell.ready),
        "" if cell.error is None else f"{cell.error:.0e}",
    )
    return [name, *(Text(each) for each in texts)]


def seconds(value: float | None) -> str:
    """Write a time in the unit that fits."""
    if value is None:
        return ""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}" if value < 1e3 else f"{value:.0f} s"
    return f"{value * 1e6:.3g} µs"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def rate(value: float | None) -> str:
    """Write operations a second."""
    if value is None:
        return ""
    return f"{value / 1e12:.3g} TFLOP/s" if value >= 1e11 else f"{value / 1e9:.3g} GFLOP/s"


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
    return "\n".join((
        "medians of interleaved runs; over ours: above 1, ours is faster",
        f"rate: by the pairs that see each other; ceiling: a matrix product, {', '.join(tops)}",
        ", ".join(("error: root mean square, relative", *sorted(compared))),
    ))  # fmt: skip


def standing_table(standing: Standing) -> Table:
    """Return a suite as a table: what was asked for, what was measured."""
    made = Table(title=f"{standing.suite.name}: {standing.machine.device}", title_justify="left",
                 box=SIMPLE)  # fmt: skip
    for name, side in (("", "left"), ("run", "left"), ("ours", "right"), ("best peer", "right"),
                       ("measured", "right"), ("asked", "right")):  # fmt: skip
        made.add_column(name, justify="right" if side == "right" else "left")
    for each in standing.rows:
        made.add_row(*_summary(each))
    for name, target in standing.suite.groups.items():
        found = standing.group(name)
        made.add_row(Text(f"{name}: geometric mean", style="bold"), "", "", "",
                     _judged(ratio(found), None if found is None else found >= target),
                     f"{target:g}")  # fmt: skip
    return made


def _summary(each: Measured) -> list[Text]:
    entry, row = each.entry, each.row
    name = Text(entry.title)
    reason = each.reason if row is None else row.ours.obstacle or _without(row)
    if reason:
        name.append(f"\n{reason}", style="dim")
    what = Text(f"{entry.case.tokens:,}, {SHOWN[entry.case.run]}")
    if row is None:
        return [name, what, Text(), Text(), Text(), Text(_target(each))]
    number = "memory" if entry.number == "memory" else "seconds"
    shown = [_number(getattr(cell, number), number) if cell and not cell.wrong else ""
             for cell in (row.ours, each.best)]  # fmt: skip
    peer = f"{each.best.peer} {shown[1]}" if each.best else ""
    if each.best and each.best.computes:
        peer += "\nof another block"
    value = seconds(each.value) if entry.number == "limit" else ratio(each.value)
    return [name, what, Text(shown[0]), Text(peer), _judged(value, each.met), Text(_target(each))]


def _without(row: Row) -> str:
    """Say why peers have no numbers where none has any."""
    if any(not each.obstacle for each in row.peers):
        return ""
    return "; ".join(f"{each.peer}: {each.obstacle}" for each in row.peers)


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
        reason = each.reason if each.row is None else each.row.ours.obstacle or _without(each.row)
        return f"{each.entry.key}: {reason or 'no number'}"
    value = seconds(each.value) if each.entry.number == "limit" else ratio(each.value)
    asked = f", asked {_target(each)}" if _target(each) else ""
    return f"{each.entry.key}: {value}{asked}"
