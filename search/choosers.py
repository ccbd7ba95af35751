"""Who decides what a hole becomes.

A chooser is asked by name, once for each hole that is reached: `draw` never asks about a hole
inside an alternative that was not taken. Here are the choosers that need no library; the one
that asks Optuna's trial is in `sampling`.

    >>> First().category("b.heads", ("4", "8"), ())
    0
"""

from __future__ import annotations

import random
from math import exp
from math import log as ln
from typing import Protocol

Choice = str | int


class Chooser(Protocol):
    """Answers for holes; `name` is stable and readable, such as `probe.layers[0].local.w`."""

    def category(
        self, name: str, choices: tuple[Choice, ...], weights: tuple[float, ...]
    ) -> int: ...

    def integer(self, name: str, low: int, high: int) -> int: ...

    def real(self, name: str, low: float, high: float, log: bool) -> float: ...


class First:
    """Takes the first choice and the low end of every range."""

    def category(self, name: str, choices: tuple[Choice, ...], weights: tuple[float, ...]) -> int:  # noqa: ARG002
        return 0

    def integer(self, name: str, low: int, high: int) -> int:  # noqa: ARG002
        return low

    def real(self, name: str, low: float, high: float, log: bool) -> float:  # noqa: ARG002
        return low


class Random:
    """Draws each hole from its own stream of numbers, so that the order of asking is nothing.

    The stream depends on the seed and the hole's name alone: a draw that was interrupted and
    goes on elsewhere ends in the same architecture.
    """

    def __init__(self, seed: int | str = 0) -> None:
        self._seed = seed

    def _numbers(self, name: str) -> random.Random:
        return random.Random(f"{self._seed}:{name}")

    def category(self, name: str, choices: tuple[Choice, ...], weights: tuple[float, ...]) -> int:
        indices = range(len(choices))
        return self._numbers(name).choices(indices, weights or None)[0]

    def integer(self, name: str, low: int, high: int) -> int:
        return self._numbers(name).randint(low, high)

    def real(self, name: str, low: float, high: float, log: bool) -> float:
        numbers = self._numbers(name)
        value = exp(numbers.uniform(ln(low), ln(high))) if log else numbers.uniform(low, high)
        return min(max(value, low), high)


class Recorded:
    """Asks another chooser and remembers: `holes` maps each name to how many choices it has.

    `forced` answers the categories it names, so that `alternatives` can reach a hole again.
    """

    def __init__(self, chooser: Chooser, forced: dict[str, int] | None = None) -> None:
        self._chooser = chooser
        self._forced = forced or {}
        self.taken: dict[str, int] = {}
        self.holes: dict[str, tuple[str, tuple[Choice | float, ...]]] = {}

    def category(self, name: str, choices: tuple[Choice, ...], weights: tuple[float, ...]) -> int:
        self.holes[name] = ("category", choices)
        index = self._forced.get(name)
        if index is None:
            index = self._chooser.category(name, choices, weights)
        self.taken[name] = index
        return index

    def integer(self, name: str, low: int, high: int) -> int:
        return (low, high)[self._end("integer", name, low, high)]

    def real(self, name: str, low: float, high: float, log: bool) -> float:
        return (low, high)[self._end("log" if log else "real", name, low, high)]

    def _end(self, kind: str, name: str, low: float, high: float) -> int:
        self.holes[name] = (kind, (low, high))
        self.taken[name] = self._forced.get(name, 0)
        return self.taken[name]
