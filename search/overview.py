"""A space at a glance: what it leaves open, how many draws there are, how large they become.

    overview(file)          what `headloom show FILE --space` prints
    growth(hole, …)         of a hole of a kind: its productions, and how many of them a draw takes

A hole of a kind is a branching process: a production has so many holes of each kind in it, on
average. Where the spectral radius of the matrix of these means is below one, draws end by
themselves; `depth` ends them in any case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..grammar import syntax
from ..grammar.show import show
from ..grammar.syntax import Call, Expr, Keyword, Number
from .draw import deeper, within
from .holes import depth_of, kind_of, open_kinds, weights_of
from .kinds import Grammar, Place
from .productions import Production
from .scoping import Scoping
from .space import Hole, grammar_of, holes, size

_Parts = dict[str, float]  # kind → how many holes of it, on average


@dataclass(frozen=True, slots=True)
class Growth:
    """A hole of a kind where it stands.

    `radius` is the spectral radius of the mean offspring, `expected` the mean number of
    productions in a draw with the hole's depth.
    """

    where: str
    hole: str
    depth: int
    productions: tuple[str, ...]
    radius: float
    expected: float


@dataclass(frozen=True, slots=True)
class Overview:
    holes: tuple[Hole, ...]
    size: int | None
    growth: tuple[Growth, ...]

    def show(self) -> str:
        """Return it as text."""
        many = "without end" if self.size is None else f"{self.size:,}"
        lines = [f"{len(self.holes)} holes, {many} draws"]
        lines += [f"  {each.name}: {_choices(each)}" for each in self.holes]
        for each in self.growth:
            lines += [
                f"{each.where}: {each.hole}",
                f"  productions: {', '.join(each.productions)}",
                f"  mean offspring: spectral radius {each.radius:.2f}; "
                f"{each.expected:.1f} productions in a draw, at most {each.depth + 1} deep",
            ]
        return "\n".join(lines)


def overview(file: syntax.File) -> Overview:
    """Return what a space is made of. Raises `LoomError` for holes that cannot be filled."""
    grammar = grammar_of(file)
    found = []
    for item in Scoping(file).items:
        place = grammar.place(item)
        for hole in dict.fromkeys(
            hole for _, expr in syntax.expressions(item) for hole in open_kinds(expr)
        ):
            found.append(growth(grammar, hole, place, item.name))
    return Overview(holes(file), size(file), tuple(found))


def growth(grammar: Grammar, hole: Call, place: Place, where: str = "") -> Growth:
    """Return how a hole of a kind grows at a place."""
    import numpy as np

    process = _Process(grammar, place)
    kinds = process.reached(_at_depth(hole, 1))
    means = np.zeros((len(kinds), len(kinds)))
    for row, each in enumerate(kinds.values()):
        for other, mean in process.offspring(each).items():
            means[row, list(kinds).index(other)] = mean
    radius = float(np.abs(np.linalg.eigvals(means)).max())
    names = tuple(each.name for each in grammar.opened(hole, place))
    return Growth(where, show(hole), depth_of(hole), names, radius, process.expected(hole))


class _Process:
    """The branching process that begins at a place."""

    def __init__(self, grammar: Grammar, place: Place) -> None:
        self._grammar = grammar
        self._place = place
        self._known: dict[Call, float] = {}

    def offspring(self, hole: Call) -> _Parts:
        """Return the mean number of holes of each kind in one production."""
        found: _Parts = {}
        for share, holes_ in self._shares(hole):
            for each, times in holes_:
                kind = kind_of(each)
                found[kind] = found.get(kind, 0.0) + share * times
        return found

    def reached(self, hole: Call) -> dict[str, Call]:
        """Return a hole of each kind that it may lead to, its own kind first."""
        found: dict[str, Call] = {}
        todo = [hole]
        while todo:
            each = todo.pop()
            if kind_of(each) not in found:
                found[kind_of(each)] = each
                todo += [_at_depth(part, 1) for _, parts in self._shares(each) for part, _ in parts]
        return found

    def expected(self, hole: Call) -> float:
        """Return the mean number of productions that a draw takes, its depth counted."""
        if hole not in self._known:
            inner = [
                share * times * self.expected(part)
                for share, parts in self._shares(hole)
                for part, times in parts
            ]
            self._known[hole] = 1 + sum(inner)
        return self._known[hole]

    def _shares(self, hole: Call) -> Iterator[tuple[float, list[tuple[Call, float]]]]:
        """Yield how often each production is drawn, and the holes in it with their numbers."""
        found = self._grammar.opened(hole, self._place)
        total = sum(each.weight for each in found)
        for each in found:
            parts = [part for expr in _exprs(each, hole) for part in _parts(expr)]
            yield each.weight / total, parts


def _exprs(production: Production, hole: Call) -> list[Expr]:
    own = () if production.item is None else syntax.expressions(deeper(production.item, hole))
    return [within(production.value, hole), *(expr for _, expr in own)]


def _parts(expr: Expr) -> Iterator[tuple[Call, float]]:
    """Yield the holes of a kind in an expression, and how often each is reached on average."""
    match expr:
        case Call("any"):
            yield expr, 1.0
            return
        case Call("choose", args):
            weights = weights_of(expr) or (1.0,) * len(args)
            shares = [
                (each, weight / sum(weights)) for each, weight in zip(args, weights, strict=True)
            ]
        case Call("maybe", (inner,)):
            shares = [(inner, 0.5)]
        case _:
            shares = [(each, 1.0) for each in syntax.children(expr)]
    for each, share in shares:
        yield from ((part, share * times) for part, times in _parts(each))


def _at_depth(hole: Call, depth: int) -> Call:
    keywords = tuple(each for each in hole.keywords if each.name != "depth")
    return Call("any", hole.args, (Keyword("depth", Number(depth)), *keywords), hole.span)


def _choices(hole: Hole) -> str:
    if hole.kind == "category":
        return " · ".join(map(str, hole.choices))
    low, high = hole.choices
    return f"{low} … {high}" + (" by its logarithm" if hole.kind == "log" else "")
