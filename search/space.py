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

from ..grammar import syntax
from ..grammar.diagnostics import LoomError
from ..grammar.syntax import Call, Expr, Name
from .choosers import Choice, Chooser, First, Recorded
from .draw import Drawing, Tie
from .holes import contains_hole, expressions, problems

Named = syntax.Block | syntax.Model | syntax.Definition


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
    search = search_of(file)
    named = _search_model(search)
    every = _named(file)
    roots: list[Named] = [each for each in every if isinstance(each, syntax.Model) and each.name == named]
    return _Filling(file, chooser).file(roots or every, search if keep_search else None)


def alternatives(file: syntax.File) -> Iterator[syntax.File]:
    """Yield plain files in which every alternative of every hole occurs at least once.

    They are as many as the alternatives added up, not multiplied; of a range come both ends,
    of `pow2` every power. Each differs from the first in what leads to one alternative.
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


def _named(file: syntax.File) -> list[Named]:
    return [
        item
        for item in file.items
        if isinstance(item, syntax.Block | syntax.Model | syntax.Definition)
    ]


def _cover(file: syntax.File, *, keep_search: bool) -> Iterator[tuple[syntax.File, Recorded]]:
    """Draw once for the first choices, and once more for each other choice of each hole."""
    if found := problems(file):
        raise LoomError(found)
    search = search_of(file) if keep_search else None
    todo: list[dict[str, int]] = [{}]
    met: set[str] = set()
    while todo:
        record = Recorded(First(), todo.pop(0))
        drawn = _Filling(file, record).file(_named(file), search)
        path: dict[str, int] = {}
        for name, taken in record.taken.items():
            if name not in met:
                met.add(name)
                others = range(len(record.holes[name][1]))
                todo.extend({**path, name: index} for index in others if index != taken)
            path[name] = taken
        yield drawn, record


class _Filling:
    """Draws the items of a file, beginning with some and going on to what those use."""

    def __init__(self, file: syntax.File, chooser: Chooser) -> None:
        self._file = file
        self._items = _named(file)
        named = {each.name: tuple(p.name for p in each.params) for each in self._items}
        self._drawing = Drawing(chooser, named)
        self._ties: dict[str, Tie] = {}
        for item in file.items:
            if isinstance(item, syntax.Let):
                self._ties[item.name] = Tie(item.name, item.value, self._ties)

    def file(self, roots: list[Named], search: syntax.Search | None) -> syntax.File:
        drawn: dict[int, syntax.Item] = {}
        todo = list(roots)
        while todo:
            item = todo.pop(0)
            if id(item) in drawn:
                continue
            drawn[id(item)] = self._item(item)
            used = _names(drawn[id(item)])
            todo.extend(each for each in self._items if each.name in used)
        if search is not None:
            body = self._drawing.body(search.body, "search", self._ties)
            drawn[id(search)] = replace(search, body=body)
        items = tuple(drawn[id(item)] for item in self._file.items if id(item) in drawn)
        return replace(self._file, items=items)

    def _item(self, item: Named) -> syntax.Item:
        match item:
            case syntax.Model():
                return self._model(item)
            case syntax.Block(name, params, base, body):
                hidden = {each.name for each in params} | _declared(body)
                scope = {key: tie for key, tie in self._ties.items() if key not in hidden}
                return replace(
                    item,
                    params=self._drawing.parameters(params, name, scope),
                    base=None if base is None else self._drawing.whole(base, f"{name}.base", scope),
                    body=self._drawing.body(body, name, scope),
                )
            case syntax.Definition(kind, name, params, body):
                hidden = {each.name for each in params} | _declared(body)
                scope = {key: tie for key, tie in self._ties.items() if key not in hidden}
                path = f"{kind}.{name}"
                return replace(
                    item,
                    params=self._drawing.parameters(params, path, scope),
                    body=self._drawing.body(body, path, scope),
                )

    # A model's `let`s are ties, and a model that inherits may change them; so models are
    # drawn with what they inherit written out.

    def _model(self, model: syntax.Model) -> syntax.Model:
        scope = dict(self._ties)
        settings: dict[str, syntax.Statement] = {}
        base = self._inherit(model, model.name, scope, settings, [])
        body = self._drawing.body(tuple(settings.values()), model.name, scope)
        params = tuple(each for each in model.params if each.default is None)
        return replace(model, params=params, base=base, body=body)

    def _inherit(
        self,
        model: syntax.Model,
        path: str,
        scope: dict[str, Tie],
        settings: dict[str, syntax.Statement],
        below: list[str],
    ) -> Expr | None:
        """Collect ties and settings, the base's first; return a base that is not in the file."""
        base = model.base
        if base is not None:
            base = self._drawing.whole(base, f"{path}.base", scope)
            parent = self._parent(base)
            if parent is not None and parent.name not in [*below, model.name]:
                self._inherit(parent, path, scope, settings, [*below, model.name])
                self._bind(parent, base, path, scope)
                base = None
        for each in model.params:
            if each.default is not None:
                scope[each.name] = Tie(f"{path}.{each.name}", each.default, scope)
        for statement in model.body:
            if isinstance(statement, syntax.Let):
                name = statement.name
                scope[name] = Tie(f"{path}.{name}", statement.value, scope)
            else:
                key = (
                    statement.name if isinstance(statement, syntax.Setting) else str(id(statement))
                )
                settings.pop(key, None)
                settings[key] = statement
        return base

    def _parent(self, base: Expr) -> syntax.Model | None:
        name = base.id if isinstance(base, Name) else getattr(base, "function", None)
        models = (each for each in self._items if isinstance(each, syntax.Model))
        return next((each for each in models if each.name == name), None)

    def _bind(self, parent: syntax.Model, base: Expr, path: str, scope: dict[str, Tie]) -> None:
        if not isinstance(base, Call):
            return
        given = dict(zip((each.name for each in parent.params), base.args, strict=False))
        given |= {each.name: each.value for each in base.keywords}
        for name, value in given.items():
            scope[name] = Tie(f"{path}.{name}", value, self._ties)


def _declared(body: tuple[syntax.Statement, ...]) -> set[str]:
    """Return the names that statements of a body introduce, branches included."""
    found: set[str] = set()
    for statement in body:
        match statement:
            case syntax.Let(name) | syntax.Param(name) | syntax.State(name):
                found.add(name)
            case syntax.Branch(name, inner):
                found |= {name} | _declared(inner)
    return found


def _names(item: syntax.Item) -> set[str]:
    """Return every name an item reads or calls."""
    found: set[str] = set()
    for expr, _ in expressions(item):
        for node in syntax.walk(expr):
            if isinstance(node, Name):
                found.add(node.id)
            elif isinstance(node, Call):
                found.add(node.function)
    return found
