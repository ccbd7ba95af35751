"""What a block says, with all that it inherits: its settings, lets, params and consts.

block global : local { mask = causal }      everything of `local`, the mask its own
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from functools import cache

from ...grammar import syntax
from ...grammar.diagnostics import error
from ...grammar.expr import names
from ...grammar.source import Span
from ...grammar.syntax import Call, Expr, Statement
from .library import Library, bind, parsed, put, substitute_statement
from .names import taken
from .scope import Findings
from .spellings import instead

SETTINGS = {
    "width": "", "context_width": "", "heads": "8", "kv_heads": "heads",
    "value_heads": "kv_heads",
    "head_dim": "width / heads", "value_dim": "head_dim", "source": "x", "q": "", "k": "", "v": "",
    "position": "none", "similarity": "dot", "scale": "head_dim ** -0.5", "score": "s",
    "carry": "k",
    "mask": "all", "select": "none", "keep": "none", "normalize": "softmax", "weights": "p",
    "mix": "attend",
    "out": "o | merge | linear", "dropout": "0", "regularize": "none", "grid": "",
}  # fmt: skip


@cache
def _defaults() -> dict[str, Expr]:
    return parsed("block", SETTINGS)


WHOLE_BLOCK = ("width", "context_width", "grid", "regularize")  # settings that a branch cannot have


class Body:
    """A block's statements with everything it inherits, the nearest word winning.

    `branches` are its branches as bodies of their own, which inherit all of it.
    """

    def __init__(self, library: Library, call: Expr, findings: Findings) -> None:
        self.settings: dict[str, syntax.Setting] = {}
        self.lets: dict[str, syntax.Let | syntax.Param] = {}
        self.moves: dict[str, syntax.Update] = {}
        self.block = library.item(call, "block")
        self.span = self.block.span
        self.branch = ""
        self.overridden: set[str] = set()  # what a branch says itself
        written: dict[str, syntax.Branch] = {}
        if isinstance(call, Call):
            call = put(call, library.lets)
        for statements in reversed(list(_chain(library, call, []))):
            self._merge(statements, written, findings)
        self.branches = {each.name: self._of_branch(each, findings) for each in written.values()}

    def _of_branch(self, branch: syntax.Branch, findings: Findings) -> Body:
        body = copy(self)
        body.settings, body.lets = dict(self.settings), dict(self.lets)
        body.settings.pop("out", None)
        body.branch, body.branches, body.span = branch.name, {}, branch.span
        body.overridden = {getattr(each, "name", "") for each in branch.body}
        with findings.guard():
            if branch.name in self.lets:
                raise error(
                    "L211",
                    f"`{branch.name}` is defined twice",
                    branch.span,
                    "",
                    "choose another name",
                )
        body._merge(branch.body, None, findings)
        return body

    def _merge(
        self,
        body: tuple[Statement, ...],
        branches: dict[str, syntax.Branch] | None,
        findings: Findings,
    ) -> None:
        what = "a block" if branches is not None else "a branch"
        seen: set[tuple[bool, str]] = set()
        for statement in body:
            with findings.guard():
                name = getattr(statement, "name", "")
                if name and (isinstance(statement, syntax.Update), name) in seen:
                    raise error(
                        "L211",
                        f"`{name}` is set twice in {what}",
                        statement.span,
                        "",
                        "keep one of them",
                    )
                seen.add((isinstance(statement, syntax.Update), name))
                match statement:
                    case syntax.Setting():
                        if branches is None and name in WHOLE_BLOCK:
                            raise error(
                                "L202",
                                f"`{name}` is a setting of the whole block",
                                statement.span,
                                "",
                                "set it outside of the branch",
                            )
                        if name not in SETTINGS:
                            raise error(
                                "L202",
                                f"{what} has no setting `{name}`",
                                statement.span,
                                "",
                                instead(statement, "block", SETTINGS),
                            )
                        self.settings[name] = statement
                    case syntax.Let() | syntax.Param():
                        self.lets[name] = statement
                    case syntax.Update() if branches is not None:
                        self.moves[name] = statement
                    case syntax.Branch() if branches is not None:
                        if why := taken(name):
                            raise error(
                                "L215",
                                f"`{name}` cannot be the name of this",
                                statement.span,
                                why,
                                "choose another name",
                            )
                        branches[name] = statement
                    case _:
                        help = f"{what} is made of settings, `let`, `param` and `const`"
                        if isinstance(statement, syntax.Update):
                            help = "what training moves is said outside of the branch"
                        raise error(
                            "L202", f"this does not belong in {what}", statement.span, "", help
                        )

    def has(self, name: str) -> bool:
        return name in self.settings

    def get(self, name: str) -> Expr:
        return self.settings[name].value if name in self.settings else _defaults()[name]

    def condition(self, name: str) -> Expr | None:
        """Return what stands behind the `where` of a setting."""
        return self.settings[name].where if name in self.settings else None

    def span_of(self, name: str) -> Span:
        return self.settings[name].value.span if name in self.settings else self.span

    def changed(self, sizes: set[str]) -> set[str]:
        """Return the lets that are a branch's own: what it overrides, and all that reads it."""
        changed = self.overridden & self.lets.keys()
        moved = changed | sizes
        while found := {
            name
            for name, let in self.lets.items()
            if name not in moved and isinstance(let, syntax.Let) and names(let.value) & moved
        }:
            moved |= found
            changed |= found
        return changed


def _chain(library: Library, call: Expr, open_: list[str]) -> Iterator[tuple[Statement, ...]]:
    """Yield the bodies of a block and its bases, nearest first, parameters in place."""
    block = library.item(call, "block")
    if block.name in open_:
        ring = " : ".join([*open_, block.name])
        raise error("L212", f"`{block.name}` inherits from itself", call.span, ring)
    values = bind(block.name, block.params, call, call.span)
    yield tuple(substitute_statement(each, values) for each in block.body)
    if block.base is not None:
        result = substitute_statement(syntax.Result(block.base), values)
        assert isinstance(result, syntax.Result)
        yield from _chain(library, result.value, [*open_, block.name])
