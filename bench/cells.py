"""What was measured, as data: a cell for each peer, a row for each case.

row.ours.seconds            the median of a run, None where its numbers are wrong
row.ratio(cell)             that peer's median over ours: above 1, ours is faster
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from .case import Case

OURS = "headloom"


@dataclass(frozen=True, slots=True)
class Cell:
    """What one peer made of a case; `reason` says why it has no numbers.

    `ready` are the seconds from the text to the end of the first run, `build` those of them
    until the module is there. `error` is relative, root mean square, against what `compared`
    says. `computes` is said where the peer computes another block, as it cannot say this one.
    """

    peer: str
    times: tuple[float, ...] = ()
    build: float | None = None
    ready: float | None = None
    error: float | None = None
    bar: float | None = None
    compared: str = ""
    memory: int | None = None
    computes: str = ""
    reason: str = ""

    @property
    def wrong(self) -> bool:
        """Whether what it computes is further from the meaning than its dtype explains."""
        return self.error is not None and self.bar is not None and not self.error <= self.bar

    @property
    def seconds(self) -> float | None:
        """The median of a run; none of a wrong one."""
        return median(self.times) if self.times and not self.wrong else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The quartiles."""
        if self.seconds is None or len(self.times) < 2:
            return None
        low, _, high = quantiles(self.times, n=4, method="inclusive")
        return low, high

    @property
    def obstacle(self) -> str:
        """Why it shows no speed, "" where it does."""
        if self.wrong:
            return f"wrong: error {self.error:.1g} over {self.bar:.0e} {self.compared}".rstrip()
        return self.reason


@dataclass(frozen=True, slots=True)
class Row:
    """A case with its cells, ours first. `ceiling` are operations a second of a product."""

    case: Case
    path: str
    flops: int
    ceiling: float
    cells: tuple[Cell, ...]

    @property
    def ours(self) -> Cell:
        return self.cells[0]

    @property
    def peers(self) -> tuple[Cell, ...]:
        return self.cells[1:]

    def ratio(self, cell: Cell) -> float | None:
        """Return a peer's median over ours."""
        return over(cell.seconds, self.ours.seconds)

    def rate(self, cell: Cell) -> float | None:
        """Return operations a second; none of a peer that computes another block."""
        known = cell.seconds is not None and self.flops and not cell.computes
        return self.flops / cell.seconds if known and cell.seconds else None

    def share(self, cell: Cell) -> float | None:
        """Return the part of the ceiling."""
        rate = self.rate(cell)
        return over(rate, self.ceiling)

    def best(self, number: str) -> Cell | None:
        """Return the peer with the smallest `seconds` or `memory`."""
        found = [
            each for each in self.peers if not each.wrong and getattr(each, number) is not None
        ]
        return min(found, key=lambda each: float(getattr(each, number)), default=None)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; `from_json` takes it back."""
        cells = [
            {
                **_kept(each),
                "median": each.seconds,
                "ratio": self.ratio(each),
                "flops_per_second": self.rate(each),
                "share_of_ceiling": self.share(each),
                "wrong": each.wrong,
            }
            for each in self.cells
        ]
        return {
            "case": asdict(self.case),
            "path": self.path,
            "flops": self.flops,
            "ceiling": self.ceiling,
            "cells": cells,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Row:
        cells = tuple(_cell(each) for each in data["cells"])
        return Row(Case(**data["case"]), data["path"], data["flops"], data["ceiling"], cells)


def _cell(data: dict[str, Any]) -> Cell:
    fields: dict[str, Any] = {name: data[name] for name in Cell.__dataclass_fields__}
    return Cell(**{**fields, "times": tuple(fields["times"])})


def _kept(cell: Cell) -> dict[str, Any]:
    """Return the fields as JSON has them: it knows no number that is not finite."""
    found = asdict(cell)
    if cell.error is not None and not math.isfinite(cell.error):
        found["error"] = 1e308
    return found


def over(theirs: float | None, ours: float | None) -> float | None:
    """Return the ratio of two numbers, None where one is missing."""
    return theirs / ours if theirs is not None and ours else None


def geometric_mean(ratios: Iterable[float]) -> float | None:
    """Return the geometric mean, None of nothing."""
    logs = [math.log(each) for each in ratios]
    return math.exp(sum(logs) / len(logs)) if logs else None
