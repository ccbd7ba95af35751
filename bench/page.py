"""A suite as a page of its own: bars for every peer, what was asked and what was measured."""

from __future__ import annotations

from html import escape

from .case import SHOWN
from .cells import Cell, Row
from .suite import Measured, Standing
from .table import rate, ratio, seconds, size, value

_HEAD = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 1rem }}
h2 {{ font-size: 1.05rem; margin: 1.8rem 0 .3rem }} .dim {{ color: #667 }}
.met {{ color: #176b36 }} .missed {{ color: #a3241b }}
.bar {{ display: grid; grid-template-columns: 8rem 1fr; gap: .6rem; align-items: center }}
.bar i {{ display: inline-block; height: .9em; background: #9aa7b8; vertical-align: -.1em }}
.bar.ours i {{ background: #2f6fbd }} .bar span {{ margin-left: .4rem }}
table {{ border-collapse: collapse }} td, th {{ padding: .1rem .8rem .1rem 0; text-align: left }}
</style></head><body>
"""


def page(standing: Standing) -> str:
    """Return the page as HTML."""
    machine = standing.machine
    title = f"headloom, {standing.suite.name}: {machine.device}"
    versions = ", ".join(f"{name} {found}" for name, found in machine.versions)
    parts = [
        _HEAD.format(title=escape(title)),
        f"<h1>{escape(title)}</h1><p>{escape(standing.suite.about)}</p>",
        f'<p class="dim">{escape(standing.date)}; {escape(versions)}. Medians of interleaved runs; '
        "a ratio is the best peer over ours, above 1 ours is faster. Rates count the pairs that "
        "see each other. Errors are root mean square, relative, against the dense meaning.</p>",
        _groups(standing),
        *(_row(each) for each in standing.rows),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _groups(standing: Standing) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{ratio(standing.group(name)) or 'not yet'}</td>"
        f"<td>{target:g}</td></tr>"
        for name, target in standing.suite.groups.items()
    )
    if not rows:
        return ""
    return (
        f"<table><tr><th>geometric mean of</th><th>measured</th><th>asked</th></tr>{rows}</table>"
    )


def _row(each: Measured) -> str:
    entry = each.entry
    head = f"<h2>{escape(entry.title)}, {entry.case.tokens:,} tokens, {SHOWN[entry.case.run]}</h2>"
    if each.row is None:
        return f'{head}<p class="dim">{escape(each.reason)}</p>'
    memory = entry.number == "memory"
    most = max((_length(cell, memory) for cell in each.row.cells), default=0.0)
    bars = "".join(_bar(each.row, cell, memory, most) for cell in each.row.cells)
    return f"{head}{_judged(each)}{bars}"


def _judged(each: Measured) -> str:
    if each.value is None:
        return ""
    limit = each.entry.number == "limit"
    asked = "" if each.entry.target is None else f", asked {each.entry.target:g}{' s' * limit}"
    kind = {True: "met", False: "missed", None: "dim"}[each.met]
    return f'<p class="{kind}">{value(each)}{asked}</p>'


def _length(cell: Cell, memory: bool) -> float:
    return float((None if cell.obstacle else cell.memory if memory else cell.seconds) or 0)


def _bar(row: Row, cell: Cell, memory: bool, most: float) -> str:
    kind = "bar ours" if cell is row.ours else "bar"
    if cell.obstacle:
        told = f'<span class="dim">{escape(cell.obstacle)}</span>'
    else:
        share = 100 * _length(cell, memory) / most if most else 0
        told = f'<i style="width: {0.7 * share:.1f}%"></i><span>{escape(_told(row, cell))}</span>'
    name = cell.peer + (" of another block" if cell.computes else "")
    return f'<div class="{kind}"><div>{escape(name)}</div><div>{told}</div></div>'


def _told(row: Row, cell: Cell) -> str:
    over = "" if cell is row.ours else f"{ratio(row.ratio(cell))} ×"
    error = "" if cell.error is None else f"error {cell.error:.0e}"
    parts = (seconds(cell.seconds), over, rate(row.rate(cell)), size(cell.memory), error)
    return ", ".join(each for each in parts if each)
