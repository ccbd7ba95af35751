"""What of a mask can be proved over a rectangle of queries × keys.

    causal and (window(256) or sink(4))     over i in 128..255, j in 0..127
      maybe_false: no                       so every pair is visible

A comparison becomes one linear form against a constant (`i // 8 == j // 8` is
`i // 8 - j // 8 == 0`), so that what both sides share cancels; its values come from
`intervals`. What reads data is taken for true in one proof (`optimistic`: nothing beyond it is
visible) and for false in another (nothing within it is hidden).

This is not a domain of `grammar/domain.py`: a mask is read once and proved over many batches
of rectangles, and an operation of two sides needs their common terms, not their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from math import isfinite
from typing import final

import numpy as np

from ...grammar.expr import names
from ...grammar.syntax import Binary, Call, Compare, Expr, Index, Name, Number, Unary, walk
from . import intervals
from .intervals import Array, Unknown, Value
from .masks import FINEST, affine

Rects = Mapping[str, Value]  # a batch of rectangles: the values of `i`, `j`, or other names


@dataclass(frozen=True, slots=True)
class Facts:
    """What holds over each rectangle: may a pair be true, or false; has *every tile* one?"""

    maybe_true: Array
    maybe_false: Array
    has_true: Array
    has_false: Array


def negated(a: Facts) -> Facts:
    return Facts(a.maybe_false, a.maybe_true, a.has_false, a.has_true)


def both(a: Facts, b: Facts) -> Facts:
    return Facts(
        a.maybe_true & b.maybe_true,
        a.maybe_false | b.maybe_false,
        (a.has_true & ~b.maybe_false) | (b.has_true & ~a.maybe_false),
        a.has_false | b.has_false,
    )


def one_of(a: Facts, b: Facts) -> Facts:
    return negated(both(negated(a), negated(b)))


def settled(truth: bool) -> Facts:
    yes, no = np.asarray(True), np.asarray(False)
    return Facts(yes, no, yes, no) if truth else Facts(no, yes, no, yes)


def _facts(maybe_true: Array, maybe_false: Array, has_true: Array, has_false: Array) -> Facts:
    """Return the facts, with what follows: where nothing may be false all is true."""
    return Facts(maybe_true, maybe_false, has_true | ~maybe_false, has_false | ~maybe_true)


# ── data given at call time ──────────────────────────────────────────────────────────────


@final
class Segments:
    """The least and greatest segment id between two positions, in constant time.

    Sorted ids are read off at both ends. Others come from a table of the extremes of 2**k
    blocks of `unit` tokens, rounded outwards.
    """

    def __init__(self, ids: Array, unit: int, ranked: bool) -> None:
        grows = ids[1:] > ids[:-1]
        self.size, self.unit = len(ids), unit
        self.sorted = bool(np.all(grows | (ids[1:] == ids[:-1])))
        self.ranked = ranked and self.sorted  # then each range of ranks has no gaps
        self.ids = ids
        if self.ranked:
            self.ids = np.zeros(self.size, np.int64)
            np.cumsum(grows, out=self.ids[1:])
        self.levels: list[tuple[Array, Array]] = []
        if not self.sorted:
            starts = np.arange(0, self.size, unit)
            low, high = (f.reduceat(ids, starts) for f in (np.minimum, np.maximum))
            while True:
                self.levels.append((low, high))
                half = 1 << (len(self.levels) - 1)
                if len(low) <= half:
                    break
                low = np.minimum(low[:-half], low[half:])
                high = np.maximum(high[:-half], high[half:])

    def over(self, place: Value) -> Value:
        """Return the ids of the tokens at some positions."""
        first, last = place.low.astype(np.int64), place.high.astype(np.int64)
        if self.sorted:
            low, high = (self.ids[each].astype(np.float64) for each in (first, last))
            ends = place.ends
        else:
            low, high = self._extremes(first // self.unit, last // self.unit)
            ends = place.ends & (first % self.unit == 0)
            ends &= ((last + 1) % self.unit == 0) | (last == self.size - 1)
        run = np.where(place.ends, high - low + 1, 1.0) if self.ranked else np.ones_like(low)
        return Value(low, high, 1, run, ends, place.reads)

    def _extremes(self, first: Array, last: Array) -> tuple[Array, Array]:
        low, high = np.empty(first.shape), np.empty(first.shape)
        level = np.frexp((last - first + 1).astype(np.float64))[1] - 1
        for k in np.unique(level):
            at = level == k
            a, b = first[at], last[at] + 1 - (1 << int(k))
            least, most = self.levels[k]
            low[at] = np.minimum(least[a], least[b])
            high[at] = np.maximum(most[a], most[b])
        return low, high


def compares_ids_alone(mask: Expr) -> bool:
    """Whether segment ids meet nothing but each other, so that only their order matters."""
    plain = sum(
        all(isinstance(each, Index) and each.base == Name("doc") for each in node.operands)
        and len(node.operands)
        for node in walk(mask)
        if isinstance(node, Compare)
    )
    return plain == sum(isinstance(node, Index) and node.base == Name("doc") for node in walk(mask))


# ── expressions ──────────────────────────────────────────────────────────────────────────


@final
class Prover:
    """Turns a mask into a function from rectangles to facts; `n`, `m` and `h` are numbers in it.

    `domain` is the one rectangle that holds all others: what may overflow on it is unknown.
    `blind` says whether anything in the mask was.
    """

    def __init__(self, mask: Expr, domain: Rects, segments: Segments | None, optimistic: bool):
        self.segments, self.domain, self.blind = segments, domain, False
        self.prove = self._truth(mask, optimistic)

    def _truth(self, expr: Expr, optimistic: bool) -> Callable[[Rects], Facts]:
        match expr:
            case Name("true" | "false" as id):
                facts = settled(id == "true")
                return lambda _: facts
            case Unary("not", operand):
                inner = self._truth(operand, not optimistic)
                return lambda at: negated(inner(at))
            case Binary("and" | "or" as op, left, right):
                a, b = self._truth(left, optimistic), self._truth(right, optimistic)
                join = both if op == "and" else one_of
                return lambda at: join(a(at), b(at))
            case Call("where", (condition, yes, no)):
                chosen = Binary(
                    "or", Binary("and", condition, yes), Binary("and", Unary("not", condition), no)
                )
                return self._truth(chosen, optimistic)
        try:
            proof = self._atomic(expr)
            proof(self.domain)
            return proof
        except Unknown:
            self.blind = True
            facts = settled(optimistic)
            return lambda _: facts

    def _atomic(self, expr: Expr) -> Callable[[Rects], Facts]:
        match expr:
            case Compare((left, right), (op,)):
                return self._comparison(op, left, right)
            case Compare(operands, ops):
                pairs = zip(ops, operands, operands[1:], strict=False)
                parts = [self._comparison(*each) for each in pairs]

                def chain(at: Rects) -> Facts:
                    facts = parts[0](at)
                    for part in parts[1:]:
                        facts = both(facts, part(at))
                    return facts

                return chain
            case Call("ispow2", (argument,)):
                value = self._value(argument)
                return lambda at: _is_power(value(at))
        raise Unknown

    def _comparison(self, op: str, left: Expr, right: Expr) -> Callable[[Rects], Facts]:
        if op in (">", ">=", "!="):
            inner = self._comparison({">": "<=", ">=": "<", "!=": "=="}[op], left, right)
            return lambda at: negated(inner(at))
        terms, c = affine(Binary("-", left, right))
        if not all(map(isfinite, (c, *terms.values()))):
            raise Unknown
        scale = max(float(each).as_integer_ratio()[1] for each in (c, *terms.values()))
        if scale <= FINEST:
            terms, c = {key: int(each * scale) for key, each in terms.items()}, int(c * scale)
        value = self._sum(terms, c)
        if op == "==":
            return lambda at: _is_zero(value(at))
        return lambda at: _is_below(value(at), or_zero=op == "<=")

    def _value(self, expr: Expr) -> Callable[[Rects], Value]:
        return self._sum(*affine(expr))

    def _sum(self, terms: dict[Expr, int | float], c: int | float) -> Callable[[Rects], Value]:
        parts = [(factor, self._term(each)) for each, factor in terms.items()]

        def value(at: Rects) -> Value:
            each = [intervals.scaled(part(at), factor) for factor, part in parts]
            if c or not each:
                each.append(intervals.constant(c))
            found = reduce(intervals.total, each)
            if found.whole or not parts:
                return found
            return intervals.widened(found, sum(map(intervals.magnitude, each), np.zeros(())))

        return value

    def _term(self, expr: Expr) -> Callable[[Rects], Value]:
        """Return the values of what is no sum."""
        match expr:
            case Name(id) if id in self.domain:
                return lambda at: at[id]
            case Index(Name("doc"), (Name("i" | "j" as id),)) if segments := self.segments:
                return lambda at: segments.over(at[id])
            case Binary("//" | "%" as op, left, Number(by)) if by >= 1 and float(by).is_integer():
                act, size = intervals.floored if op == "//" else intervals.modulo, int(by)
                inner = self._value(left)
                return lambda at: act(inner(at), size)
            case Binary("*", left, right):
                one, two = self._value(left), self._value(right)
                return lambda at: intervals.product(one(at), two(at))
            case Binary("**", left, Number(int() as exponent)) if 1 <= exponent <= 8:
                inner = self._value(left)
                return lambda at: intervals.power(inner(at), exponent)
            case Call(function, args):
                return self._call(function, args)
        raise Unknown

    def _call(self, function: str, args: tuple[Expr, ...]) -> Callable[[Rects], Value]:
        match function, args:
            case "abs", (argument,):
                inner = self._value(argument)
                return lambda at: intervals.absolute(inner(at))
            case "floor", (Binary("/", left, Number(int() as by)),) if by >= 1:
                return self._term(Binary("//", left, Number(by)))
            case "floor", (argument,):
                inner = self._value(argument)
                return lambda at: intervals.floored(inner(at))
            case "min" | "max", (left, right):
                one, two = self._value(left), self._value(right)
                pick = np.minimum if function == "min" else np.maximum
                return lambda at: intervals.extreme(one(at), two(at), pick)
            case "clip", (argument, low, high):
                return self._value(Call("min", (Call("max", (argument, low)), high)))
            case "where", (condition, yes, no):
                one, two = self._value(yes), self._value(no)
                reads = frozenset(names(condition) & self.domain.keys())
                most, least = self._truth(condition, True), self._truth(condition, False)

                def chosen(at: Rects) -> Value:
                    always, never = ~least(at).maybe_false, ~most(at).maybe_true
                    return intervals.either(one(at), two(at), always, never, reads)

                return chosen
        raise Unknown


def _is_zero(a: Value) -> Facts:
    maybe = (a.low <= 0) & (a.high >= 0)
    if not a.whole:
        none = np.zeros_like(maybe)
        return _facts(maybe, ~none, none, none)
    if a.step > 1:
        maybe &= np.mod(a.low, a.step) == 0
    other = (a.low != 0) | (a.high != 0)
    met = (maybe & a.dense) | (a.ends & ((a.low == 0) | (a.high == 0)))
    return _facts(maybe, other, met, other & (a.ends | (a.dense & (a.high > a.low))))


def _is_below(a: Value, or_zero: bool) -> Facts:
    if or_zero:
        maybe_true, maybe_false = a.low <= 0, a.high > 0
    else:
        maybe_true, maybe_false = a.low < 0, a.high >= 0
    known = (a.ends | a.dense) if a.whole else np.zeros_like(maybe_true)
    return _facts(maybe_true, maybe_false, maybe_true & known, maybe_false & known)


def _is_power(a: Value) -> Facts:
    """Whether a power of two lies between low and high: the greatest up to high, if any."""
    if not a.whole:
        raise Unknown
    greatest = np.ldexp(0.5, np.frexp(np.maximum(a.high, 0.5))[1])
    maybe = greatest >= np.maximum(a.low, 1)
    single = (a.low == a.high) & maybe & (greatest == a.low)
    dense = a.dense if a.step <= 1 else a.low == a.high
    other = (a.run >= 3) & (a.step <= 1)  # of three consecutive numbers one is no power
    return _facts(maybe, ~single, maybe & dense, other | (a.ends & (a.low < 1)))
