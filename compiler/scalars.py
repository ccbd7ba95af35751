"""Scalar expressions: masks, scores, normalisers and weights, with every name resolved.

`resolve` replaces names by what they stand for (sizes by numbers, definitions by their
bodies) and checks kinds (a mask is true or false, the rest are numbers) and indices.

    mask = causal and window(w)   →   j <= i and abs(i - j) < 256
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from ..grammar import syntax
from ..grammar.diagnostics import error
from ..grammar.expr import fold, names, number
from ..grammar.functions import FUNCTIONS
from ..grammar.source import NOWHERE, Span
from ..grammar.syntax import Binary, Call, Compare, Definition, Expr, Index, Name, Number, Unary
from .library import put
from .model import MAPS, PREVIOUS, Normalizer
from .scope import Scope, suggest

Kind = Literal["number", "truth"]
PLACES = frozenset(("i", "j", "h", "n", "m"))
FREE = {
    "mask": PLACES,
    "score": PLACES | {"s", "seen"},
    "normalize": PLACES | {"s", "seen", "sum", "tau"},
    "weights": PLACES | {"p", "seen"},
}
_TRUTH = {"where": 0}


@dataclass(frozen=True, slots=True)
class Axes:
    """The tokens that i and j count."""

    queries: str = "n"
    keys: str = "n"


@dataclass(frozen=True, slots=True)
class _Resolver:
    scope: Scope
    kind: str  # mask, score, normalize, weights, stage
    free: frozenset[str]
    axes: Axes = Axes()

    def visit(self, expr: Expr) -> tuple[Expr, Kind]:
        match expr:
            case Number():
                return expr, "number"
            case Name():
                return self._name(expr)
            case Call():
                return self._call(expr)
            case Index():
                return self._index(expr), "number"
            case Unary("not", operand):
                return Unary("not", self.want(operand, "truth"), expr.span), "truth"
            case Unary(op, operand):
                return Unary(op, self.want(operand, "number"), expr.span), "number"
            case Binary("and" | "or" as op, left, right):
                sides = self.want(left, "truth"), self.want(right, "truth")
                return Binary(op, *sides, expr.span), "truth"
            case Binary("@", _, _):
                raise error("L210", "`@` has no meaning here", expr.span, "this is a number a pair")
            case Binary(op, left, right):
                sides = self.want(left, "number"), self.want(right, "number")
                return Binary(op, *sides, expr.span), "number"
            case Compare(operands, ops):
                numbers = tuple(self.want(each, "number") for each in operands)
                return Compare(numbers, ops, expr.span), "truth"
            case syntax.Attribute(Name("previous"), name):
                return self._previous(name, expr.span), "number"
            case syntax.Pipe(head, stages) if self.kind == "score":
                return self._compose(head, stages), "number"
            case _:
                raise error("L210", "this has no meaning here", expr.span,
                            f"a {self.kind} is an expression over {_list(self.free)}")  # fmt: skip

    def want(self, expr: Expr, kind: Kind) -> Expr:
        """Resolve an expression that must be of a kind (L210)."""
        done, found = self.visit(expr)
        if found != kind:
            is_, needs = ("a number", "true or false") if kind == "truth" else (
                "true or false", "a number")  # fmt: skip
            raise error("L210", f"this must be {needs}", expr.span, f"it is {is_}")
        return done

    def _name(self, expr: Name) -> tuple[Expr, Kind]:
        scope, id = self.scope, expr.id
        if id in self.free:
            return expr, "number"
        if id in ("true", "false"):
            return expr, "truth"
        if definition := scope.library.find(self.kind, id):
            return self._definition(definition, expr)
        if id in scope.numbers:
            return number(scope.numbers[id], expr), "number"
        own = scope.own(id)
        if own in scope.tensors and not scope.tensors[own].shape:
            return Index(Name(own, expr.span), (), expr.span), "number"
        if own in scope.tensors or own in scope.declared or id == "doc":
            raise error("L214", f"`{id}` must be indexed here", expr.span, "",
                        f"write `{id}[i]`, `{id}[j]` or `{id}[h]`")  # fmt: skip
        known = (self.free, scope.library.known(self.kind), scope.numbers, scope.tensors,
                 scope.declared)  # fmt: skip
        where = _elsewhere(scope, id)
        raise error("L201", f"`{id}` is not known in a {self.kind}", expr.span, where,
                    suggest(id, *known))  # fmt: skip

    def _previous(self, name: str, span: Span) -> Expr:
        """`previous.s` in a score, `previous.p` in weights: the map of the layer below (L214)."""
        if (self.kind, name) not in (("score", "s"), ("weights", "p")):
            named = f"give the stream a name first: `let below = previous.{name}`"
            raise error("L214", f"`previous.{name}` cannot be read here", span, "",
                        "a score reads `previous.s`, weights read `previous.p`"
                        if name in MAPS else named)  # fmt: skip
        self.scope.layer_below(span)
        return Name(f"{PREVIOUS}{name}", span)

    def _call(self, expr: Call) -> tuple[Expr, Kind]:
        name = expr.function
        definition = self.scope.library.find(self.kind, name)
        if definition is not None and not is_function(expr):
            return self._definition(definition, expr)
        if name in ("row", "col") and len(expr.args) == 1 and not expr.keywords:
            if self.scope.grid is None:
                raise error("L214", f"`{name}` needs a grid", expr.span, "",
                            "set `grid = (rows, cols)` in the block")  # fmt: skip
            cols = number(self.scope.grid[1], expr)
            op = "//" if name == "row" else "%"
            return Binary(op, self.want(expr.args[0], "number"), cols, expr.span), "number"
        if stage := self.scope.library.find("stage", name):
            with self.scope.inside(stage, expr.span):
                return self.visit(inline_stage(self.scope, stage, expr))
        if name not in FUNCTIONS:
            known = (FUNCTIONS, self.scope.library.known(self.kind))
            raise error("L201", f"`{name}` is not a function or a {self.kind}", expr.span,
                        _elsewhere(self.scope, name), suggest(name, *known))  # fmt: skip
        function = FUNCTIONS[name]
        if len(expr.args) != function.arity or expr.keywords:
            given = len(expr.args) + len(expr.keywords)
            raise error("L209", f"`{name}` takes {function.arity} plain arguments", expr.span,
                        f"{given} given")  # fmt: skip
        args = tuple(
            self.want(arg, "truth" if _TRUTH.get(name) == at else "number")
            for at, arg in enumerate(expr.args)
        )
        if name == "ispow2" and not _is_whole(args[0]):
            raise error("L210", "`ispow2` asks about a whole number", expr.args[0].span, "",
                        "`//` divides whole numbers")  # fmt: skip
        return Call(name, args, (), expr.span), "truth" if function.boolean else "number"

    def _definition(self, definition: Definition, call: Expr) -> tuple[Expr, Kind]:
        with self.scope.inside(definition, call.span):
            return self.visit(body(self.scope, definition, call).value)

    def _compose(self, head: Expr | None, stages: tuple[Expr, ...]) -> Expr:
        done = Name("s") if head is None else self.want(head, "number")
        for stage in stages:
            done = put(self.want(stage, "number"), {"s": done})
        return done

    def _index(self, expr: Index) -> Expr:
        if not isinstance(expr.base, Name):
            raise error("L214", "only a stream or a tensor can be indexed", expr.base.span)
        name = self.scope.own(expr.base.id)
        items = tuple(self.want(each, "number") for each in expr.items)
        if name == "doc":
            axes: tuple[str, ...] = ("token",)
        elif name in self.scope.tensors:
            axes = ("any",) * len(self.scope.tensors[name].shape)
        else:
            axes = self._stream_axes(expr, name, items)
            if len(items) == len(axes) - 1 and axes[-1] == "any":
                items = (*items, Number(0, "0", expr.span))
        if len(items) != len(axes):
            raise error("L214", f"`{name}` has {len(axes)} dimensions", expr.span,
                        f"{len(items)} indices given")  # fmt: skip
        sizes = self._sizes(name)
        for at, (axis, item, size) in enumerate(zip(axes, items, sizes, strict=True)):
            if axis == "token":
                self._token(name, item)
            else:
                self._place(name, item, size, only_numbers=at == 2)
        return Index(Name(name, expr.base.span), items, expr.span)

    def _stream_axes(self, expr: Index, name: str, items: tuple[Expr, ...]) -> tuple[str, ...]:
        shape = self.scope.shape(name, expr.base.span)
        if shape is None:
            help = suggest(name, self.scope.declared, self.scope.tensors, ["doc"])
            raise error("L201", f"there is no stream or tensor `{name}`", expr.base.span,
                        _elsewhere(self.scope, name), help)  # fmt: skip
        axes = ("token", "any") if shape.heads is None else ("any", "token", "any")
        if shape.dim > 1 and len(items) == len(axes) - 1:
            raise error("L214", f"`{name}` has {len(axes)} dimensions", expr.span, f"it is {shape}",
                        "index each of them, the tokens with `i` or `j`")  # fmt: skip
        return axes

    def _sizes(self, name: str) -> tuple[int, ...]:
        if name in self.scope.tensors:
            return self.scope.tensors[name].shape
        shape = self.scope.shape(name, NOWHERE)
        if shape is None:  # doc
            return (0,)
        return (0, shape.dim) if shape.heads is None else (shape.heads, 0, shape.dim)

    def _place(self, name: str, item: Expr, size: int, only_numbers: bool) -> None:
        """Check an index that is not a token's: constants lie inside, streams take no i and j."""
        known = fold(item)
        if isinstance(known, Number) and (known.value != int(known.value)
                                          or not 0 <= known.value < size):  # fmt: skip
            raise error("L214", f"this index is outside of `{name}`", item.span,
                        f"it is {known.value}, the size is {size}")  # fmt: skip
        if isinstance(known, Number) or name in self.scope.tensors:
            return
        if only_numbers or names(known) != {"h"}:
            raise error("L214", f"`{name}` cannot be read here", item.span,
                        "heads are read at numbers or `h`, their features at numbers",
                        "a `param` can be read anywhere")  # fmt: skip

    def _token(self, name: str, item: Expr) -> None:
        shape = self.scope.shape(name, item.span)
        tokens = "n" if shape is None else shape.tokens  # doc runs along x
        counted = {"i": self.axes.queries, "j": self.axes.keys}
        allowed = {each for each, along in counted.items() if along == tokens}
        if not isinstance(item, Name) or item.id not in allowed:
            shown = " or ".join(f"`{each}`" for each in sorted(allowed)) or "nothing"
            raise error("L214", f"the tokens of `{name}` are read at {shown} here", item.span, "",
                        "`i` are the queries' tokens, `j` the keys'")  # fmt: skip


