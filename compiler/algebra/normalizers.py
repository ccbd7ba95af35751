"""Finding out algebraically what kind of normaliser an expression is.

    exp(s) / sum                       exponential, nothing added
    exp(s) / (exp(z[h]) + sum)         exponential, the logit z[h] added
    exp(2 * s) / (1 + sum)             exponential in 2 * s, the logit 0 added
    exp(s) / (2 + sum - 1)             likewise
    exp(s) / detach(sum)               exponential, its denominator held constant
    exp(s) / max(sum, 1)               exponential, its denominator 1 at least
    relu(s) ** 2 / sum                 ratio
    relu(s - tau) where sum == 1       threshold

An exponential normaliser can be computed with a running maximum: what is added to the sum
takes part in it as one more logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ...grammar.expr import fold, names, number
from ...grammar.syntax import Binary, Call, Expr, Name, Number
from ..model import Normalizer


@dataclass(frozen=True, slots=True)
class Exponential:
    """p = exp(logit) / (sum + exp(extra)); `extra` None adds nothing.

    `held`, where there is one, is what becomes of the denominator's logarithm `lse`.
    """

    logit: Expr
    extra: Expr | None = None
    held: Expr | None = None

    @property
    def is_softmax(self) -> bool:
        return self.logit == Name("s") and self.extra is None and self.held is None


def exponential(normalizer: Normalizer) -> Exponential | None:
    """Return the exponential form of a normaliser, or None where it has none."""
    if normalizer.where is not None or normalizer.denominator is None:
        return None
    match normalizer.numerator:
        case Call("exp", (logit,)):
            pass
        case _:
            return None
    match normalizer.denominator:
        case Call("detach", (inner,)):
            return _held(normalizer, inner, lambda lse: Call("detach", (lse,)))
        case Call("max", (inner, Number(value))) | Call("max", (Number(value), inner)) if value > 0:
            least = Number(math.log(value), repr(math.log(value)))
            return _held(normalizer, inner, lambda lse: Call("max", (lse, least)))
    terms = _terms(normalizer.denominator)
    added = [term for term in terms if term != Name("sum")]
    if len(added) != len(terms) - 1 or any("sum" in names(term) for term in added):
        return None
    if any({"s", "j"} & names(term) for term in added):
        return None
    if not added:
        return Exponential(logit)
    logs = [_log(term) for term in added]
    if any(log is None for log in logs):
        return None
    if len(added) == 1:
        return Exponential(logit, logs[0])
    total = added[0]
    for term in added[1:]:
        total = Binary("+", total, term)
    return Exponential(logit, Call("log", (total,)))


def _held(normalizer: Normalizer, inner: Expr, hold: Callable[[Expr], Expr]) -> Exponential | None:
    """Return the form of a normaliser whose denominator is held in some way."""
    form = exponential(replace(normalizer, denominator=inner))
    if form is None:
        return None
    return replace(form, held=hold(form.held or Name("lse")))


def _terms(expr: Expr) -> list[Expr]:
    """Return the terms of a sum, its numbers as one: 1 + sum + 2 is 3 + sum."""
    terms = list(_apart(expr))
    numbers = [each.value for each in terms if isinstance(each, Number)]
    if len(numbers) < 2:
        return terms
    first = next(at for at, each in enumerate(terms) if isinstance(each, Number))
    done: list[Expr] = [each for each in terms if not isinstance(each, Number)]
    return [*done[:first], number(sum(numbers)), *done[first:]] if sum(numbers) else done


def _apart(expr: Expr) -> Iterator[Expr]:
    match expr:
        case Binary("+", left, right):
            yield from _apart(left)
            yield from _apart(right)
        case Binary("-", left, Number(value)):
            yield from _apart(left)
            yield number(-value)
        case _:
            yield expr


def _log(term: Expr) -> Expr | None:
    """Return the logarithm of a term that is certainly positive."""
    match term:
        case Number(value) if value > 0:
            return Number(math.log(value), repr(math.log(value)))
        case Call("exp", (inner,)):
            return inner
        case Binary("*", Number(value), Call("exp", (inner,))) if value > 0:
            return fold(Binary("+", inner, Number(math.log(value))))
    return None
