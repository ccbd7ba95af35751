"""A file with holes as a space of architectures: what can be drawn, how many, one of them.

    file = parse(text)
    holes(file)                      what there is to decide, by name
    draw(file, Random(seed=1))       a plain file: prints, parses and checks
    size(file)                       how many there are, None where there is no end of them
    alternatives(file)               plain files in which every alternative occurs

Importing this loads neither torch nor Optuna: `headloom check` uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..grammar import syntax
from ..grammar.diagnostics import LoomError
from ..grammar.syntax import Name
from . import sizing
from .choosers import Choice, Chooser, First, Recorded
from .draw import Drawing
from .holes import contains_hole, expressions, problems
from .kinds import Grammar
from .scoping import Named, Scoping, names_in


@dataclass(frozen=True, slots=True)
class Hole:
    """Something to decide. `choices` are all of them, or the two ends of a range.

    `kind` is `category`, `integer`, `real`, or `log` for a real drawn by its logarithm.
    """

    name: str
    kind: str
    choices: tuple[Choice | float, ...]


def has_holes(file: syntax.File) -> bool:
    """Say whether anything but the search block's own settings is left open."""
    return any(
        contains_hole(expr)
        for item in file.items
        if not isinstance(item, syntax.Search)
        for expr, _ in expressions(item)
    )


def holes(file: syntax.File) -> tuple[Hole, ...]:
    """Return every hole that some draw reaches, in the order of the text.

    Raises `LoomError` (L501 to L512) for holes that cannot be filled.
    """
    found: dict[str, Hole] = {}
    for _, record in _cover(file, keep_search=True):
        for name, (kind, choices) in record.holes.items():
            found.setdefault(name, Hole(name, kind, choices))
    return tuple(found.values())


def draw(file: syntax.File, chooser: Chooser, *, keep_search: bool = False) -> syntax.File:
    """Return a plain file: no holes, no `let`s that tie draws, only what the model uses.

    The model is the one the search block names; without a search block everything stays.
    With `keep_search` the search block stays too, drawn like the rest (`search.train.lr`).
    Raises `LoomError` (L501 to L512) for holes that cannot be filled.
    """
    if found := problems(file):
        raise LoomError(found)
    search = search_of(file) if keep_search else None
    return _Filling(file, chooser).file(_roots(file), search)


def size(file: syntax.File) -> int | None:
    """Return how many architectures there are to draw; None where there is no end of them.

    Two draws that mean the same count twice, and the search block's own holes not at all.
    Raises `LoomError` (L501 to L512) for holes that cannot be filled.
    """
    if found := problems(file):
        raise LoomError(found)
    return sizing.size(Scoping(file), _roots(file), grammar_of(file))


def alternatives(file: syntax.File) -> Iterator[syntax.File]:
    """Yield plain files in which every alternative of every hole occurs at least once.

    They are as many as the alternatives added up, not multiplied; of a range come both ends, of
    `pow2` every power, of a kind every production, with the first of all that it leaves open.
    Each differs from the first in what leads to one alternative.
    Raises `LoomError` (L501 to L512) for holes that cannot be filled.
    """
    seen: set[syntax.File] = set()
    for drawn, _ in _cover(file, keep_search=False):
        if drawn not in seen:
            seen.add(drawn)
            yield drawn


def search_of(file: syntax.File) -> syntax.Search | None:
    """Return the first search block of a file."""
    return next((item for item in file.items if isinstance(item, syntax.Search)), None)


def _search_model(search: syntax.Search | None) -> str | None:
    for statement in search.body if search is not None else ():
        match statement:
            case syntax.Setting("model", Name(name)):
                return name
    return None


def _roots(file: syntax.File) -> list[Named]:
    """Return what is drawn: the model that is searched, or everything."""
    every = Scoping(file).items
    named = _search_model(search_of(file))
    return [
        each for each in every if isinstance(each, syntax.Model) and each.name == named
    ] or every


