"""Scalar expressions: masks, scores, normalisers and weights, with every name resolved.

`resolve` replaces names by what they stand for (sizes by numbers, definitions by their
bodies) and checks kinds (a mask is true or false, the rest are numbers) and indices.

    mask = causal and window(w)   →   j <= i and abs(i - j) < 256
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

from ...grammar import syntax
from ...grammar.diagnostics import error
from ...grammar.expr import PLACES, fold, names, number, rebuild
from ...grammar.functions import (
    FUNCTIONS,
    GROUPED,
    MAP_FUNCTIONS,
    MIXER_FUNCTIONS,
    STATISTICS,
    VECTOR_FUNCTIONS,
)
from ...grammar.show import show
from ...grammar.syntax import (
    POOLED,
    Binary,
    Call,
    Compare,
    Definition,
    Expr,
    Index,
    Name,
    Number,
    walk,
)
from ...ops import Shape
from ...ops.shape import pooling
from ..algebra.thresholds import require
from ..algebra.trends import Unclear
from ..model import MAPS, Apply, Mixing, Normalizer, Pairwise, Read, Statistic, Stream, elsewhere
from .depth import place_of
from .expressions import Dims, Resolver, Value, plain
from .library import put
from .scope import Scope, body, suggest
from .settled import finite, settled, weighs_nothing

FREE = {
    "mask": PLACES,
    "similarity": PLACES,
    "score": PLACES | {"s", "seen"},
    "normalize": PLACES | {"s", "seen", "sum", "tau"},
    "weights": PLACES | {"p", "seen"},
    "select": PLACES | {"s"},
    "keep": PLACES | {"s", "p"},
    "statistic": PLACES | {"p", "seen"},
}
_OF_MAPS = ("score", "weights", "statistic", "select", "keep")  # what may look at other pairs
_CALLED = {"normalize": "a normaliser", "weights": "`weights`", "statistic": "`rows` or `columns`",
           "keep": "`keep`", "stage": "a function of streams"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Axes:
    """The tokens that i and j count, and how many query heads share a key head."""

    queries: str = "n"
    keys: str = "n"
    group: int = 1


@dataclass(frozen=True)
class _Resolver(Resolver):
    """A number for every pair; vectors are read whole: `t[i]`, `w[h]`."""

    scope: Scope
    what: str  # mask, similarity, score, normalize, weights, stage
    free: frozenset[str]
    axes: Axes = Axes()

    @property
    def called(self) -> str:
        """What a message calls this kind of expression."""
        return _CALLED.get(self.what, f"a {self.what}")

    def scalar(self, expr: Expr, truth: bool = False) -> Expr:
        """Resolve an expression that must be one number a pair, or one truth (L210)."""
        found = self.truth(expr) if truth else self.number(expr)
        if found.dims:
            kind = "a vector" if len(found.dims) == 1 else "a matrix"
            raise error(
                "L210",
                "this must be one number a pair",
                expr.span,
                f"it is {kind}, {list(found.dims)}",
                "bring it to a number with `dot`, `sum`, `mean` or `norm`, or index it",
            )
        return found.expr

    def as_truth(self, value: Value) -> Value | None:
        """A stream made by a comparison holds 1 and 0: `keep[j]` is true where it is not 0."""
        match value.expr:
            case Index(Name(name)) if name in self.scope.streams:
                flow = self.scope.streams[name].flow
                if isinstance(flow, Apply) and _says(dict(flow.options).get("expr")):
                    asked = Compare((value.expr, Number(0)), ("!=",), value.expr.span)
                    return Value(asked, value.dims, True)
        return None

    def other(self, expr: Expr) -> Value:
        match expr:
            case syntax.Attribute() if place_of(expr) is not None:
                return Value(self._elsewhere(expr))
        if isinstance(expr, syntax.Pipe) and self.what == "score":
            return Value(self._compose(expr.head, expr.stages))
        raise error(
            "L210",
            "this has no meaning here",
            expr.span,
            f"{self.called} is an expression over {_list(self.free)}",
        )

    def name(self, expr: Name) -> Value:
        scope, id = self.scope, expr.id
        if id == "o" and self.what == "keep":  # what the pair's query has mixed
            return Value(expr, (int(scope.numbers["value_dim"]),))
        if id in self.free:
            return Value(expr)
        if definition := scope.library.find(self.what, id):
            return self._definition(definition, expr)
        if id in scope.numbers:
            return Value(number(scope.numbers[id], expr))
        if self.what == "similarity" and id in ("q", "k"):
            head = Name("h") if id == "q" else self._key_head()
            token = Name("i" if id == "q" else "j")
            found = self.index(Index(expr, (head, token), expr.span))
            assert isinstance(found.expr, Index)
            whole = replace(found.expr, items=found.expr.items[:2])
            return Value(whole, found.dims or (1,))  # also where it has one feature
        own = scope.own(id)
        if own in scope.tensors:
            shape, base = scope.tensors[own].shape, Name(own, expr.span)
            if own in scope.per_head:
                return Value(Index(base, (Name("h"),), expr.span), self._vector(expr, shape[1:]))
            return Value(Index(base, (), expr.span), self._vector(expr, shape))
        if own in scope.declared or id == "doc" or own in scope.inputs:
            raise error(
                "L214",
                f"`{id}` must be indexed here",
                expr.span,
                "",
                f"write `{id}[i]`, `{id}[j]` or `{id}[h, i]`",
            )
        if mask := self._mask(id):
            return self._truth(mask, expr)
        known = (
            self.free,
            scope.library.known(self.what),
            scope.numbers,
            scope.tensors,
            scope.declared,
        )
        where = _elsewhere(scope, id)
        raise error(
            "L201", f"`{id}` is not known in {self.called}", expr.span, where, suggest(id, *known)
        )

    def _key_head(self) -> Expr:
        """Return which head of k a query head reads."""
        group = self.axes.group
        return Name("h") if group == 1 else Binary("//", Name("h"), number(group, Name("h")))

    @staticmethod
    def _vector(expr: Expr, dims: Dims) -> Dims:
        if len(dims) > 2:
            raise error(
                "L214",
                "this has too many dimensions here",
                expr.span,
                f"it is {list(dims)}",
                "index it",
            )
        return dims

    def _elsewhere(self, expr: syntax.Attribute) -> Expr:
        """`previous.s` in a score, `previous.p` in weights: the map of another layer (L214)."""
        if (self.what, expr.name) not in (("score", "s"), ("weights", "p")):
            named = f"give the stream a name first: `let below = {show(expr)}`"
            maps = "a score reads `previous.s`, weights read `previous.p`"
            raise error(
                "L214",
                f"`{show(expr)}` cannot be read here",
                expr.span,
                "",
                maps if expr.name in MAPS else named,
            )
        found = self.scope.elsewhere(expr)
        assert found is not None
        self.scope.maps_read[found.name] = found
        return Name(found.name, expr.span)

    def _sum_streams(self, expr: Call) -> Expr:
        """Return the sum of an expression over the heads of streams that tokens alone index (L216).

        `sum_streams(w[i] * relu(dot(a[i], c[j])))`: a has heads of its own, w a number for each.
        """
        if len(expr.args) != 1 or expr.keywords:
            given = len(expr.args) + len(expr.keywords)
            raise error("L209", "`sum_streams` takes one argument", expr.span, f"{given} given")
        counts: dict[int, str] = {}

        def headed(node: Index) -> int | None:
            if not isinstance(node.base, Name) or len(node.items) != 1:
                return None
            shape = self.scope.shape(node.base.id, node.base.span)
            return None if shape is None else shape.heads

        for node in walk(expr.args[0]):
            if isinstance(node, Index) and (heads := headed(node)) is not None:
                assert isinstance(node.base, Name)
                counts[heads] = node.base.id
        if len(counts) != 1:
            found = ", ".join(f"`{name}` has {count}" for count, name in counts.items())
            raise error(
                "L216",
                "`sum_streams` sums over the heads of streams, all of the same number",
                expr.span,
                found or "none of these has heads",
                "index a stream with heads by its token alone: `a[i]`",
            )
        (count,) = counts

        def of(head: int, node: Expr, inside: bool) -> Expr:
            if isinstance(node, Index):
                place = Number(head, str(head), node.span)
                if headed(node) is not None:
                    return replace(node, items=(place, *node.items))
                return node if inside or len(node.items) != 1 else replace(
                    node, items=(*node.items, place)
                )  # fmt: skip
            inside = inside or (isinstance(node, Call) and node.function in VECTOR_FUNCTIONS)
            return rebuild(node, lambda each: of(head, each, inside))

        total, *rest = (of(head, expr.args[0], False) for head in range(count))
        for each in rest:
            total = Binary("+", total, each, expr.span)
        return total

    def call(self, expr: Call) -> Value | None:
        name = expr.function
        if name == "sum_streams" and "j" in self.free:
            return self.number(self._sum_streams(expr))
        if self.what == "stage" and name in VECTOR_FUNCTIONS:
            return self._of_features(expr)
        definition = self.scope.library.find(self.what, name)
        function = is_function(expr) or name in VECTOR_FUNCTIONS
        function |= self.what == "normalize" and name in FUNCTIONS  # a part of a normaliser
        if definition is not None and not function and self.what != "stage":  # stages: functions
            return self._definition(definition, expr)
        if name in ("row", "col") and len(expr.args) == 1 and not expr.keywords:
            if self.scope.grid is None:
                raise error(
                    "L214",
                    f"`{name}` needs a grid",
                    expr.span,
                    "",
                    "set `grid = (rows, cols)` in the block, or `image` in the model's `patches`",
                )
            cols = number(self.scope.grid[1], expr)
            op = "//" if name == "row" else "%"
            return Value(Binary(op, self.scalar(expr.args[0]), cols, expr.span))
        if name in MAP_FUNCTIONS and self.what in _OF_MAPS:
            return Value(self._of_map(expr))
        if name == "ispow2" and len(expr.args) == 1 and not _is_whole(self.scalar(expr.args[0])):
            raise error(
                "L210",
                "`ispow2` asks about a whole number",
                expr.args[0].span,
                "",
                "`//` divides whole numbers",
            )
        function = name in FUNCTIONS or name in VECTOR_FUNCTIONS
        if not (function or self.scope.library.find("stage", name)) and (mask := self._mask(name)):
            return self._truth(mask, expr)
        return None

    def _contract(self, expr: Binary, a: Value, b: Value) -> Value:
        if self.what == "stage":
            raise error(
                "L216",
                "`@` is not of streams",
                expr.span,
                "",
                "`dot(a, b)` is the product of their features",
            )
        return super()._contract(expr, a, b)

    def _of_features(self, expr: Call) -> Value:
        """Resolve a function over the features of streams; the flow it becomes checks shapes."""
        name, arity = expr.function, VECTOR_FUNCTIONS[expr.function]
        if name == "outer":
            raise error(
                "L201",
                "`outer` is not a function of streams",
                expr.span,
                "a matrix is no stream",
                "a mixer and a score may use it",
            )
        if len(expr.args) != arity or expr.keywords:
            raise error(
                "L209",
                f"`{name}` takes {plain(arity)}",
                expr.span,
                f"{len(expr.args) + len(expr.keywords)} given",
            )
        args = tuple(self.number(each).expr for each in expr.args)
        return Value(Call(name, args, (), expr.span))

    def unknown(self, expr: Call) -> Exception:
        name = expr.function
        if misplaced := _misplaced(name):
            return error("L201", f"`{name}` cannot be read in {self.called}", expr.span, *misplaced)
        more = MAP_FUNCTIONS if self.what in _OF_MAPS else ()
        known = (FUNCTIONS, VECTOR_FUNCTIONS, more, self.scope.library.known(self.what))
        return error(
            "L201",
            f"`{name}` is neither a function nor {self.called}",
            expr.span,
            _elsewhere(self.scope, name),
            suggest(name, *known),
        )

    def _of_map(self, expr: Call) -> Expr:
        """Resolve a call that reads other pairs: `sum_keys(e)`, `mix_heads(e, w)`."""
        name, arity = expr.function, MAP_FUNCTIONS[expr.function]
        if len(expr.args) != arity or expr.keywords:
            given = len(expr.args) + len(expr.keywords)
            raise error("L209", f"`{name}` takes {plain(arity)}", expr.span, f"{given} given")
        if name == "coin":
            rate = self.scope.number(expr.args[0], "the rate of `coin`")
            if not 0 <= rate <= 1:
                raise error("L219", "a rate lies in 0 <= rate <= 1", expr.span, f"it is {rate}")
            return Call(name, (number(rate, expr),), (), expr.span)
        value = self.scalar(expr.args[0])
        if arity == 1:
            return Call(name, (value,), (), expr.span)
        if name in GROUPED:
            return self._of_group(expr, value)
        kernel = expr.args[1]
        own = self.scope.own(kernel.id) if isinstance(kernel, Name) else ""
        shape = self.scope.tensors[own].shape if own in self.scope.tensors else None
        heads = int(self.scope.numbers["heads"])
        fits = (
            shape == (heads, heads)
            if name == "mix_heads"
            else (
                shape is not None and (len(shape) == 2 or (len(shape) == 3 and shape[0] == heads))
            )
        )
        if not fits:
            wanted = (
                "[heads, heads]"
                if name == "mix_heads"
                else ("[heads, queries, keys] or [queries, keys]")
            )
            raise error(
                "L216",
                f"`{name}` takes a tensor {wanted}",
                kernel.span,
                "this is none" if shape is None else f"it is {list(shape)}",
                "declare it as a `param` and name it here",
            )
        return Call(name, (value, Index(Name(own, kernel.span), (), kernel.span)), (), expr.span)

    def _of_group(self, expr: Call, value: Expr) -> Expr:
        """Resolve a function over the keys of a group: `sum_group(e, j // 64)`."""
        group = fold(self.scalar(expr.args[1]))
        match group:
            case Name("j"):
                return value
            case Binary("//", Name("j"), Number(size)) if size >= 1 and size == int(size):
                return Call(expr.function, (value, group), (), expr.span)
        raise error(
            "L216",
            f"`{expr.function}` takes groups of keys that stand together",
            expr.args[1].span,
            f"it is `{show(group)}`",
            "write `j // 64`",
        )

    def _definition(self, definition: Definition, call: Expr) -> Value:
        with self.scope.inside(definition, call.span):
            return self.visit(body(self.scope, definition, call).value)

    def _mask(self, name: str) -> Definition | None:
        """Return the mask of a name: expressions of a pair may ask who sees whom."""
        return self.scope.library.find("mask", name) if "j" in self.free else None

    def _truth(self, mask: Definition, call: Expr) -> Value:
        return replace(self, what="mask", free=FREE["mask"])._definition(mask, call)

    def _compose(self, head: Expr | None, stages: tuple[Expr, ...]) -> Expr:
        done = Name("s") if head is None else self.scalar(head)
        for stage in stages:
            done = put(self.scalar(stage), {"s": done})
        return done

    def _of_map_beside(self, expr: Index, base: syntax.Attribute) -> Value:
        """`near.p[h, i, j // 16]`: the weights of a branch, at any of its keys (L214)."""
        scope, branch = self.scope, base.base
        name = scope.own(branch.id) if isinstance(branch, Name) else ""
        if name:
            scope.shape(name, base.span)
        stream = scope.streams.get(name)
        mixing = stream.flow if stream is not None else None
        if self.what != "select" or base.name != "p" or not isinstance(mixing, Mixing) or not (
            isinstance(mixing.mix, Pairwise) and mixing.mix.keep is None
        ):  # fmt: skip
            raise error(
                "L214",
                f"`{show(base)}` cannot be read here",
                expr.span,
                "",
                "the score of a `select` reads the weights of a branch that holds all its keys: "
                "`near.p[h, i, j]`",
            )
        items = tuple(self.scalar(each) for each in expr.items)
        shape = Shape(mixing.queries, 1, mixing.heads)
        along = len(items) == 3 and items[1] == Name("i") and mixing.queries == self.axes.queries
        if not along or not names(items[2]) <= {"h", "i", "j"}:
            raise error(
                "L214",
                f"`{show(base)}` is read at a head, at `i`, and at a number made of `i` and `j`",
                expr.span,
                "",
                f"write `{show(base)}[h, i, j // 16]`",
            )
        own = f"{name}.weights"
        if own not in scope.streams:
            read = Read(name, mixing.shape, base.span)
            scope.streams[own] = Stream(own, Statistic("map", None, (read,), shape, base.span))
        self._place(own, items[0], mixing.heads, only_numbers=False)
        place = Call(POOLED, (items[2],), (), items[2].span)
        return Value(Index(Name(own, base.span), (*items[:2], place), expr.span))

    def index(self, expr: Index) -> Value:
        if isinstance(expr.base, syntax.Attribute):
            return self._of_map_beside(expr, expr.base)
        if not isinstance(expr.base, Name):
            raise error("L214", "only a stream or a tensor can be indexed", expr.base.span)
        name = self.scope.own(expr.base.id)
        items = tuple(map(_plain, map(self.scalar, expr.items)))
        axes: tuple[str, ...]
        sizes: tuple[int, ...]
        if name == "doc":
            axes, sizes = ("token",), (0,)
        elif name in self.scope.tensors:
            sizes = self.scope.tensors[name].shape
            axes = ("any",) * len(sizes)
        else:
            shape = self._stream(expr, name)
            axes, sizes = ("token", "any"), (0, shape.dim)
            if shape.heads is not None:
                axes, sizes = ("any", *axes), (shape.heads, *sizes)
            if shape.dim == 1 and len(items) == len(axes) - 1:
                items = (*items, Number(0, "0", expr.span))
        if len(items) > len(axes) or "token" in axes[len(items) :]:
            raise error(
                "L214",
                f"`{name}` has {len(axes)} dimensions",
                expr.span,
                f"{len(items)} indices given",
                "index each of them, the tokens with `i` or `j`",
            )
        for at, (axis, item, size) in enumerate(zip(axes, items, sizes, strict=False)):
            if axis == "token":
                if self._token(name, item):
                    items = (*items[:at], Call(POOLED, (item,), (), item.span), *items[at + 1 :])
            else:
                self._place(name, item, size, only_numbers=at == 2)
        dims = self._vector(expr, sizes[len(items) :])
        return Value(Index(Name(name, expr.base.span), items, expr.span), dims)

    def _stream(self, expr: Index, name: str) -> Shape:
        shape = self.scope.shape(name, expr.base.span)
        if shape is None:
            help = suggest(name, self.scope.declared, self.scope.tensors, ["doc"])
            raise error(
                "L201",
                f"there is no stream or tensor `{name}`",
                expr.base.span,
                _elsewhere(self.scope, name),
                help,
            )
        return shape

    def _place(self, name: str, item: Expr, size: int, only_numbers: bool) -> None:
        """Check an index that is not a token's: constants lie inside, streams take no i and j."""
        known = fold(item)
        if isinstance(known, Number) and (
            known.value != int(known.value) or not 0 <= known.value < size
        ):
            raise error(
                "L214",
                f"this index is outside of `{name}`",
                item.span,
                f"it is {known.value}, the size is {size}",
            )
        if isinstance(known, Number) or name in self.scope.tensors:
            return
        if only_numbers or names(known) != {"h"}:
            raise error(
                "L214",
                f"`{name}` cannot be read here",
                item.span,
                "heads are read at numbers or `h`, their features at numbers",
                "a `param` can be read anywhere",
            )

    def _token(self, name: str, item: Expr) -> bool:
        """Check where a stream is read; say whether it is pooled, and read at any of its tokens."""
        shape = self.scope.shape(name, item.span)
        tokens = "n" if shape is None else shape.tokens  # doc runs along x
        counted = {"i": self.axes.queries, "j": self.axes.keys}
        allowed = {each for each, along in counted.items() if along == tokens}
        if item in [Name(each) for each in allowed]:
            return False
        of, stride = pooling(tokens)
        sides = {each for each, along in counted.items() if pooling(along)[0] == of}
        one_side = len(names(item) & {"i", "j"}) == 1 and names(item) <= sides
        if stride > 1 and one_side and not any(isinstance(each, Index) for each in walk(item)):
            return True
        indexed = any(isinstance(each, Index) for each in syntax.walk(item))
        fits = name != "doc" and elsewhere(name) is None and not indexed
        if fits and "j" in allowed and names(item) == {"j"}:  # another key's token
            return False
        shown = " or ".join(f"`{each}`" for each in sorted(allowed)) or "nothing"
        raise error(
            "L214",
            f"the tokens of `{name}` are read at {shown} here",
            item.span,
            "",
            "`i` are the queries' tokens, `j` the keys', `j // 4 * 4` another key's",
        )