def _is_whole(expr: Expr) -> bool:
    """Say whether an expression over places is certainly a whole number."""
    match expr:
        case Number(value):
            return isinstance(value, int)
        case Name(id):
            return id in PLACES or id == "seen"
        case Index(Name(id)):
            return id == "doc"
        case Binary("/") | Binary("**"):
            return False
        case Call(name) if name not in ("abs", "min", "max", "clip", "relu"):
            return False
        case _:
            return all(_is_whole(each) for each in syntax.children(expr))


def is_function(call: Expr) -> bool:
    """Tell `sigmoid(s + b)`, the function, from `sigmoid(b = 1)`, the normaliser of that name.

    A name that is both means the function where its arguments read the running value.
    """
    return (
        isinstance(call, Call)
        and call.function in FUNCTIONS
        and any({"s", "p"} & names(arg) for arg in call.args)
    )


def _list(free: frozenset[str]) -> str:
    return " ".join(sorted(free))


def _elsewhere(scope: Scope, name: str) -> str:
    kinds = [kind for kind, each in scope.library.definitions if each == name]
    return f"there is a {kinds[0]} of this name" if kinds else ""


def body(scope: Scope, definition: Definition, call: Expr) -> syntax.Result:
    """Return a definition's value with the arguments of a call in place."""
    values = scope.expand(definition, call)
    last = definition.body[-1] if definition.body else None
    if not isinstance(last, syntax.Result):
        raise error("L220", f"`{definition.name}` has no value", definition.span, "",
                    "end it with an expression")  # fmt: skip
    where = None if last.where is None else put(last.where, values)
    return syntax.Result(put(last.value, values), where, span=last.span)


