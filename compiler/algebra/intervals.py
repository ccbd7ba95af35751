"""What values an expression takes over a rectangle of queries × keys, without visiting it.

    i in 128..255, j in 0..127          i - j            1..255, each of them
                                        (i - j) % 64     0..63, each of them
                                        i // 64          2..3, each of them

A `Value` bounds from outside (no value lies beyond `low` and `high`, and all are `low` plus
a multiple of `step`) and from inside (a `run` of so many consecutive values surely occurs).
The bounds alone prove that all or none of a rectangle is visible; the runs prove that a
rectangle has both kinds of pairs, which is what stops the search of `tiles`.

A rectangle may consist of many tiles. Whatever is said from inside then holds for *each tile*
of it: 64 residues in every tile of 128 means that a stride of 64 touches every one of them.

Bounds are kept in float64, which is exact for whole numbers below 2**52; what may go beyond,
or be no number (a root, a division by what may be zero), raises `Unknown`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LARGEST = 2.0**52
SLACK = 1e-6  # of the magnitude, for fractions: more than a float32 kernel can be off by


class Unknown(Exception):
    """Nothing can be said of an expression: it reads data, or may overflow or be no number."""


@dataclass(frozen=True, slots=True)
class Value:
    """The values of an expression over each rectangle of a batch: one entry a rectangle."""

    low: Array
    high: Array
    step: int  # all values are low + a multiple of it; 0: one value
    run: Array  # so many values, `step` apart, surely occur in every tile
    ends: Array  # low and high surely occur in every tile
    reads: frozenset[str] = frozenset()  # which names it depends on
    whole: bool = True

    @property
    def dense(self) -> Array:
        """Where every value from low to high that fits the step surely occurs."""
        return np.asarray((self.run - 1) * max(self.step, 1) >= self.high - self.low)

    def checked(self) -> Value:
        """Return the value; raise `Unknown` where float64 would not hold it exactly.

        Only a single rectangle is looked at: every proof is tried first on the one that holds
        all others, and bounds only shrink.
        """
        if self.high.size == 1 and np.max(magnitude(self)) > LARGEST:
            raise Unknown
        return self


def constant(number: float) -> Value:
    at = np.asarray(float(number))
    return Value(at, at, 0, np.asarray(1.0), np.asarray(True), whole=float(number).is_integer())


def scaled(a: Value, factor: float) -> Value:
    """Return factor · a."""
    if factor == 1:
        return a
    low, high = (a.low, a.high) if factor >= 0 else (a.high, a.low)
    if not float(factor).is_integer():
        return _rough(low * factor, high * factor, a)
    step = a.step * abs(int(factor))
    return replace(a, low=low * factor, high=high * factor, step=step).checked()


def _rough(low: Array, high: Array, *of: Value) -> Value:
    """Return bounds of which nothing but the bounds is known."""
    reads = frozenset[str]().union(*(each.reads for each in of))
    no = np.asarray(False)
    return Value(low, high, 1, np.asarray(1.0), no, reads, whole=False).checked()


def total(a: Value, b: Value) -> Value:
    """Return a + b; the inside of both is known only where they vary independently."""
    low, high = a.low + b.low, a.high + b.high
    if not (a.whole and b.whole):
        return _rough(low, high, a, b)
    free = not a.reads & b.reads
    run = _run_of_sum(a, b) if free else np.asarray(1.0)
    ends = (a.ends & b.ends & free) | (low == high)
    return Value(low, high, gcd(a.step, b.step), run, ends, a.reads | b.reads).checked()


def _run_of_sum(a: Value, b: Value) -> Array:
    """Return how many consecutive sums occur: 3 · (0..4) + (0..2) fills the gaps of the first."""
    if a.step == 0 or b.step == 0:
        return b.run if a.step == 0 else a.run
    fine, coarse = (a, b) if a.step <= b.step else (b, a)
    if coarse.step % fine.step:
        return np.asarray(1.0)
    ratio = coarse.step // fine.step
    return np.where(fine.run >= ratio, (coarse.run - 1) * ratio + fine.run, fine.run)


def widened(a: Value, magnitude: Array) -> Value:
    """Return a fraction's bounds with room for the rounding of whoever computes it."""
    return replace(a, low=a.low - SLACK * magnitude, high=a.high + SLACK * magnitude)


def magnitude(a: Value) -> Array:
    return np.maximum(np.abs(a.low), np.abs(a.high))


