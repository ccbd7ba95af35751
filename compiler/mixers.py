"""Recurrent mixers: states, statements, and the shape of every expression in them.

    S <- alpha * (S - beta * outer(k, k @ S)) + beta * outer(k, v)

Within a mixer, per head, an expression is a number (), a vector (d) or a matrix (a, b). A
vector times a matrix scales its rows; `@` contracts the last dimension with the first.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..grammar import syntax
from ..grammar.diagnostics import error
from ..grammar.expr import fold, names, number
from ..grammar.functions import FUNCTIONS, VECTOR_FUNCTIONS
from ..grammar.syntax import Binary, Call, Compare, Definition, Expr, Index, Name, Number, Unary
from ..ops import Shape
from .library import substitute_statement
from .model import Recurrence, State, Update
from .scalars import inline_stage
from .scope import Scope, suggest

Dims = tuple[int, ...]


def resolve_mixer(scope: Scope, definition: Definition, call: Expr, mask: str) -> Recurrence:
    """Return a mixer with its statements resolved; `mask` is all or causal, or has document."""
    with scope.inside(definition, call.span):
        values = scope.expand(definition, call)
        statements = [substitute_statement(each, values) for each in definition.body]
    states = tuple(_state(scope, each) for each in statements if isinstance(each, syntax.State))
    for at, each in enumerate(states):
        if each.name in {other.name for other in states[:at]}:
            raise error("L211", f"`{each.name}` is defined twice", call.span, "",
                        "choose another name")  # fmt: skip
    visitor = _Mixer(scope, {each.name: each.shape for each in states})
    updates: list[Update] = []
    for statement in statements:
        if isinstance(statement, syntax.Update):
            updates.append(_update(visitor, statement))
        elif not isinstance(statement, syntax.State | syntax.Let | syntax.Param):
            raise error("L216", "a mixer is made of states and `name <- expression`",
                        statement.span)  # fmt: skip
    if not any(each.name == "o" for each in updates):
        raise error("L216", f"`{definition.name}` has no output", call.span, "",
                    "write `o <- …`")  # fmt: skip
    causal = "causal" in mask
    if not causal:
        _only_adds(definition, updates, {each.name for each in states}, call)
    return Recurrence(definition.name, states, tuple(updates), causal, "document" in mask)


def _state(scope: Scope, state: syntax.State) -> State:
    if state.name in scope.declared or state.name in scope.tensors:
        raise error("L211", f"`{state.name}` is defined twice", state.span,
                    "it is a stream or a tensor already", "choose another name")  # fmt: skip
    if state.name in ("o", "x", "context", "true", "false"):
        raise error("L215", f"`{state.name}` cannot be the name of this", state.span,
                    "this name has a meaning of its own", "choose another name")  # fmt: skip
    shape = tuple(scope.size(dim, f"a dimension of `{state.name}`") for dim in state.dims)
    if len(shape) > 2:
        raise error("L216", "a state is a number, a vector or a matrix", state.span,
                    f"{len(shape)} dimensions")  # fmt: skip
    value = scope.number(state.init, f"the initial value of `{state.name}`")
    return State(state.name, shape, number(value, state.init))


def _update(visitor: _Mixer, update: syntax.Update) -> Update:
    value, dims = visitor.want(update.value, False)
    known = visitor.locals
    needed = (visitor.scope.numbers["value_dim"],) if update.name == "o" else known.get(update.name)
    if needed is not None and dims != needed:
        raise error("L216", f"`{update.name}` has another shape", update.value.span,
                    f"{list(needed)} ← {list(dims)}")  # fmt: skip
    if update.name != "o" and update.name in visitor.fixed | visitor.scope.declared.keys():
        raise error("L216", f"`{update.name}` cannot be written", update.span,
                    "a mixer writes its states, `o`, and names of its own")  # fmt: skip
    known.setdefault(update.name, dims)
    return Update(update.name, fold(value))


def _only_adds(definition: Definition, updates: list[Update], states: set[str], call: Expr) -> None:
    for update in updates:
        match update.value:
            case Binary("+", Name(a), rest) | Binary("+", rest, Name(a)) if (
                a == update.name and not names(rest) & states
            ):
                continue
        if update.name in states:
            raise error("L217", f"`{definition.name}` needs a causal mask", call.span,
                        f"`{update.name}` does not only add", "set `mask = causal`")  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Mixer:
    scope: Scope
    locals: dict[str, Dims]

    @property
    def fixed(self) -> set[str]:
        return {"x", "context", "true", "false", *self.scope.tensors}

    def want(self, expr: Expr, truth: bool) -> tuple[Expr, Dims]:
        """Visit an expression that must be true or false, or a number (L210)."""
        if _is_truth(expr) != truth:
            is_, needs = ("a number", "true or false") if truth else ("true or false", "a number")
            raise error("L210", f"this must be {needs}", expr.span, f"it is {is_}")
        return self.visit(expr)

    def visit(self, expr: Expr) -> tuple[Expr, Dims]:
        match expr:
            case Number():
                return expr, ()
            case Name():
                return self._name(expr)
            case Unary(op, operand):
                value, dims = self.want(operand, op == "not")
                return Unary(op, value, expr.span), dims
            case Binary("@", left, right):
                return self._contract(expr, left, right)
            case Binary(op, left, right):
                truth = op in ("and", "or")
                (a, one), (b, two) = self.want(left, truth), self.want(right, truth)
                return Binary(op, a, b, expr.span), self._together(expr, one, two)
            case Compare(operands, ops):
                sides = [self.want(each, False) for each in operands]
                dims = self._all_together(expr, [each for _, each in sides])
                return Compare(tuple(each for each, _ in sides), ops, expr.span), dims
            case Call():
                return self._call(expr)
            case Index(Name(id), (Name("h"),)) if id in self.scope.tensors:
                return expr, self.scope.tensors[id].shape[1:]
            case _:
                raise error("L216", "this has no meaning in a mixer", expr.span)

    def _name(self, expr: Name) -> tuple[Expr, Dims]:
        scope, id = self.scope, expr.id
        if id in self.locals:
            return expr, self.locals[id]
        id = scope.own(id)
        expr = Name(id, expr.span)
        if id in ("true", "false"):
            return expr, ()
        if id in scope.numbers:
            return number(scope.numbers[id], expr), ()
        if id in scope.tensors:
            shape = scope.tensors[id].shape
            if id in scope.per_head:
                return Index(expr, (Name("h"),), expr.span), shape[1:]
            return Index(expr, (), expr.span), shape
        shape_ = scope.shape(id, expr.span)
        if shape_ is None:
            raise error("L201", f"`{id}` is not known in a mixer", expr.span, "",
                        suggest(id, self.locals, scope.declared, scope.numbers, "qkv"))  # fmt: skip
        return expr, self._per_head(expr, shape_)

    def _per_head(self, expr: Name, shape: Shape) -> Dims:
        heads = int(self.scope.numbers["heads"])
        if shape.tokens != "n":
            raise error("L216", "a recurrence runs along its own tokens", expr.span, f"{shape}")
        if shape.heads is not None:
            if heads % shape.heads:
                raise error("L216", f"the heads of `{expr.id}` do not divide those of q", expr.span)
            return (shape.dim,)
        if shape.dim % heads:
            raise error("L216", f"`{expr.id}` cannot be shared out among the heads", expr.span,
                        f"width = {shape.dim}, heads = {heads}")  # fmt: skip
        each = shape.dim // heads
        return () if each == 1 else (each,)

    def _together(self, expr: Expr, one: Dims, two: Dims) -> Dims:
        if one == two or two == ():
            return one
        if one == ():
            return two
        if len(one) != len(two):
            vector, matrix = (one, two) if len(one) < len(two) else (two, one)
            if vector[0] == matrix[0]:
                return matrix
        raise error("L216", "these shapes do not go together", expr.span,
                    f"{list(one)} and {list(two)}")  # fmt: skip

    def _all_together(self, expr: Expr, shapes: list[Dims]) -> Dims:
        dims: Dims = ()
        for each in shapes:
            dims = self._together(expr, dims, each)
        return dims

    def _contract(self, expr: Expr, left: Expr, right: Expr) -> tuple[Expr, Dims]:
        (a, one), (b, two) = self.want(left, False), self.want(right, False)
        if not one or not two or one[-1] != two[0]:
            raise error("L216", "`@` contracts the last dimension with the first", expr.span,
                        f"{list(one)} @ {list(two)}")  # fmt: skip
        return Binary("@", a, b, expr.span), one[:-1] + two[1:]

    def _call(self, expr: Call) -> tuple[Expr, Dims]:
        name = expr.function
        if stage := self.scope.library.find("stage", name):
            with self.scope.inside(stage, expr.span):
                return self.visit(inline_stage(self.scope, stage, expr))
        arity = VECTOR_FUNCTIONS.get(name) or (FUNCTIONS[name].arity if name in FUNCTIONS else None)
        if arity is None:
            raise error("L201", f"`{name}` is not a function", expr.span, "",
                        suggest(name, FUNCTIONS, VECTOR_FUNCTIONS))  # fmt: skip
        if len(expr.args) != arity or expr.keywords:
            raise error("L209", f"`{name}` takes {arity} plain arguments", expr.span)
        parts = [self.want(arg, name == "where" and at == 0) for at, arg in enumerate(expr.args)]
        done = Call(name, tuple(value for value, _ in parts), (), expr.span)
        shapes = [dims for _, dims in parts]
        if name in ("sum", "mean", "norm"):
            return done, ()
        if name in ("outer", "dot"):
            if any(len(dims) != 1 for dims in shapes) or (name == "dot" and shapes[0] != shapes[1]):
                raise error("L216", f"`{name}` takes two vectors", expr.span,
                            " and ".join(str(list(dims)) for dims in shapes))  # fmt: skip
            return done, () if name == "dot" else shapes[0] + shapes[1]
        return done, self._all_together(expr, shapes)


def _is_truth(expr: Expr) -> bool:
    match expr:
        case Compare() | Unary("not") | Binary("and" | "or") | Name("true" | "false"):
            return True
        case Call(name):
            return name in FUNCTIONS and FUNCTIONS[name].boolean
    return False
