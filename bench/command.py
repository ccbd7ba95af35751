"""What `headloom bench` does: the cases of a file, or the standing tables."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import torch

from ..compiler.loading import load
from . import peers, table
from .case import Case
from .cells import Row
from .machine import machine
from .page import page
from .progress import Says, shown
from .run import measure
from .suite import SUITES, Entry, Standing, measured, read_suite

OF_A_FILE = ("width", "against", "tokens", "dtype", "backward", "decode", "documents", "batch",
             "optimize", "device", "memory")  # fmt: skip
OF_A_SUITE = ("budget", "fresh", "out")


def file(
    path: str,
    name: str | None,
    *,
    width: int | None,
    against: str | None,
    tokens: str,
    dtype: str,
    backward: bool,
    decode: bool,
    documents: int,
    batch: int,
    optimize: str,
    device: str | None,
    threads: int | None,
    repeats: int,
    memory: bool,
    quiet: bool,
    **_: Any,
) -> dict[str, Any]:
    """Measure a block or model of a file and print its tables; return plain data.

    Raises `LoomError`, and `ValueError` for options that cannot be.
    """
    if backward and decode:
        raise ValueError("decoding has no backward pass: leave out --backward or --decode")
    names = peers.known(against.split(",") if against else peers.DEFAULT)
    lengths = [_length(each) for each in tokens.split(",")]
    if threads is not None:
        torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = "backward" if backward else "decode" if decode else "forward"
    text = load(path).text
    rows: list[Row] = []
    with shown(quiet) as (doing, _done):
        for each in lengths:
            case = Case(text, name, each, run, width, batch, dtype, device, documents, optimize)
            rows.append(
                measure(
                    case, names, repeats=repeats, weigh=memory, says=_at(doing, f"{each:,} tokens")
                )
            )
            if not quiet:
                table.console().print(table.table(rows[-1]))
    where = machine(device)
    if not quiet:
        told = f"{where.device}\n{table.legend(rows)}"
        table.console().print(told, style="dim", markup=False)
    return {"machine": where.to_json(), "rows": [each.to_json() for each in rows]}


def _length(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"--tokens takes lengths with commas between them, not `{text}`")
    return int(text)


def _at(doing: Says, where: str) -> Says:
    return lambda text: doing(f"{where}: {text}")


def suites(
    name: str,
    *,
    threads: int | None,
    repeats: int,
    budget: float | None,
    fresh: bool,
    out: str,
    quiet: bool,
    **_: Any,
) -> list[dict[str, Any]]:
    """Measure what is missing of one table, or of all that this machine can; print them.

    Raises `ValueError` where a table needs a GPU and there is none.
    """
    on_gpu = torch.cuda.is_available()
    if name == "gpu" and not on_gpu:
        raise ValueError("the gpu suite needs a CUDA device, and there is none")
    names = [each for each in SUITES if name in (each, "all") and (on_gpu or each != "gpu")]
    found = [_suite(each, threads, repeats, budget, fresh, Path(out), quiet) for each in names]
    return [each.to_json() for each in found]


def _suite(
    name: str,
    threads: int | None,
    repeats: int,
    budget: float | None,
    fresh: bool,
    out: Path,
    quiet: bool,
) -> Standing:
    suite = read_suite(name)
    threads = threads or suite.threads
    if threads is not None:
        torch.set_num_threads(threads)
    where, today = machine("cuda" if name == "gpu" else "cpu"), date.today().isoformat()
    path = out / f"{where.slug}-{today}.json"
    with shown(quiet) as (doing, done):

        def one(entry: Entry) -> Row:
            says = _at(doing, entry.key)
            says("begun")
            return measure(
                entry.case,
                entry.against,
                repeats=repeats,
                instead=entry.instead,
                weigh=entry.weigh,
                says=says,
            )

        standing = measured(
            suite,
            where,
            path,
            one,
            date=today,
            budget=budget,
            fresh=fresh,
            ended=lambda each: done(table.line(each)),
        )
    path.with_suffix(".html").write_text(page(standing), encoding="utf-8")
    if not quiet:
        console = table.console()
        console.print(table.standing_table(standing))
        console.print(f"in {path} and {path.with_suffix('.html').name}", soft_wrap=True)
    return standing