def product(a: Value, b: Value) -> Value:
    """Return a · b, neither of them constant."""
    corners = (a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high)
    low, high = np.minimum.reduce(corners), np.maximum.reduce(corners)
    if not (a.whole and b.whole):
        return _rough(low, high, a, b)
    ends = a.ends & b.ends & (not a.reads & b.reads)
    return Value(low, high, 1, np.ones_like(low), ends, a.reads | b.reads).checked()


def power(a: Value, exponent: int) -> Value:
    """Return a ** exponent, of a whole number and one of 1, 2, 3 …"""
    if not a.whole:
        raise Unknown
    a = absolute(a) if exponent % 2 == 0 else a
    if np.max(magnitude(a), initial=0) > LARGEST ** (1 / exponent):
        raise Unknown
    low, high = a.low**exponent, a.high**exponent
    return replace(a, low=low, high=high, step=min(a.step, 1), run=np.ones_like(low))


def absolute(a: Value) -> Value:
    straddles = (a.low < 0) & (a.high > 0)
    high = magnitude(a)
    low = np.where(straddles, 0, np.minimum(np.abs(a.low), np.abs(a.high)))
    if not a.whole:
        return _rough(low, high, a)
    if a.step > 1:
        ends = a.ends & ~straddles
        return Value(low, high, 1, np.ones_like(low), ends, a.reads)
    half = np.where(a.dense, high - low + 1, np.floor((a.run + 1) / 2))
    run = np.where(straddles, half, a.run)
    return Value(low, high, a.step, run, a.ends & (~straddles | a.dense), a.reads)


def extreme(a: Value, b: Value, pick: Any) -> Value:
    """Return min(a, b) or max(a, b): `pick` is np.minimum or np.maximum."""
    low, high = pick(a.low, b.low), pick(a.high, b.high)
    if not (a.whole and b.whole):
        return _rough(low, high, a, b)
    free = not a.reads & b.reads
    known = a.dense & b.dense & free & (max(a.step, b.step) <= 1)
    run = np.where(known, high - low + 1, 1.0)
    return Value(low, high, 1, run, a.ends & b.ends & free, a.reads | b.reads)


def either(a: Value, b: Value, always: Array, never: Array, condition: frozenset[str]) -> Value:
    """Return `where(condition, a, b)`; the condition surely holds, or not, at some rectangles."""
    low = np.where(always, a.low, np.where(never, b.low, np.minimum(a.low, b.low)))
    high = np.where(always, a.high, np.where(never, b.high, np.maximum(a.high, b.high)))
    found = _rough(low, high, a, b)
    return replace(
        found, reads=found.reads | condition, whole=a.whole and b.whole, ends=low == high
    )


def floored(a: Value, divisor: int = 1) -> Value:
    """Return a // divisor, of a whole number or a fraction."""
    low, high = np.floor(a.low / divisor), np.floor(a.high / divisor)
    if not a.whole:
        return replace(_rough(low, high, a), whole=True)
    if a.step % divisor == 0:
        return replace(a, low=low, high=high, step=a.step // divisor)
    ends = a.ends | (low == high)
    if a.step > divisor:
        return Value(low, high, 1, np.ones_like(low), ends, a.reads)
    run = np.where(a.dense, high - low + 1, np.floor((a.run - 1) * a.step / divisor) + 1)
    return Value(low, high, 1, run, ends, a.reads)


def modulo(a: Value, period: int) -> Value:
    """Return a % period.

    A run as long as the cycle of residues meets them all. A shorter one is shifted as it is
    where it does not pass a multiple of the period, and otherwise meets both ends.
    """
    if not a.whole:
        raise Unknown
    step = gcd(a.step, period)
    cycle = period // step
    turn = np.floor(a.low / period)
    shifted = (turn == np.floor(a.high / period)) & (a.run < cycle)
    first = a.low - np.floor(a.low / step) * step
    low = np.where(shifted, a.low - turn * period, first)
    high = np.where(shifted, a.high - turn * period, first + period - step)
    if a.step not in (0, step):  # 3 · i modulo 8: residues out of order
        run = np.where(a.run >= cycle, cycle, 1)
        ends = (a.run >= cycle) | (shifted & a.ends)
        return Value(low, high, step, run, ends | (low == high), a.reads)
    part = np.where(shifted, a.run, np.floor((a.run + 1) / 2))
    run = np.where(a.run >= cycle, cycle, part)
    ends = (a.run >= cycle) | np.where(shifted, a.ends, a.dense)
    return Value(low, high, step if a.step else 0, run, ends, a.reads)