def _plain(item: Expr) -> Expr:
    """Return `i` for what is only written another way, `i // 1`; any other index as it is."""
    folded = fold(item)
    return folded if isinstance(folded, Name) else item


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


def _misplaced(name: str) -> tuple[str, str] | None:
    """Return the label and help for a function that is read in other places only."""
    if name in MAP_FUNCTIONS:
        return "it looks at other pairs", "scores, weights, `rows` and `columns` may"
    if name in MIXER_FUNCTIONS:
        return "it is of vectors or matrices", "a mixer may use it"
    if name in STATISTICS or name == "joint":
        return "it is a stream, not a number a pair", "name it with `let` and index it"
    return None


def _elsewhere(scope: Scope, name: str) -> str:
    kinds = [kind for kind, each in scope.library.definitions if each == name]
    return f"there is a {kinds[0]} of this name" if kinds else ""


def resolve(
    scope: Scope, expr: Expr, kind: str, axes: Axes = Axes(), selected: Expr | None = None
) -> Expr:
    """Return a mask, score or weights expression with every name resolved, folded.

    `selected` is what that name stands for in it: the score of a selection.
    """
    free = FREE[kind] if selected is None else FREE[kind] | {"selected"}
    visitor = _Resolver(scope, kind, free, axes)
    done = settled(visitor.scalar(expr, truth=kind == "mask"), int(scope.numbers["heads"]))
    if selected is not None:
        done = put(done, {"selected": selected})
    if kind == "score":
        weighs_nothing(done)
        return done
    return finite(done)


