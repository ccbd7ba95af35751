"""Names and what they stand for: the standard library, and a file's own definitions over it.

The standard library is written in Loom, in `grammar/std`; a file's definition of the same
name comes first. `bind` puts the arguments of a call in place of a definition's parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TypeVar

from ...grammar import syntax
from ...grammar.diagnostics import did_you_mean, error
from ...grammar.expr import substitute
from ...grammar.parse import parse, parse_expression
from ...grammar.source import Source, Span
from ...grammar.store import kept
from ...grammar.syntax import Definition, Expr, File, Statement
from .depth import place_of
from .names import taken

Named = TypeVar("Named", Definition, syntax.Block, syntax.Model)
Found = TypeVar("Found", syntax.Block, syntax.Model)

MAX_NODES = 20_000  # parts of one expression, and of all the definitions a block uses


@cache
def standard() -> tuple[Definition | syntax.Block, ...]:
    """Return every item of the standard library; what was parsed is kept on disk."""
    files = sorted((Path(__file__).parents[2] / "grammar" / "std").glob("*.loom"))
    texts = {f"std/{each.name}": each.read_text(encoding="utf-8") for each in files}

    def parsed() -> tuple[Definition | syntax.Block, ...]:
        items = [item for name, text in texts.items() for item in parse(Source(name, text)).items]
        return tuple(item for item in items if isinstance(item, Definition | syntax.Block))

    return kept("std", [f"{name}\n{text}".encode() for name, text in texts.items()], parsed)


@cache
def standard_names() -> frozenset[str]:
    """Return every name that the standard library reads."""
    exprs = (expr for item in standard() for _, expr in syntax.expressions(item))
    nodes = (node for expr in exprs for node in syntax.walk(expr))
    return frozenset(node.id for node in nodes if isinstance(node, syntax.Name))


def parsed(name: str, texts: Mapping[str, str]) -> dict[str, Expr]:
    """Return some expressions, without those that are empty; what was parsed is kept on disk."""

    def made() -> dict[str, Expr]:
        return {key: parse_expression(text) for key, text in texts.items() if text}

    return kept(name, [repr(texts).encode()], made)


@dataclass(frozen=True, slots=True)
class Library:
    """What the names of one file mean."""

    definitions: Mapping[tuple[str, str], Definition]
    blocks: Mapping[str, syntax.Block]
    layers: Mapping[str, syntax.Block]
    ffns: Mapping[str, syntax.Block]
    models: Mapping[str, syntax.Model]
    lets: Mapping[str, Expr]
    search: syntax.Search | None = None
    read_above: frozenset[str] = frozenset()  # what is read of layers below, anywhere in the file
    own: frozenset[tuple[str, str]] = frozenset()  # the parts of the file itself, by kind and name

    @staticmethod
    def of(file: File) -> Library:
        lets = _lets(file)
        own = [_with_lets(item, lets) for item in file.items if isinstance(item, Definition)]
        blocks = [_with_lets(item, lets) for item in file.items if isinstance(item, syntax.Block)]
        given = standard()
        every = [*(item for item in given if isinstance(item, syntax.Block)), *blocks]
        definitions = [*(item for item in given if isinstance(item, Definition)), *own]

        def of(kind: str) -> dict[str, syntax.Block]:
            return {each.name: each for each in every if each.kind == kind}

        models = [_with_lets(item, lets) for item in file.items if isinstance(item, syntax.Model)]
        return Library(
            {(each.kind, each.name): each for each in definitions},
            of("block"),
            of("layer"),
            of("ffn"),
            {each.name: each for each in models},
            lets,
            next((item for item in file.items if isinstance(item, syntax.Search)), None),
            frozenset(_read_above(file)),
            frozenset((each.kind, each.name) for each in blocks),
        )

    def find(self, kind: str, name: str) -> Definition | None:
        return self.definitions.get((kind, name))

    def kind_of(self, call: Expr) -> str | None:
        """Return whether `name` or `name(args)` is a block, a layer or an ffn; None for others.

        What the file itself has comes first, whatever kind the standard library has of that name.
        """
        name = call.id if isinstance(call, syntax.Name) else getattr(call, "function", None)
        kinds = [kind for kind, table in self.parts.items() if name in table]
        return next((kind for kind in kinds if (kind, name) in self.own), next(iter(kinds), None))

    @property
    def parts(self) -> dict[str, Mapping[str, syntax.Block]]:
        """What a layer may be made of, by its kind."""
        return {"block": self.blocks, "layer": self.layers, "ffn": self.ffns}

    def item(self, call: Expr, kind: str | None = None) -> syntax.Block:
        """Return what a name or call means, of a kind, or the first there is (L218)."""
        kind = kind or self.kind_of(call) or "block"
        return named(self.parts[kind], kind, call)

    def is_recursive(self, definition: Definition) -> bool:
        """Say whether a definition's text leads back to it, whatever its arguments."""
        reached: set[Definition] = set()
        stack = [definition]
        while stack:
            each = stack.pop()
            own = {param.name for param in each.params}
            found = {used for name in called(each) - own for used in self._named(name)}
            if definition in found:
                return True
            stack.extend(found - reached)
            reached |= found
        return False

    def _named(self, name: str) -> Iterator[Definition]:
        return (each for each in self.definitions.values() if each.name == name)

    def known(self, kind: str) -> Iterator[str]:
        """Yield the names of a kind of definition."""
        return (name for each, name in self.definitions if each == kind)


