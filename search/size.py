"""How many architectures a space holds, exactly, without drawing them.

    let w = pow2(16..256)                                    5 widths, wherever `w` is read
    layers = each(2, choose(local(w), delta))                1 without `local`, 3 · 5 with it

A draw that is tied to a name counts once however often it is read, and not at all where it
is not reached. So each expression is counted by the set of ties it reaches: here
{∅: 1, {w}: 3}; multiplying joins the sets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from ..grammar import syntax
from ..grammar.syntax import Call, Expr, Name, Range
from .draw import Scope
from .holes import constant, is_hole, powers

Counts = Counter[frozenset[str]]  # the ties that are reached → in how many ways
Ties = Mapping[str, Callable[[], Counts]]

_MANY_SETS = 1 << 14
_ONE: frozenset[str] = frozenset()


class Endless(Exception):
    """The space has no number: a real range, or a count that depends on a draw."""


def one() -> Counts:
    return Counter({_ONE: 1})


def together(parts: Iterable[Counts]) -> Counts:
    """Count what is drawn side by side."""
    total = one()
    for part in parts:
        joined: Counts = Counter()
        for a, ways in total.items():
            for b, more in part.items():
                joined[a | b] += ways * more
        if len(joined) > _MANY_SETS:
            raise Endless
        total = joined
    return total


def count(expr: Expr, scope: Scope, owned: frozenset[str]) -> Counts:
    """Count the draws of an expression. `owned` are the names that bring draws of their own."""
    match expr:
        case Name(id) if id in scope:
            return Counter({frozenset({f"let {scope[id].path}"}): 1})
        case Name(id) if id in owned:
            return Counter({frozenset({id}): 1})
        case Call("choose", args):
            return sum((count(each, scope, owned) for each in args), Counter())
        case Call("maybe", (inner,)):
            return one() + count(inner, scope, owned)
        case Call("each", (times, inner)):
            return _repeated(times, count(inner, scope, owned))
        case Call() if is_hole(expr):
            return Counter({_ONE: len(_choices(expr))})
        case Call(function):
            own: list[Counts] = []
            if function in scope or function in owned:
                own = [count(Name(function), scope, owned)]
            return together([*own, *(count(each, scope, owned) for each in syntax.children(expr))])
        case _:
            return together(count(each, scope, owned) for each in syntax.children(expr))


def _repeated(times: Expr, counts: Counts) -> Counts:
    if is_hole(times) and isinstance(times, Call):
        numbers: Iterable[int] = _choices(times)
    else:
        fixed = constant(times)
        if fixed is None:
            raise Endless
        numbers = [int(fixed)]
    return sum((together([counts] * each) for each in numbers), Counter())


def _choices(hole: Call) -> range | tuple[int, ...]:
    range_ = hole.args[0] if hole.args else None
    if hole.function not in ("integer", "pow2") or not isinstance(range_, Range):
        raise Endless
    low, high = constant(range_.low), constant(range_.high)
    if low is None or high is None:
        raise Endless
    return range(int(low), int(high) + 1) if hole.function == "integer" else powers(low, high)


def closed(counts: Counts, ties: Ties) -> int:
    """Return the number of draws, those of the ties that are reached among them."""
    known: dict[str, Counts] = {}
    total = 0
    todo = [(names, _ONE, ways) for names, ways in counts.items()]
    while todo:
        names, done, ways = todo.pop()
        fresh = sorted(names - done)
        if not fresh:
            total += ways
            continue
        name = fresh[0]
        if name not in known:
            known[name] = ties[name]() if name in ties else one()
        todo.extend(
            (names | more, done | {name}, ways * times) for more, times in known[name].items()
        )
    return total