def inline_stage(scope: Scope, stage: Definition, call: Call) -> Expr:
    """Return a scalar stage used as a function: `elu1(s)`."""
    if len(call.args) != 1 or call.keywords:
        raise error("L209", f"`{stage.name}` takes one plain argument here", call.span)
    result = body(scope, stage, Name(stage.name, call.span))
    if isinstance(result.value, syntax.Pipe):
        raise error("L210", f"`{stage.name}` is a pipeline, not a function", call.span)
    return put(result.value, {"x": call.args[0]})


def resolve(scope: Scope, expr: Expr, kind: str, axes: Axes = Axes()) -> Expr:
    """Return a mask, score or weights expression with every name resolved, folded."""
    visitor = _Resolver(scope, kind, FREE[kind], axes)
    return fold(visitor.want(expr, "truth" if kind == "mask" else "number"))


def shaped(expr: Expr) -> Expr:
    """Fold an elementwise expression, unless that would lose the stream that gives its shape."""
    folded = fold(expr)
    return folded if names(folded) == names(expr) else expr


def resolve_function(scope: Scope, expr: Expr, free: frozenset[str]) -> Expr:
    """Return a scalar expression over the given names (the body of a stage)."""
    return shaped(_Resolver(scope, "stage", free).want(expr, "number"))


def resolve_normalizer(scope: Scope, expr: Expr, axes: Axes) -> Normalizer:
    """Return a normaliser, taken apart into numerator and denominator (L220)."""
    visitor = _Resolver(scope, "normalize", FREE["normalize"], axes)
    name, value, where = "", expr, None
    with ExitStack() as open_:
        while (
            isinstance(value, Name | Call)
            and not is_function(value)
            and (definition := scope.library.find("normalize", _head(value)))
        ):
            open_.enter_context(scope.inside(definition, expr.span))
            result = body(scope, definition, value)
            name = name or definition.name
            value, where = result.value, result.where
        done = fold(visitor.want(value, "number"))
    span = value.span
    name = name or "in place"
    if where is not None:
        if where != Compare((Name("sum"), Number(1)), ("==",)):
            raise error("L220", "the condition of a threshold must be `sum == 1`", where.span)
        if "tau" not in names(done) or "sum" in names(done):
            raise error("L220", "a threshold normaliser reads `tau` and not `sum`", span)
        return Normalizer(name, done, None, where)
    if "tau" in names(done):
        raise error("L220", "`tau` needs a condition", span, "", "add `where sum == 1`")
    if "sum" not in names(done):
        return Normalizer(name, done)
    match done:
        case Binary("/", above, below) if "sum" not in names(above):
            return Normalizer(name, above, below)
    raise error("L220", "`sum` belongs in the denominator", span, "",
                "write it as numerator / (… sum …)")  # fmt: skip


def _head(expr: Name | Call) -> str:
    return expr.id if isinstance(expr, Name) else expr.function