def _cover(file: syntax.File, *, keep_search: bool) -> Iterator[tuple[syntax.File, Recorded]]:
    """Draw once for the first choices, and once more for each other choice of each hole."""
    if found := problems(file):
        raise LoomError(found)
    search = search_of(file) if keep_search else None
    todo: list[dict[str, int]] = [{}]
    met: set[str] = set()
    while todo:
        record = Recorded(First(), todo.pop(0))
        filling = _Filling(file, record)
        drawn = filling.file(Scoping(file).items, search)
        path: dict[str, int] = {}
        for name, taken in record.taken.items():
            if name not in met and not filling.in_production(name):
                met.add(name)
                others = range(len(record.holes[name][1]))
                todo.extend({**path, name: index} for index in others if index != taken)
            path[name] = taken
        yield drawn, record


@lru_cache(64)
def grammar_of(file: syntax.File) -> Grammar:
    """Return the productions of a file, for its holes of a kind."""
    return Grammar(file, draw)


class _Filling:
    """Draws the items of a file, beginning with some and going on to what those use."""

    def __init__(self, file: syntax.File, chooser: Chooser) -> None:
        self._file = file
        self._scoping = Scoping(file)
        named = {each.name: tuple(p.name for p in each.params) for each in self._scoping.items}
        self._drawing = Drawing(chooser, named, grammar_of(file))

    def in_production(self, name: str) -> bool:
        """Say whether a hole stands within what a hole of a kind has become."""
        return any(name.startswith(f"{each}.") for each in self._drawing.kinds)

    def file(self, roots: list[Named], search: syntax.Search | None) -> syntax.File:
        drawn: dict[int, syntax.Item] = {}
        todo = list(roots)
        while todo:
            item = todo.pop(0)
            if id(item) not in drawn:
                drawn[id(item)] = self._item(item)
                made = self._drawing.made.values()
                found = (drawn[id(item)], *made, *self._lets(""))
                used = set[str]().union(*map(names_in, found))
                todo.extend(self._scoping.called(used))
        if search is not None:
            body = self._drawing.body(search.body, "search", self._scoping.ties)
            drawn[id(search)] = replace(search, body=body)
        items = [drawn[id(item)] for item in self._file.items if id(item) in drawn]
        models = (at for at, item in enumerate(items) if isinstance(item, syntax.Model))
        first = next(models, len(items))
        items[first:first] = self._drawing.made.values()
        return replace(self._file, items=(*self._lets(""), *items))

    def _lets(self, item: str) -> list[syntax.Let]:
        """Return the `let`s that stay, of a model or of the file: of what `once` makes one."""
        shared = self._drawing.shared.items()
        return [let for path, let in shared if path.rpartition(".")[0] == item]

    def _item(self, item: Named) -> syntax.Item:
        with self._drawing.standing_in(item):
            return self._filled(item)

    def _filled(self, item: Named) -> syntax.Item:
        draw = self._drawing
        match item:
            case syntax.Model(name, params):
                flat = self._scoping.flat(
                    item, lambda base, scope: draw.whole(base, f"{name}.base", scope)
                )
                body = draw.body(flat.body, name, flat.scope)
                return replace(
                    item,
                    params=tuple(each for each in params if each.default is None),
                    base=flat.base,
                    body=(*self._lets(name), *body),
                )
            case syntax.Block(name, params, base, body):
                scope = self._scoping.of(item)
                return replace(
                    item,
                    params=draw.parameters(params, name, scope),
                    base=None if base is None else draw.whole(base, f"{name}.base", scope),
                    body=draw.body(body, name, scope),
                )
            case syntax.Definition(kind, name, params, body):
                scope = self._scoping.of(item)
                return replace(
                    item,
                    params=draw.parameters(params, f"{kind}.{name}", scope),
                    body=draw.body(body, f"{kind}.{name}", scope),
                )
