"""Operations on streams that have their operands: arithmetic, sums of features, rows of a map.

exp(dot(a, b)) * o      a product of a and b, its sum over the features, and elementwise
                        exp(a0) * a1 of that sum and o
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ...grammar.diagnostics import error
from ...grammar.expr import rebuild
from ...grammar.functions import STATISTICS, VECTOR_FUNCTIONS
from ...grammar.source import Span
from ...grammar.syntax import Binary, Call, Expr, Name, children, walk
from ...ops import OPS, Mismatch, Shape
from ..algebra.normalizers import exponential
from ..model import Apply, Flow, Mixing, Pairwise, Read, Statistic
from .expressions import plain
from .scalars import Axes, resolve, streams_read
from .scope import Scope


def applied(
    op: str,
    options: Mapping[str, Any],
    inputs: tuple[Flow, ...],
    span: Span,
    places: Mapping[str, Span] = MappingProxyType({}),
) -> Apply:
    """Return an operation on its inputs, its shape checked (L203, L206).

    `places` say where its options are written.
    """
    shapes = [each.shape for each in inputs]
    try:
        shape = OPS[op].shape(shapes, options)
    except Mismatch as problem:
        where = places.get(problem.at, span)
        raise error("L206", problem.message, where, problem.label, problem.help) from None
    if shape.features > 1 << 24:
        raise error("L203", "this stage is too wide", span, f"{shape.features:,} features")
    module = OPS[op].suffix if OPS[op].weights(shapes, options) else ""
    return Apply(op, inputs, tuple(options.items()), shape, module, span)


def composed(expr: Expr, operands: tuple[Flow, ...], span: Span) -> Flow:
    """Return an expression over a0, a1, …, with an operation for each sum over features in it."""
    read: list[Flow] = []

    def operand(flow: Flow) -> Expr:
        if flow not in read:
            read.append(flow)
        return Name(f"a{read.index(flow)}")

    def visit(part: Expr) -> Expr:
        match part:
            case Name(id) if id.startswith("a"):
                return operand(operands[int(id[1:])])
            case Call(name, args) if name in VECTOR_FUNCTIONS:
                return operand(
                    _of_features(part, [composed(arg, operands, part.span) for arg in args])
                )
        return rebuild(part, visit)

    inside = visit(expr)
    if not read:
        raise error("L208", "this is a number, not a stream", span)
    if inside == Name("a0") and expr != Name("a0"):
        return read[0]
    return applied("pointwise", {"expr": inside}, tuple(read), span)


def _of_features(call: Call, args: list[Flow]) -> Flow:
    """Return `sum`, `mean`, `norm` or `dot` over the features of each token (L216)."""
    if call.function != "dot":
        return applied("reduce", {"by": call.function}, (args[0],), call.span)
    one, two = (each.shape for each in args)
    if one.features != two.features or (one.heads and two.heads and one.heads != two.heads):
        raise error("L216", "`dot` takes two vectors of one size", call.span, f"{one} and {two}")
    product = Binary("*", Name("a0"), Name("a1"), call.span)
    return applied("reduce", {"by": "sum"}, (composed(product, tuple(args), call.span),), call.span)


def reduces(expr: Expr | None) -> bool:
    """Say whether an expression gives one feature whatever its operands have."""
    match expr:
        case None | Name():
            return False
        case Call(name) if name in VECTOR_FUNCTIONS:
            return True
    read = [each for each in children(expr) if any(isinstance(part, Name) for part in walk(each))]
    return bool(read) and all(map(reduces, read))


def exactly(stage: Expr, args: tuple[Expr, ...], count: int) -> tuple[Expr, ...]:
    """Return the arguments of a call that takes so many, and no keywords (L209)."""
    keywords = stage.keywords if isinstance(stage, Call) else ()
    if len(args) != count or keywords:
        name = getattr(stage, "function", getattr(stage, "id", ""))
        raise error(
            "L209",
            f"`{name}` takes {plain(count)}",
            stage.span,
            f"{len(args) + len(keywords)} given",
        )
    return args


def statistic(scope: Scope, call: Call, kind: str) -> Statistic:
    """Return `lse(o)`, `entropy(o)`, `rows(o, e)` or `columns(o, e)` (L228)."""
    args = exactly(call, call.args, STATISTICS[call.function])
    of, flow = _attention(scope, kind, args[0], call.span)
    expr: Expr | None = None
    reads: tuple[Read, ...] = ()
    if len(args) == 2:
        heads = flow.heads // (flow.inputs[1].shape.heads or 1)
        axes = Axes(flow.queries, flow.keys, heads)
        expr = resolve(scope, args[1], "statistic", axes)
        reads = streams_read(scope, (expr,), ())
    tokens = flow.keys if kind == "columns" else flow.queries
    return Statistic(kind, expr, (of, *reads), Shape(tokens, 1, flow.heads), call.span)


def _attention(scope: Scope, kind: str, arg: Expr, span: Span) -> tuple[Read, Mixing]:
    """Return the attention that a number of its rows is asked of (L228)."""
    name = arg.id if isinstance(arg, Name) else ""
    shape = scope.shape(name, span) if name else None
    flow = scope.streams[scope.own(name)].flow if scope.own(name) in scope.streams else None
    if not (isinstance(flow, Mixing) and isinstance(flow.mix, Pairwise)) or shape is None:
        raise error(
            "L228",
            f"`{kind}` is of an attention's rows",
            arg.span,
            "this is no attention",
            "name `o`, or a branch that attends and has no `out` of its own",
        )
    if kind in ("lse", "entropy", "joint") and exponential(flow.mix.normalize) is None:
        raise error(
            "L228",
            f"`{kind}` needs a normaliser like softmax",
            arg.span,
            f"`{name}` has {flow.mix.normalize.name}",
            "its numerator must be exp(…), what is added to `sum` positive",
        )
    return Read(scope.own(name), shape, arg.span), flow


def joint(scope: Scope, call: Call) -> Apply:
    """`joint(a, b, …)`: what attention to the keys of all would give (L209, L228)."""
    if len(call.args) < 2 or call.keywords:
        raise error("L209", "`joint` takes two attentions or more", call.span)
    for each in call.args:
        _attention(scope, "joint", each, call.span)
    logs = [statistic(scope, Call("lse", (each,), (), call.span), "joint") for each in call.args]
    return applied("joint", {}, (*(each.inputs[0] for each in logs), *logs), call.span)
