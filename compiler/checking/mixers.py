"""Recurrent mixers: states, statements, and the shape of every expression in them.

    S <- alpha * (S - beta * outer(k, k @ S)) + beta * outer(k, v)

Within a mixer, per head, an expression is a number (), a vector (d) or a matrix (a, b). A
vector times a matrix scales its rows; `@` contracts the last dimension with the first.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...grammar import syntax
from ...grammar.diagnostics import error
from ...grammar.expr import names, number
from ...grammar.functions import MIXER_FUNCTIONS
from ...grammar.show import show
from ...grammar.syntax import Binary, Call, Definition, Expr, Index, Name
from ...ops import Shape
from ..algebra.levels import MAX_LEVELS, NotAffineError, affine_parts
from ..model import Recurrence, State, Update
from .expressions import Dims, Resolver, Value, plain
from .library import substitute_statement
from .scope import Scope, suggest
from .settled import finite, settled


def resolve_mixer(scope: Scope, definition: Definition, call: Expr, mask: str) -> Recurrence:
    """Return a mixer with its statements resolved; `mask` is all or causal, or has document."""
    with scope.inside(definition, call.span):
        values = scope.expand(definition, call)
        statements = [substitute_statement(each, values) for each in definition.body]
    states = tuple(_state(scope, each) for each in statements if isinstance(each, syntax.State))
    for at, each in enumerate(states):
        if each.name in {other.name for other in states[:at]}:
            raise error(
                "L211", f"`{each.name}` is defined twice", call.span, "", "choose another name"
            )
    visitor = Mixer(scope, {each.name: each.shape for each in states})
    updates: list[Update] = []
    for statement in statements:
        if isinstance(statement, syntax.Update):
            updates.append(_update(visitor, statement))
        elif not isinstance(statement, syntax.State | syntax.Let | syntax.Param):
            raise error(
                "L216", "a mixer is made of states and `name <- expression`", statement.span
            )
    if not any(each.name == "o" for each in updates):
        raise error("L216", f"`{definition.name}` has no output", call.span, "", "write `o <- …`")
    causal = "causal" in mask
    if not causal:
        _only_adds(definition, updates, {each.name for each in states}, call)
        if any(each.levels for each in states):
            raise error(
                "L217",
                f"`{definition.name}` needs a causal mask",
                call.span,
                "it keeps a state in levels",
                "set `mask = causal`",
            )
    for each in states:
        if each.levels:
            _merges(visitor, each, updates, {other.name for other in states})
    return Recurrence(definition.name, states, tuple(updates), causal, "document" in mask)


def _state(scope: Scope, state: syntax.State) -> State:
    if state.name in scope.declared or state.name in scope.tensors:
        raise error(
            "L211",
            f"`{state.name}` is defined twice",
            state.span,
            "it is a stream or a tensor already",
            "choose another name",
        )
    if state.name in ("o", "x", "context", "true", "false"):
        raise error(
            "L215",
            f"`{state.name}` cannot be the name of this",
            state.span,
            "this name has a meaning of its own",
            "choose another name",
        )
    shape = tuple(scope.size(dim, f"a dimension of `{state.name}`") for dim in state.dims)
    if len(shape) > 2:
        raise error(
            "L216",
            "a state is a number, a vector or a matrix",
            state.span,
            f"{len(shape)} dimensions",
        )
    value = scope.number(state.init, f"the initial value of `{state.name}`")
    init = number(value, state.init)
    if state.weights is None:
        return State(state.name, shape, init)
    if value != 0:
        raise error(
            "L230",
            f"`{state.name}` is kept in levels, which begin at 0",
            state.init.span,
            f"it is {value}",
            "write `= 0 by …`",
        )
    weights, dims, _ = Mixer(scope, {}).number(state.weights)
    if len(dims) != 1 or not 1 <= dims[0] <= MAX_LEVELS:
        raise error(
            "L230",
            f"`{state.name}` needs a weight for each level",
            state.weights.span,
            f"the weights are {list(dims)}",
            f"write a vector of 1 to {MAX_LEVELS} numbers",
        )
    return State(state.name, shape, init, finite(settled(weights)), dims[0])


def _merges(visitor: Mixer, state: State, updates: list[Update], states: set[str]) -> None:
    """Check that levels of a state can be merged: each is updated by itself (L230)."""
    from ..algebra.affine import Affine  # the algebra of recurrences, which few checks need

    read = {name for each in updates for name in names(each.value)}
    ranks = {name: visitor.rank(name) for name in read - {"true", "false"}}
    rank = Affine(ranks, frozenset()).rank
    seen: set[str] = set()  # names that stand for what is read of the state
    for update in updates:
        reads = names(update.value) & {state.name, *seen}
        if update.name == state.name:
            try:
                affine_parts(update.value, state.name, rank)
            except NotAffineError as wrong:
                part: Expr = wrong.args[0]
                raise error(
                    "L230",
                    f"`{state.name}` is kept in levels, which add up",
                    part.span,
                    f"`{show(part)}` is not affine in `{state.name}`",
                    "write an update that is",
                ) from None
            if reads & seen:
                name = min(reads & seen)
                raise error(
                    "L230",
                    f"`{state.name}` is written by what `{name}` reads of it",
                    update.value.span,
                    f"`{name}` reads all levels in one",
                    f"write what `{name}` is in its place",
                )
        elif update.name not in states:
            seen = seen | {update.name} if reads else seen - {update.name}


def _update(visitor: Mixer, update: syntax.Update) -> Update:
    value, dims, _ = visitor.number(update.value)
    known = visitor.locals
    needed = (visitor.scope.numbers["value_dim"],) if update.name == "o" else known.get(update.name)
    if needed is not None and dims != needed:
        raise error(
            "L216",
            f"`{update.name}` has another shape",
            update.value.span,
            f"{list(needed)} ← {list(dims)}",
        )
    if update.name != "o" and update.name in visitor.fixed | visitor.scope.declared.keys():
        raise error(
            "L216",
            f"`{update.name}` cannot be written",
            update.span,
            "a mixer writes its states, `o`, and names of its own",
        )
    known.setdefault(update.name, dims)
    return Update(update.name, finite(settled(value)))


def _only_adds(definition: Definition, updates: list[Update], states: set[str], call: Expr) -> None:
    for update in updates:
        match update.value:
            case Binary("+", Name(a), rest) | Binary("+", rest, Name(a)) if (
                a == update.name and not names(rest) & states
            ):
                continue
        if update.name in states:
            raise error(
                "L217",
                f"`{definition.name}` needs a causal mask",
                call.span,
                f"`{update.name}` does not only add",
                "set `mask = causal`",
            )


@dataclass(frozen=True)
class Mixer(Resolver):
    """Names are those of the current token, for one query head."""

    scope: Scope
    locals: dict[str, Dims]
    what: str = "mixer"

    @property
    def fixed(self) -> set[str]:
        return {"x", "context", "true", "false", *self.scope.tensors}

    def rank(self, name: str) -> int:
        """Return how many dimensions a resolved name has: of a tensor all, else those per head."""
        if name in self.locals:
            return len(self.locals[name])
        if name in self.scope.tensors:
            return len(self.scope.tensors[name].shape)
        return len(self.name(Name(name)).dims) if name != "h" else 0

    def other(self, expr: Expr) -> Value:
        raise error("L216", "this has no meaning in a mixer", expr.span)

    def call(self, expr: Call) -> Value | None:
        """Resolve `diag(a)`, `solve(A, b)` and `softmax(a)`, unless a stage has the name."""
        name = expr.function
        if name not in MIXER_FUNCTIONS or self.scope.library.find("stage", name):
            return None
        arity = MIXER_FUNCTIONS[name]
        if len(expr.args) != arity or expr.keywords:
            given = len(expr.args) + len(expr.keywords)
            raise error("L209", f"`{name}` takes {plain(arity)}", expr.span, f"{given} given")
        parts = [self.number(each) for each in expr.args]
        done = Call(name, tuple(each.expr for each in parts), (), expr.span)
        match [each.dims for each in parts]:
            case [(size,)]:
                return Value(done, (size,) if name == "softmax" else (size, size))
            case [(rows, columns), (size,)] if rows == columns == size:
                return Value(done, (size,))
            case shapes:
                wanted = "a square matrix and a vector of its size" if arity == 2 else "a vector"
                shown = " and ".join(str(list(dims)) for dims in shapes)
                raise error("L216", f"`{name}` takes {wanted}", expr.span, shown)

    def index(self, expr: Index) -> Value:
        match expr:
            case Index(Name(id), (Name("h"),)) if self.scope.own(id) in self.scope.tensors:
                own = self.scope.own(id)
                return Value(
                    Index(Name(own, expr.span), expr.items, expr.span),
                    self.scope.tensors[own].shape[1:],
                )
        raise error("L216", "this has no meaning in a mixer", expr.span)

    def name(self, expr: Name) -> Value:
        scope, id = self.scope, expr.id
        if id in self.locals:
            return Value(expr, self.locals[id])
        if id in scope.numbers:
            return Value(number(scope.numbers[id], expr))
        id = scope.own(id)
        expr = Name(id, expr.span)
        if id in scope.tensors:
            shape = scope.tensors[id].shape
            if id in scope.per_head:
                return Value(Index(expr, (Name("h"),), expr.span), shape[1:])
            return Value(Index(expr, (), expr.span), shape)
        shape_ = scope.shape(id, expr.span)
        if shape_ is None:
            raise error(
                "L201",
                f"`{id}` is not known in a mixer",
                expr.span,
                "",
                suggest(id, self.locals, scope.declared, scope.numbers, "qkv"),
            )
        return Value(expr, self._per_head(expr, shape_))

    def _per_head(self, expr: Name, shape: Shape) -> Dims:
        heads = int(self.scope.numbers["heads"])
        if shape.tokens != "n":
            raise error("L216", "a recurrence runs along its own tokens", expr.span, f"{shape}")
        if shape.heads is not None:
            if heads % shape.heads:
                raise error("L216", f"the heads of `{expr.id}` do not divide those of q", expr.span)
            return (shape.dim,)
        if shape.dim % heads:
            raise error(
                "L216",
                f"`{expr.id}` cannot be shared out among the heads",
                expr.span,
                f"width = {shape.dim}, heads = {heads}",
            )
        each = shape.dim // heads
        return () if each == 1 else (each,)
