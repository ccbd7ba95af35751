"""Which thresholds can be found, and whether they move with the logits.

    relu(s - tau)                   found on s less the largest of its row
    relu(0.5 * s - tau) ** 2        likewise: tau moves half as far
    relu(s + tau)                   it rises; with -tau for tau it falls, as all others
    relu(g[j] * s - tau)            found on s as it is, in float64
    exp(s) * tau                    `Unclear`: s stands apart from tau
    relu(s - tau) ** -2             `Unclear`: it is infinite where relu(s - tau) is 0

A numerator is taken whose row sum passes 1 once for any logits: it rises or falls with tau
everywhere, s stands beside tau alone (in c · s + d · tau, or f(s) + d · tau), and its limits
are 0 (or less) and 1 (or more). What is c · s + d · tau throughout does not change where s
loses a number of the row: tau, which nothing else reads, makes up for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...grammar.derive import derivative
from ...grammar.expr import fold, names, rebuild, substitute
from ...grammar.ranges import INF, LENGTHS, Range, between
from ...grammar.syntax import Binary, Call, Compare, Expr, Name, Number, Unary, children
from ..model import Normalizer
from .trends import Unclear, trend

_S, _TAU = Name("s"), Name("tau")
_ZERO, _ONE = Number(0), Number(1)


@dataclass(frozen=True, slots=True)
class Threshold:
    """A numerator that falls as tau grows, and its derivative by tau.

    `moves` says that it is the same where s loses a number of its row and tau what goes with it.
    """

    numerator: Expr
    slope: Expr
    moves: bool


def threshold(normalizer: Normalizer) -> Threshold:
    """Return the threshold form of a normaliser that has one (`require` holds)."""
    numerator = normalizer.numerator
    moves = _moves(numerator)
    if trend(numerator, "tau") > 0:
        numerator = fold(substitute(numerator, {"tau": Unary("-", _TAU)}))
    numerator = _level(numerator)
    return Threshold(numerator, derivative(numerator, _TAU), moves)


def _level(expr: Expr) -> Expr:
    """Write relu(x) ** 0.5, which is infinitely steep at 0, so that its derivatives are 0 there."""
    expr = rebuild(expr, _level)
    match expr:
        case Binary("**", Call("relu", (arg,)), Number(power)) if power >= 1:
            return expr
        case Binary("**", Call("relu", (arg,)), power) if not names(power) & {"s", "tau"}:
            pass
        case Call("sqrt", (Call("relu", (arg,)),)):
            power = Number(0.5)
        case _:
            return expr
    inside = Compare((arg, _ZERO), (">",))
    part = Binary("**", Call("where", (inside, arg, _ONE)), power)
    return Call("where", (inside, part, _ZERO))


def require(numerator: Expr) -> None:
    """Raise `Unclear` for a numerator whose row sum may not pass 1, or more than once."""
    rises = trend(numerator, "tau")
    beside = list(_beside(numerator))
    if not rises:
        raise Unclear(numerator, "`tau` changes nothing")
    ends = {}
    for sign in (1, -1):  # where tau is so far up or down that the numerator is at its end
        far = ((each, sign * rises * trend(each, "tau") * INF) for each in beside)
        ends[sign] = between(numerator, {**LENGTHS, **{each: Range(at, at) for each, at in far}})
    if ends[-1].high > 0:
        raise Unclear(numerator, "it may stay above 0, whatever `tau` is")
    if ends[1].low < 1:
        raise Unclear(numerator, "it may stay below 1, whatever `tau` is")


@dataclass(frozen=True, slots=True)
class _Affine:
    """s · a number + tau · a number + the rest; `s` None: the rest reads s in another way."""

    s: Expr | None
    tau: Expr


def _beside(expr: Expr) -> Iterator[Expr]:
    """Yield the parts in which s and tau stand together, affine in tau (`Unclear`)."""
    reads = names(expr) & {"s", "tau"}
    if not reads:
        return
    found = _affine(expr)
    if found is not None and "tau" in reads and not reads & names(found.tau):
        yield expr
    elif reads == {"s"} or isinstance(expr, Name):
        raise Unclear(expr, "`s` stands apart from `tau`")
    else:
        for each in children(expr):
            yield from _beside(each)


def _affine(expr: Expr) -> _Affine | None:
    """Return the numbers of s and tau in an expression, or None where it is not affine in tau."""
    reads = names(expr)
    match expr:
        case Name("s"):
            return _Affine(_ONE, _ZERO)
        case Name("tau"):
            return _Affine(_ZERO, _ONE)
        case Unary("-", operand):
            return _times(_affine(operand), Number(-1))
        case Binary("+", left, right):
            return _plus(_affine(left), _affine(right))
        case Binary("-", left, right):
            return _plus(_affine(left), _times(_affine(right), Number(-1)))
        case Binary("*", left, right) if not names(left) & {"s", "tau"}:
            return _times(_affine(right), left)
        case Binary("*", left, right) if not names(right) & {"s", "tau"}:
            return _times(_affine(left), right)
        case Binary("/", left, right) if not names(right) & {"s", "tau"}:
            return _times(_affine(left), Binary("/", _ONE, right))
    if "tau" in reads:
        return None
    return _Affine(None if "s" in reads else _ZERO, _ZERO)


def _plus(a: _Affine | None, b: _Affine | None) -> _Affine | None:
    if a is None or b is None:
        return None
    s = None if a.s is None or b.s is None else fold(Binary("+", a.s, b.s))
    return _Affine(s, fold(Binary("+", a.tau, b.tau)))


def _times(a: _Affine | None, factor: Expr) -> _Affine | None:
    if a is None:
        return None
    s = None if a.s is None else fold(Binary("*", factor, a.s))
    return _Affine(s, fold(Binary("*", factor, a.tau)))


def _moves(numerator: Expr) -> bool:
    ratios = set()
    for each in _beside(numerator):
        found = _affine(each)
        assert found is not None
        if found.s is None:
            return False
        ratios.add(fold(Binary("/", found.s, found.tau)))
    return len(ratios) == 1 and "j" not in names(ratios.pop())
