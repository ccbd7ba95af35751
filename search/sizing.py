"""How many architectures a space holds, exactly, without drawing them.

    let w = pow2(16..256)                                    5 widths, wherever `w` is read
    layers = each(2, choose(local(w), delta))                1 without `local`, 3 · 5 with it

A draw that is tied to a name counts once however often it is read, and not at all where it
is not reached. So each expression is counted by the set of ties it reaches: here
{∅: 1, {w}: 3}; multiplying joins the sets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from ..grammar import syntax
from ..grammar.expr import names
from ..grammar.syntax import Call, Expr, Name, Range
from .draw import Scope, Tie, deeper, within
from .holes import constant, contains_hole, expressions, is_hole, powers
from .kinds import Grammar
from .productions import Production
from .scoping import Named, Scoping

Counts = Counter[frozenset[str]]  # the ties that are reached → in how many ways
Kinds = Callable[[Call], Counts]
_MANY_SETS = 1 << 14
_NONE: frozenset[str] = frozenset()


class Endless(Exception):
    """The space has no number: a real range, or a count that depends on a draw."""


def one() -> Counts:
    return Counter({_NONE: 1})


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


def count(expr: Expr, scope: Scope, owned: frozenset[str], kinds: Kinds) -> Counts:
    """Count the draws of an expression.

    `owned` are the names that bring draws of their own, `kinds` counts a hole of a kind.
    """
    match expr:
        case Name(id) if id in scope:
            return Counter({frozenset({f"let {scope[id].path}"}): 1})
        case Name(id) if id in owned:
            return Counter({frozenset({id}): 1})
        case Call("choose", args):
            return sum((count(each, scope, owned, kinds) for each in args), Counter())
        case Call("maybe", (inner,)):
            return one() + count(inner, scope, owned, kinds)
        case Call("each", (times, inner)):
            return _repeated(times, count(inner, scope, owned, kinds))
        case Call("any"):
            return kinds(expr)
        case Call() if is_hole(expr):
            return Counter({_NONE: len(_choices(expr))})
        case Call(function):
            own: list[Counts] = []
            if function in scope or function in owned:
                own = [count(Name(function), scope, owned, kinds)]
            return together(
                [*own, *(count(each, scope, owned, kinds) for each in syntax.children(expr))]
            )
        case _:
            return together(count(each, scope, owned, kinds) for each in syntax.children(expr))


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


# ── items ────────────────────────────────────────────────────────────────────────────────


def size(scoping: Scoping, roots: list[Named], grammar: Grammar) -> int | None:
    """Return the number of draws that begin with some items; None where there is no end."""
    try:
        return _Sizing(scoping, grammar).total(frozenset(each.name for each in roots))
    except Endless:
        return None


class _Sizing:
    """Counts items, and the ties they reach, each once."""

    def __init__(self, scoping: Scoping, grammar: Grammar) -> None:
        self._scoping = scoping
        self._grammar = grammar
        self._place = grammar.place(None)
        self._of_kinds: dict[tuple[int, Call], Counts] = {}
        self._owned = frozenset(each.name for each in scoping.items)
        self._ties: dict[str, Tie] = {}
        self._known: dict[str, Counts] = {}

    def total(self, roots: frozenset[str]) -> int:
        total = 0
        todo: list[tuple[frozenset[str], frozenset[str], int]] = [(roots, _NONE, 1)]
        steps = 0
        while todo:
            names, done, ways = todo.pop()
            fresh = min(names - done, default=None)
            if fresh is None:
                total += ways
                continue
            if (steps := steps + 1) > _MANY_SETS:
                raise Endless
            for more, times in self._tied(fresh).items():
                todo.append((names | more, done | {fresh}, ways * times))
        return total

    def _tied(self, name: str) -> Counts:
        if name not in self._known:
            if name in self._ties:
                tie = self._ties[name]
                self._place = self._grammar.place(None)
                self._known[name] = self._count(tie.value, tie.scope)
            else:
                parts = [self._item(each) for each in self._scoping.called({name})]
                self._known[name] = together(parts)
        return self._known[name]

    def _count(self, expr: Expr, scope: Scope) -> Counts:
        self._ties.update({f"let {tie.path}": tie for tie in scope.values()})
        return count(expr, scope, self._owned, self._of_kind)

    def _of_kind(self, hole: Call) -> Counts:
        """Count what a hole of a kind may become, once for each depth and place."""
        key = (id(self._place), hole)
        if key not in self._of_kinds:
            productions = self._grammar.opened(hole, self._place)
            ways = (self._production(each, hole) for each in productions)
            self._of_kinds[key] = sum(ways, Counter())
        return self._of_kinds[key]

    def _production(self, production: Production, hole: Call) -> Counts:
        value = self._count(within(production.value, hole), {})
        if production.item is None:
            return value
        item = deeper(production.item, hole)
        outer, self._place = self._place, self._grammar.place(item)
        own = [self._count(each, {}) for each, _ in expressions(item)]
        self._place = outer
        return together([value, *own])

    def _item(self, item: Named) -> Counts:
        self._place = self._grammar.place(item)
        if isinstance(item, syntax.Model):
            flat = self._scoping.flat(item, _settled)
            bases = [] if flat.base is None else [flat.base]
            return together(self._count(each, flat.scope) for each in [*bases, *_values(flat.body)])
        scope = self._scoping.of(item)
        return together(self._count(each, scope) for each, _ in expressions(item))


def _settled(base: Expr, scope: Scope) -> Expr:
    """A base that is itself drawn would be another model for each draw: that is not counted."""
    if contains_hole(base) or names(base) & set(scope):
        raise Endless
    return base


def _values(body: tuple[syntax.Statement, ...]) -> list[Expr]:
    return [expr for statement in body for expr, _ in expressions(statement)]