def is_once(expr: Expr) -> bool:
    """Say whether an expression is a part that all its mentions share: `once(e)`."""
    return isinstance(expr, syntax.Call) and expr.function == "once"


def _read_above(file: File) -> Iterator[str]:
    """Yield the names of streams that something reads of layers below it."""
    for item in file.items:
        for _, expr in syntax.expressions(item):
            for node in syntax.walk(expr):
                if place_of(node) is not None:
                    assert isinstance(node, syntax.Attribute)
                    yield node.name


def _lets(file: File) -> dict[str, Expr]:
    """Return the values of a file's lets, those above in place of their names."""
    lets: dict[str, Expr] = {}
    for item in file.items:
        if isinstance(item, syntax.Let):
            if why := taken(item.name):
                raise error(
                    "L215",
                    f"`{item.name}` cannot be the name of this",
                    item.span,
                    why,
                    "choose another name",
                )
            lets[item.name] = put(item.value, lets)
    return lets


def _with_lets(item: Named, lets: Mapping[str, Expr]) -> Named:
    """Put a file's lets in place of their names, but where an item's own names hide them.

    A model's body is left as it is: its lets are statements that follow one another.
    """
    seen = dict(lets)
    params = []
    for param in item.params:
        default = None if param.default is None else put(param.default, seen)
        params.append(replace(param, default=default))
        seen.pop(param.name, None)
    if isinstance(item, syntax.Model):
        return replace(item, params=tuple(params))
    if isinstance(item, syntax.Block) and item.base is not None:
        item = replace(item, base=put(item.base, seen))
    for name in syntax.declared(item.body):
        seen.pop(name, None)
    body = tuple(substitute_statement(each, seen) for each in item.body)
    return replace(item, params=tuple(params), body=body)


def named(table: Mapping[str, Found], kind: str, call: Expr) -> Found:
    """Return what a name or call means, of those there are of a kind (L218)."""
    name = call.id if isinstance(call, syntax.Name) else getattr(call, "function", None)
    if not isinstance(call, syntax.Name | syntax.Call) or name is None:
        raise error("L218", f"this is not a {kind}", call.span, "", "name one, or call it")
    if name not in table:
        have = ", ".join(f"`{each}`" for each in table) or "none"
        raise error(
            "L218",
            f"there is no {kind} `{name}`",
            call.span,
            "",
            did_you_mean(name, table, f"this file has {have}"),
        )
    return table[name]