def shaped(expr: Expr) -> Expr:
    """Fold an elementwise expression, unless that would lose the stream that gives its shape."""
    folded = finite(settled(expr))
    return folded if names(folded) == names(expr) else expr


def resolve_function(scope: Scope, expr: Expr, free: frozenset[str]) -> Expr:
    """Return a scalar expression over the given names (the body of a stage)."""
    visitor = _Resolver(scope, "stage", free)
    if visitor.visit(expr).truth:
        said = visitor.scalar(expr, truth=True)
        return Call("where", (said, Number(1), Number(0)), (), expr.span)
    return shaped(visitor.scalar(expr))


def _says(expr: object) -> bool:
    """Say whether an elementwise expression is true or false, held as 1 and 0."""
    match expr:
        case Call("where", (_, Number(1), Number(0))):
            return True
    return False


def resolve_normalizer(
    scope: Scope, expr: Expr, axes: Axes, where: Expr | None, score: Expr
) -> Normalizer:
    """Return a normaliser of a score, taken apart into numerator and denominator (L220)."""
    visitor = _Resolver(scope, "normalize", FREE["normalize"], axes)
    name, value = "", expr
    with ExitStack() as open_:
        while (
            isinstance(value, Name | Call)
            and not is_function(value)
            and (definition := scope.library.find("normalize", _head(value)))
        ):
            open_.enter_context(scope.inside(definition, expr.span))
            result = body(scope, definition, value)
            name = name or definition.name
            value, where = result.value, result.where or where
        done = settled(visitor.scalar(value), int(scope.numbers["heads"]))
        infinite = weighs_nothing(score)
        finite(done, frozenset({"s"} if infinite else ()))
    span = value.span
    name = name or "in place"
    if where is not None:
        if where != Compare((Name("sum"), Number(1)), ("==",)):
            raise error("L220", "the condition of a threshold must be `sum == 1`", where.span)
        if "tau" not in names(done) or "sum" in names(done):
            raise error("L220", "a threshold normaliser reads `tau` and not `sum`", span)
        match done:
            case Call("exp", (Binary("-", logit, Name("tau")),)) if "tau" not in names(logit):
                # Σ exp(logit - tau) = 1 says that tau is the logarithm of the row sum.
                return Normalizer(name, Call("exp", (logit,), (), done.span), Name("sum"))
        if infinite:
            raise error(
                "L219",
                "a threshold needs finite logits",
                span,
                "the score may be minus infinity",
                "say in `mask` what is not seen",
            )
        try:
            require(done)
        except Unclear as problem:
            raise error(
                "L220",
                "no threshold can be found for these weights",
                problem.expr.span if value is expr else expr.span,
                f"`{show(problem.expr)}`: {problem}",
                "the weights must rise or fall with `tau` everywhere, from 0 to 1 or more, "
                "and read `s` beside it, as in `relu(s - tau)`",
            ) from None
        return Normalizer(name, done, None, where)
    if "tau" in names(done):
        raise error("L220", "`tau` needs a condition", span, "", "add `where sum == 1`")
    if "sum" not in names(done):
        return Normalizer(name, done)
    match done:
        case Binary("/", above, below) if "sum" not in names(above):
            return Normalizer(name, above, below)
    raise error(
        "L220", "`sum` belongs in the denominator", span, "", "write it as numerator / (… sum …)"
    )


def _head(expr: Name | Call) -> str:
    return expr.id if isinstance(expr, Name) else expr.function


def streams_read(
    scope: Scope, exprs: tuple[Expr, ...], first: tuple[Read, ...]
) -> tuple[Read, ...]:
    """Return the streams that come first, and every other that resolved expressions read."""
    found = {each.name: each for each in first}
    known = scope.streams.keys() | scope.inputs.keys()
    for node in (node for expr in exprs for node in syntax.walk(expr)):
        if isinstance(node, Name) and node.id in known and node.id not in found:
            shape = scope.shape(node.id, node.span)
            assert shape is not None
            found[node.id] = Read(node.id, shape, node.span)
    return tuple(found.values())
