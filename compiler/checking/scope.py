"""What a block under construction knows: its sizes, streams and tensors, and its findings.

Streams are elaborated when they are first read, so they may be written in any order; what
has been made stands in `streams`, each after those it reads. Definitions that bring streams
or tensors of their own (`score temperature { let t = … }`) declare them here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from math import inf, prod

from ...grammar import syntax
from ...grammar.constants import settle
from ...grammar.diagnostics import Diagnostic, LoomError, did_you_mean, error
from ...grammar.expr import NotConstant, Value, calls, evaluate, names, rebuild
from ...grammar.functions import FUNCTIONS
from ...grammar.source import Span
from ...grammar.syntax import Call, Definition, Expr, Name
from ...ops import OPS, Shape, Weight
from ..model import Block, Stream
from .around import Around
from .depth import Depth, Found, place_of
from .library import MAX_NODES, Library, bind, put, size, substitute_statement
from .names import taken

SCALAR = (
    "mask",
    "similarity",
    "score",
    "normalize",
    "weights",
)  # definitions of a number or truth a pair
MAX_SIZE = 1 << 24
MAX_NUMBERS = 1 << 32
MAX_PLACES = 4096  # heads, and places along a tensor, for which a value is tried


class Findings:
    """Collects what is wrong; `guard` lets the rest of a text be checked too."""

    def __init__(self) -> None:
        self.diagnostics: list[Diagnostic] = []

    @contextmanager
    def guard(self) -> Iterator[None]:
        try:
            yield
        except LoomError as problem:
            self.diagnostics.extend(
                each for each in problem.diagnostics if each not in self.diagnostics
            )

    def keep(self, wanted: Callable[[Diagnostic], bool]) -> None:
        """Forget the findings that are not wanted."""
        self.diagnostics = [each for each in self.diagnostics if wanted(each)]

    def settle(self) -> None:
        """Raise everything that was found, if anything was."""
        if self.diagnostics:
            raise LoomError(self.diagnostics)


Declared = Callable[[str], Stream]  # the stream of this name in the block
Whole = Callable[["Scope", Expr, Definition | None, Shape], Block]  # for what it is given


@dataclass
class Scope:
    """The state of one block's elaboration, or of one branch within it.

    A branch has sizes of its own, and names of its own for what it overrides (`renamed`);
    all else it shares with the block.
    """

    library: Library
    findings: Findings
    numbers: dict[str, Value] = field(default_factory=dict)
    declared: dict[str, Declared] = field(default_factory=dict)
    streams: dict[str, Stream] = field(default_factory=dict)
    tensors: dict[str, Weight] = field(default_factory=dict)
    inputs: dict[str, Shape] = field(default_factory=dict)  # x, context
    per_head: set[str] = field(default_factory=set)  # tensors declared as NAME[heads, …]
    grid: tuple[int, int] | None = None
    elaborate: Callable[[syntax.Let, Scope, str], Stream] | None = None
    branch: str = ""
    title: str = ""  # the name of the block
    depth: Depth | None = None  # the layers below, in a model
    memory: int = 0  # how many learned tokens stand in front
    maps_read: dict[str, Found] = field(default_factory=dict)  # those of other layers, by name
    renamed: dict[str, str] = field(default_factory=dict)
    parts: Mapping[str, Expr] = field(default_factory=dict)  # what a layer was given for parts
    around: Around | None = None  # where a layer stands
    whole: Whole | None = None  # makes the part that a call, or a stage with tensors, stands for
    _open: list[str] = field(default_factory=list)
    _expanded: dict[tuple[object, ...], dict[str, Expr]] = field(default_factory=dict)
    _spent: list[int] = field(default_factory=lambda: [0])

    def inner(self, branch: str, numbers: dict[str, Value]) -> Scope:
        """Return the scope of a branch."""
        return replace(self, numbers=numbers, branch=branch, renamed={}, _expanded={})

    # numbers

    def number(self, expr: Expr, what: str) -> Value:
        """Return the value of a constant expression (L219)."""
        try:
            value = evaluate(expr, self.numbers)
            if value == -inf:
                raise NotConstant(expr, "it is minus infinity")
            return value
        except NotConstant as problem:
            help = ""
            if isinstance(problem.node, Name):
                help = did_you_mean(problem.node.id, self.numbers)
            raise error(
                "L219", f"{what} must be a number", problem.node.span, problem.reason, help
            ) from None

    def size(self, expr: Expr, what: str) -> int:
        """Return a whole number fit to be a dimension (L203)."""
        value = self.number(expr, what)
        if isinstance(value, bool) or value != int(value) or not 1 <= value <= MAX_SIZE:
            raise error(
                "L203",
                f"{what} must be a whole number from 1 to {MAX_SIZE:,}",
                expr.span,
                f"it is {value}",
            )
        return int(value)

    # streams and tensors

    def shape(self, name: str, span: Span) -> Shape | None:
        """Return the shape of a stream, elaborating it if need be; None if there is none."""
        name = self.own(name)
        if name in self.inputs:
            return self.inputs[name]
        if name not in self.streams:
            elaborate = self.declared.get(name)
            if elaborate is None:
                return None
            if name in self._open:
                open_ = (each.split()[-1] for each in self._open[self._open.index(name) :])
                ring = " → ".join([*open_, name])
                raise error("L212", f"`{name}` is defined in terms of itself", span, ring)
            self._open.append(name)
            try:
                stream = elaborate(name)
            finally:
                self._open.pop()
            self.streams[name] = stream
        return self.streams[name].shape

    def elsewhere(self, expr: Expr) -> Found | None:
        """Return the stream of another layer that `at(e).NAME` is; None for what is none (L224)."""
        place = place_of(expr)
        if place is None or (place[0] == Name("first") and "first" in self.declared):
            return None
        layer, path = place
        if self.depth is None:
            raise error(
                "L224",
                "there is no layer below",
                expr.span,
                "it stands alone",
                f"use `{self.title}` in a model, above another block",
            )
        value = self.number(layer, "a layer")
        if value != int(value):
            raise error("L219", "a layer is a whole number", layer.span, f"it is {value}")
        return self.depth.find(int(value), path, "layer" in names(layer), expr.span)

    def own(self, name: str) -> str:
        """Return the name in the block of what is called `name` here."""
        return self.renamed.get(name, name)

    def _has(self, name: str) -> bool:
        return name in self.declared or name in self.tensors

    def declare(
        self, statement: syntax.Let | syntax.Param, prefix: str = "", moved: bool = False
    ) -> str:
        """Take up a `let`, `param` or `const`; return the name it gets in the block.

        What training moves is not learned.
        """
        name, of_definition = statement.name, bool(prefix)
        if self.branch:
            prefix = f"{self.branch}_{prefix}" if prefix else self.branch
        clashes = name in self.declared or name in self.tensors or name in self.inputs
        if prefix and (clashes or self.branch):
            name = f"{prefix}_{name}"
        if of_definition:  # one for each different call
            numbered = (name if at == 0 else f"{name}_{at}" for at in count())
            name = next(each for each in numbered if not self._has(each))
        if why := taken(name, tensor=isinstance(statement, syntax.Param)):
            raise error(
                "L215",
                f"`{name}` cannot be the name of this",
                statement.span,
                why,
                "choose another name",
            )
        if self._has(name):
            raise error(
                "L211", f"`{name}` is defined twice", statement.span, "", "choose another name"
            )
        if isinstance(statement, syntax.Let):
            assert self.elaborate is not None
            self.declared[name] = partial(self.elaborate, statement, self)
        else:
            tensor = self._tensor(name, statement)
            moved = moved and statement.learned
            self.tensors[name] = replace(tensor, learned=False, moved=True) if moved else tensor
        return name

    def _tensor(self, name: str, statement: syntax.Param) -> Weight:
        sizes = tuple(self.size(dim, f"a dimension of `{name}`") for dim in statement.dims)
        if prod(sizes) > MAX_NUMBERS:
            raise error(
                "L203",
                f"`{name}` is too large",
                statement.span,
                f"{prod(sizes):,} numbers, the limit is {MAX_NUMBERS:,}",
            )
        values = {id: syntax.Number(value, str(value)) for id, value in self.numbers.items()}
        init = put(statement.init, values)
        if not statement.learned and calls(init, "normal"):
            raise error(
                "L219",
                "a constant is not drawn",
                statement.init.span,
                "",
                "it is not in the state dict, so every module would have another; "
                "make it a `param`",
            )
        if statement.dims and statement.dims[0] == Name("heads"):
            self.per_head.add(name)
        try:
            self._finite(_drawn(init), sizes)
        except NotConstant as problem:
            raise error(
                "L219",
                f"the initial value of `{name}` must be a number",
                problem.node.span,
                problem.reason,
                "it may read `h`, the place along the first dimension, and `normal(std)`",
            ) from None
        return Weight(name, sizes, settle(init), statement.learned)

    @staticmethod
    def _finite(init: Expr, sizes: tuple[int, ...]) -> None:
        """Raise `NotConstant` where a first value is not a finite number, at any `h`."""
        places = min(sizes[0], MAX_PLACES) if sizes and "h" in names(init) else 1
        for h in range(places):
            value = evaluate(settle(init), {"h": h} if sizes else {})
            if value == -inf:
                raise NotConstant(init, "it is minus infinity")

    def offer(self, inputs: Mapping[str, Shape]) -> None:
        """Let inputs be read by their names, where they are no names of its own."""
        own = self.declared.keys() | self.tensors.keys()
        self.inputs |= {name: shape for name, shape in inputs.items() if name not in own}

    # definitions

    def expand(self, definition: Definition, call: Expr) -> dict[str, Expr]:
        """Return what a definition's names stand for, once its streams are declared."""
        values = bind(definition.name, definition.params, call, call.span)
        key = (definition.kind, definition.name, tuple(values.items()))
        if key in self._expanded:
            return self._expanded[key]
        scalars = self._scalars(definition, values)
        for statement in definition.body:
            if isinstance(statement, syntax.Update) and definition.kind in SCALAR:
                raise error(
                    "L244",
                    f"a {definition.kind} moves nothing",
                    statement.span,
                    "",
                    "write it in the block, beside the `param`",
                )
            if isinstance(statement, syntax.Let | syntax.Param):
                bound = substitute_statement(statement, values)
                assert isinstance(bound, syntax.Let | syntax.Param)
                if isinstance(bound, syntax.Let) and bound.name in scalars:
                    values[bound.name] = bound.value
                    continue
                new = self.declare(bound, prefix=definition.name)
                if new != statement.name:
                    values[statement.name] = Name(new, statement.span)
        self._expanded[key] = values
        return values

    def _scalars(self, definition: Definition, values: Mapping[str, Expr]) -> set[str]:
        """Return the lets of a definition that are numbers a pair, not streams (L211, L215)."""
        if definition.kind not in SCALAR:
            return set()
        lets = [each for each in definition.body if isinstance(each, syntax.Let)]
        bound = {each.name: put(each.value, values) for each in lets}
        whole = {"q", "k"} if definition.kind == "similarity" else set()  # read without an index
        streams: set[str] = set()
        while found := {
            name
            for name, value in bound.items()
            if name not in streams and self._is_stream(value, streams, whole)
        }:
            streams |= found
        for at, let in enumerate(lets):
            if let.name in {each.name for each in lets[:at]}:
                raise error(
                    "L211", f"`{let.name}` is defined twice", let.span, "", "choose another name"
                )
            if let.name not in streams and (why := taken(let.name)):
                raise error(
                    "L215",
                    f"`{let.name}` cannot be the name of this",
                    let.span,
                    why,
                    "choose another name",
                )
        return bound.keys() - streams

    def _is_stream(self, value: Expr, streams: set[str], whole: set[str]) -> bool:
        """Tell `let t = x | linear(heads)`, a stream, from `let d = i - j`, a number a pair.

        A stream is a pipeline, or reads a stream without an index; `streams` are further names.
        """
        match value:
            case syntax.Pipe():
                return True
            case Name(id):
                own = self.own(id)
                known = own in self.declared or own in self.inputs or id in streams
                return known and id not in whole
            case syntax.Index(_, items):
                return any(self._is_stream(each, streams, whole) for each in items)
            case Call(name) if name in OPS and name not in FUNCTIONS:
                return True
            case _:
                parts = syntax.children(value)
                return any(self._is_stream(each, streams, whole) for each in parts)

    @contextmanager
    def inside(self, definition: Definition, span: Span) -> Iterator[None]:
        """Guard against definitions that contain themselves, or grow without bound."""
        label = f"{definition.kind} {definition.name}"
        self._spent[0] += size(definition)
        if label in self._open and self.library.is_recursive(definition):
            ring = " → ".join(each.split()[-1] for each in [*self._open, label])
            raise error("L212", f"`{definition.name}` is defined in terms of itself", span, ring)
        if self._spent[0] > MAX_NODES:
            self._spent[0] = 0  # said once
            raise error(
                "L213", "this expands into too much", span, f"more than {MAX_NODES:,} parts"
            )
        self._open.append(label)
        try:
            yield
        finally:
            self._open.pop()