def put(expr: Expr, values: Mapping[str, Expr]) -> Expr:
    """Put expressions in place of names (L213 where the result is too large)."""
    done = substitute(expr, values)
    if sum(1 for _ in islice(syntax.walk(done), MAX_NODES + 1)) > MAX_NODES:
        raise error(
            "L213", "this expands into too much", expr.span, f"more than {MAX_NODES:,} parts"
        )
    return done


def bind(
    what: str, params: tuple[syntax.Parameter, ...], call: Expr, span: Span
) -> dict[str, Expr]:
    """Match the arguments of `name` or `name(a, k = b)` with parameters (L209).

    A default may read the parameters before it: `f(c = 3, d = c - 1)`.
    """
    args, keywords = (call.args, call.keywords) if isinstance(call, syntax.Call) else ((), ())
    names = [param.name for param in params]
    takes = f"it takes {', '.join(f'`{name}`' for name in names)}" if names else "it takes none"
    if len(args) > len(params):
        raise error(
            "L209",
            f"too many arguments for `{what}`",
            args[len(params)].span,
            f"{len(args)} given",
            takes,
        )
    values = dict(zip(names, args, strict=False))
    for keyword in keywords:
        if keyword.name not in names:
            raise error(
                "L209",
                f"`{what}` has no argument `{keyword.name}`",
                keyword.span,
                "",
                did_you_mean(keyword.name, names, takes),
            )
        if keyword.name in values:
            raise error("L209", f"`{keyword.name}` is given twice", keyword.span)
        values[keyword.name] = keyword.value
    before: dict[str, Expr] = {}
    for param in params:
        if param.name not in values:
            if param.default is None:
                raise error("L209", f"`{what}` needs `{param.name}`", span, "", takes)
            values[param.name] = put(param.default, before)
        before[param.name] = values[param.name]
    return values


def substitute_statement(statement: Statement, values: Mapping[str, Expr]) -> Statement:
    """Put expressions in place of names, everywhere in a statement."""
    match statement:
        case syntax.Let() | syntax.Update():
            return replace(statement, value=put(statement.value, values))
        case syntax.Param() | syntax.State():
            dims = tuple(put(each, values) for each in statement.dims)
            statement = replace(statement, dims=dims, init=put(statement.init, values))
            if isinstance(statement, syntax.State) and statement.weights is not None:
                return replace(statement, weights=put(statement.weights, values))
            return statement
        case syntax.Setting(_, value, where) | syntax.Result(value, where):
            where = None if where is None else put(where, values)
            return replace(statement, value=put(value, values), where=where)
        case syntax.Branch(_, body):
            return replace(
                statement, body=tuple(substitute_statement(each, values) for each in body)
            )


def statement_exprs(statement: Statement) -> tuple[Expr, ...]:
    """Return every expression that stands directly in a statement."""
    match statement:
        case syntax.Let() | syntax.Update():
            return (statement.value,)
        case syntax.Param(_, dims, init):
            return (*dims, init)
        case syntax.State(_, dims, init, weights):
            return (*dims, init) if weights is None else (*dims, init, weights)
        case syntax.Setting(_, value, where) | syntax.Result(value, where):
            return (value,) if where is None else (value, where)
        case syntax.Branch(_, body):
            return tuple(expr for each in body for expr in statement_exprs(each))


@cache
def size(definition: Definition) -> int:
    """Return how many parts the expressions of a definition have."""
    exprs = [expr for statement in definition.body for expr in statement_exprs(statement)]
    return sum(1 for expr in exprs for _ in syntax.walk(expr))


def called(definition: Definition) -> set[str]:
    """Return every name that the expressions of a definition read or call."""
    nodes = [
        node
        for statement in definition.body
        for expr in statement_exprs(statement)
        for node in syntax.walk(expr)
    ]
    read = {node.id for node in nodes if isinstance(node, syntax.Name)}
    return read | {node.function for node in nodes if isinstance(node, syntax.Call)}
