"""How long it takes to classify the tiles of a mask, and how much is kept of it.

    python -m headloom.benchmarks.mask_tiles            a table; --json for a program
    python -m headloom.benchmarks.mask_tiles --tokens 4096 --repeat 3

Medians over the repetitions, after one that is not counted. `runs` is what is kept in memory,
9 bytes each and 8 a row.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from statistics import median
from typing import Literal

import click
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..compiler.algebra.tiles import EMPTY, FULL, PARTIAL, BlockList, classify
from ..grammar.parse import parse_expression

MASKS = {
    "causal": "j <= i",
    "window": "0 <= i - j < 4096",
    "window + sinks": "j <= i and (abs(i - j) < 4096 or j < 4)",
    "strided": "j <= i and (abs(i - j) < 128 or (i - j) % 128 == 0)",
    "blocks": "i // 4096 == j // 4096",
    "power": "ispow2(i - j) or i == j",
    "document": "j <= i and doc[i] == doc[j]",
}


def measure(name: str, tokens: int, tile: int, repeat: int) -> dict[str, object]:
    """Return the times, in milliseconds, and the counts of one mask."""
    mask = parse_expression(MASKS[name])
    ids = None
    if "doc" in MASKS[name]:  # documents of 1 to 6000 tokens
        lengths = np.random.default_rng(0).integers(1, 6000, tokens // 1000)
        ids = np.repeat(np.arange(len(lengths)), lengths)[:tokens]
        ids = np.append(ids, np.full(tokens - len(ids), len(lengths)))
    found = classify(mask, tokens, tokens, (tile, tile), documents=ids)

    def run() -> BlockList:
        return classify(mask, tokens, tokens, (tile, tile), documents=ids)

    return {
        "mask": name,
        "tokens": tokens,
        "classify_ms": _milliseconds(run, repeat),
        "transpose_ms": _milliseconds(found.transposed, repeat),
        "runs": len(found.starts),
        "full": found.count(FULL),
        "partial": found.count(PARTIAL),
        "empty": found.count(EMPTY),
        "kept": found.density,
    }


def _milliseconds(run: Callable[[], object], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return 1e3 * median(times)


@click.command()
@click.option("--tokens", multiple=True, type=int, default=(65_536, 1_000_000), show_default=True)
@click.option("--tile", default=128, show_default=True)
@click.option("--repeat", default=15, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print a list of records.")
def main(tokens: tuple[int, ...], tile: int, repeat: int, as_json: bool) -> None:
    """Time the classification of the usual masks."""
    rows = [measure(name, size, tile, repeat) for size in tokens for name in MASKS]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table(title=f"tiles of {tile} × {tile}, medians of {repeat}", box=SIMPLE)
    for column in (
        "mask",
        "tokens",
        "classify ms",
        "transpose ms",
        "runs",
        "full",
        "partial",
        "kept",
    ):
        justify: Literal["left", "right"] = "left" if column == "mask" else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["mask"]),
            f"{row['tokens']:,}",
            f"{row['classify_ms']:.1f}",
            f"{row['transpose_ms']:.1f}",
            f"{row['runs']:,}",
            f"{row['full']:,}",
            f"{row['partial']:,}",
            f"{row['kept']:.3%}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
