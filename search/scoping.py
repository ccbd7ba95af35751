"""Which names stand for draws, item by item.

`let`s at the top are seen everywhere but where a block's own names hide them; `let`s and
parameters of a model in the model alone. A model that inherits may change what its base's
settings read, so models are looked at with what they inherit written out:

    model small { let w = pow2(8..64); layers = [local(w)] }
    model large : small { let w = 256 }            # large: layers = [local(256)]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..grammar import syntax
from ..grammar.syntax import Call, Expr, Name
from .draw import Scope, Tie
from .holes import expressions

Named = syntax.Block | syntax.Model | syntax.Definition


@dataclass(frozen=True, slots=True)
class Flat:
    """A model with what it inherits; `base` is left where the file does not define it."""

    scope: dict[str, Tie]
    body: tuple[syntax.Statement, ...]
    base: Expr | None


class Scoping:
    """The names of one file."""

    def __init__(self, file: syntax.File) -> None:
        self.items: list[Named] = [
            item
            for item in file.items
            if isinstance(item, syntax.Block | syntax.Model | syntax.Definition)
        ]
        self.ties: dict[str, Tie] = {}
        for item in file.items:
            if isinstance(item, syntax.Let):
                self.ties[item.name] = Tie(item.name, item.value, self.ties)

    def called(self, names: set[str]) -> list[Named]:
        return [each for each in self.items if each.name in names]

    def of(self, item: syntax.Block | syntax.Definition) -> Scope:
        """Return the ties that are seen in a block or a definition."""
        hidden = {each.name for each in item.params} | syntax.declared(item.body)
        return {key: tie for key, tie in self.ties.items() if key not in hidden}

    def flat(self, model: syntax.Model, settle: Callable[[Expr, Scope], Expr]) -> Flat:
        """Write out what a model inherits; `settle` says which base is meant."""
        scope = dict(self.ties)
        settings: dict[str, syntax.Statement] = {}
        base = self._inherit(model, model.name, scope, settings, settle, ())
        return Flat(scope, tuple(settings.values()), base)

    def _inherit(
        self,
        model: syntax.Model,
        path: str,
        scope: dict[str, Tie],
        settings: dict[str, syntax.Statement],
        settle: Callable[[Expr, Scope], Expr],
        below: tuple[str, ...],
    ) -> Expr | None:
        """Collect ties and settings, the base's first."""
        base = None if model.base is None else settle(model.base, scope)
        parent = self._parent(base)
        if base is not None and parent is not None and parent.name not in (*below, model.name):
            self._inherit(parent, path, scope, settings, settle, (*below, model.name))
            for name, value in _given(parent, base):
                scope[name] = Tie(f"{path}.{name}", value, self.ties)
            base = None
        for each in model.params:
            if each.default is not None:
                scope[each.name] = Tie(f"{path}.{each.name}", each.default, scope)
        for statement in model.body:
            name = getattr(statement, "name", "")
            if isinstance(statement, syntax.Let):
                scope[name] = Tie(f"{path}.{name}", statement.value, scope)
            else:
                key = name if isinstance(statement, syntax.Setting) else f"{name} {len(settings)}"
                settings.pop(key, None)
                settings[key] = statement
        return base

    def _parent(self, base: Expr | None) -> syntax.Model | None:
        name = base.id if isinstance(base, Name) else getattr(base, "function", None)
        models = (each for each in self.items if isinstance(each, syntax.Model))
        return next((each for each in models if each.name == name), None)


def _given(parent: syntax.Model, base: Expr) -> list[tuple[str, Expr]]:
    if not isinstance(base, Call):
        return []
    plain = zip((each.name for each in parent.params), base.args, strict=False)
    return [*plain, *((each.name, each.value) for each in base.keywords)]


def names_in(item: syntax.Item) -> set[str]:
    """Return every name an item reads or calls."""
    found: set[str] = set()
    for expr, _ in expressions(item):
        for node in syntax.walk(expr):
            if isinstance(node, Name):
                found.add(node.id)
            elif isinstance(node, Call):
                found.add(node.function)
    return found