def _drawn(init: Expr) -> Expr:
    """Return an initial value with `normal(std)` read as std (L209)."""
    if isinstance(init, Call) and init.function == "normal":
        if len(init.args) != 1 or init.keywords:
            raise error("L209", "`normal` takes one plain argument", init.span)
        return _drawn(init.args[0])
    return rebuild(init, _drawn)


def suggest(name: str, *known: Iterable[str]) -> str:
    """Return a "did you mean" over several sets of names."""
    return did_you_mean(name, [each for group in known for each in group])


def body(scope: Scope, definition: Definition, call: Expr) -> syntax.Result:
    """Return a definition's value with the arguments of a call in place."""
    values = scope.expand(definition, call)
    last = definition.body[-1] if definition.body else None
    if not isinstance(last, syntax.Result):
        raise error(
            "L220",
            f"`{definition.name}` has no value",
            definition.span,
            "",
            "end it with an expression",
        )
    where = None if last.where is None else put(last.where, values)
    return syntax.Result(_seen_from(call, put(last.value, values)), where, span=last.span)


def _seen_from(call: Expr, value: Expr) -> Expr:
    """Say of what stands in another file, the standard library, that it stands at its call."""
    value = rebuild(value, lambda each: _seen_from(call, each))
    return value if value.span.source is call.span.source else replace(value, span=call.span)


def inline_stage(scope: Scope, stage: Definition, call: Call) -> Expr:
    """Return a scalar stage used as a function: `elu1(s)`."""
    if len(call.args) != 1 or call.keywords:
        raise error("L209", f"`{stage.name}` takes one plain argument here", call.span)
    result = body(scope, stage, Name(stage.name, call.span))
    if isinstance(result.value, syntax.Pipe):
        raise error("L210", f"`{stage.name}` is a pipeline, not a function", call.span)
    return put(result.value, {"x": call.args[0]})
