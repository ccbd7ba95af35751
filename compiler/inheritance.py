"""What a block says, with all that it inherits: its settings, lets, params and consts.

block global : local { mask = causal }      everything of `local`, the mask its own
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..grammar import syntax
from ..grammar.diagnostics import did_you_mean, error
from ..grammar.parse import parse_expression
from ..grammar.source import Span
from ..grammar.syntax import Call, Expr, Name, Statement
from .library import Library, bind, substitute_statement
from .scope import Findings

SETTINGS = {
    "width": "", "context_width": "", "heads": "8", "kv_heads": "heads",
    "head_dim": "width / heads", "value_dim": "head_dim", "source": "x", "q": "", "k": "", "v": "",
    "position": "none", "similarity": "dot", "scale": "head_dim ** -0.5", "score": "s",
    "mask": "all", "select": "none", "normalize": "softmax", "weights": "p", "mix": "attend",
    "out": "o | merge | linear", "dropout": "0", "regularize": "none", "grid": "",
}  # fmt: skip


class Body:
    """A block's statements with everything it inherits, the nearest word winning."""

    def __init__(self, library: Library, call: Expr, findings: Findings) -> None:
        self.settings: dict[str, syntax.Setting] = {}
        self.lets: dict[str, syntax.Let | syntax.Param] = {}
        self.block = find_block(library, call)
        self.span = self.block.span
        for body in reversed(list(_chain(library, call, []))):
            self._merge(body, findings, library.lets)

    def _merge(
        self, body: tuple[Statement, ...], findings: Findings, lets: Mapping[str, Expr]
    ) -> None:
        seen: set[str] = set()
        for statement in body:
            with findings.guard():
                name = getattr(statement, "name", "")
                if name and name in seen:
                    raise error("L211", f"`{name}` is set twice in one block", statement.span, "",
                                "keep one of them")  # fmt: skip
                seen.add(name)
                statement = substitute_statement(statement, lets)
                match statement:
                    case syntax.Setting():
                        if name not in SETTINGS:
                            raise error("L202", f"a block has no setting `{name}`", statement.span,
                                        "", did_you_mean(name, SETTINGS))  # fmt: skip
                        self.settings[name] = statement
                    case syntax.Let() | syntax.Param():
                        self.lets[name] = statement
                    case syntax.Branch():
                        raise error("L221", "branches are not available yet", statement.span)
                    case _:
                        help = "a block is made of settings, `let`, `param` and `const`"
                        raise error("L202", "this does not belong in a block", statement.span, "",
                                    help)  # fmt: skip

    def has(self, name: str) -> bool:
        return name in self.settings

    def get(self, name: str) -> Expr:
        if name in self.settings:
            return self.settings[name].value
        return parse_expression(SETTINGS[name])

    def span_of(self, name: str) -> Span:
        return self.settings[name].value.span if name in self.settings else self.span


def find_block(library: Library, call: Expr) -> syntax.Block:
    """Return the block a name or call means (L218)."""
    name = call.id if isinstance(call, Name) else getattr(call, "function", None)
    if not isinstance(call, Name | Call) or name is None:
        raise error("L218", "this is not a block", call.span, "", "name one, or call it")
    if name not in library.blocks:
        have = ", ".join(f"`{each}`" for each in library.blocks) or "none"
        raise error("L218", f"there is no block `{name}`", call.span, "",
                    did_you_mean(name, library.blocks, f"this file has {have}"))  # fmt: skip
    return library.blocks[name]


def _chain(library: Library, call: Expr, open_: list[str]) -> Iterator[tuple[Statement, ...]]:
    """Yield the bodies of a block and its bases, nearest first, parameters in place."""
    block = find_block(library, call)
    if block.name in open_:
        ring = " : ".join([*open_, block.name])
        raise error("L212", f"`{block.name}` inherits from itself", call.span, ring)
    values = bind(block.name, block.params, call, call.span)
    yield tuple(substitute_statement(each, values) for each in block.body)
    if block.base is not None:
        result = substitute_statement(syntax.Result(block.base), values)
        assert isinstance(result, syntax.Result)
        yield from _chain(library, result.value, [*open_, block.name])
