"""Pipelines: `x | linear(512) | rms_norm | split` as operations with shapes and names.

A pipeline is elaborated in three steps: named stages are replaced by their bodies; what the
target needs is carried back through the stages, so that `linear` and `split` know the sizes
nobody wrote; then shapes run forward and every stage checks what it is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ...grammar import syntax
from ...grammar.diagnostics import did_you_mean, error
from ...grammar.expr import rebuild
from ...grammar.functions import FUNCTIONS, MAP_FUNCTIONS, STATISTICS, VECTOR_FUNCTIONS
from ...grammar.show import show
from ...grammar.source import Span
from ...grammar.syntax import Binary, Call, Compare, Definition, Expr, Name, Number, Unary
from ...ops import OPS, UNNAMED, Op, Shape
from ...ops.shape import pooling
from ..model import (
    MAPS,
    OFFERED,
    Apply,
    Block,
    Flow,
    Part,
    Read,
    Stream,
    Taken,
    flow_mapped,
    flow_nodes,
    is_part,
)
from .arithmetic import applied, composed, exactly, joint, reduces, statistic
from .library import is_once, put
from .moving import expect_moved, moved_shape, several_times
from .names import module_name
from .options import bound, option_value
from .routing import as_experts
from .scalars import resolve_function, shaped
from .scope import Scope, body, inline_stage, suggest
from .taken import between, expect_taken, most_taken, unpaired

OFFERS = {  # where a model gives them
    "earlier": "a model without `lanes` has it",
    "condition": "every model has it, given at each call",
    "tokens": "a model with a `vocab` has it, unless learned tokens stand in front (`memory`)",
    "turn": "every model has it: how often the layer has run before",
}
MEANS = {"mean": "average", "mean_each": "average_each"}  # over a batch, in training


@dataclass(frozen=True, slots=True)
class Target:
    """What a pipeline is for: its name, and the shape it must have (None: any).

    The tokens of the shape only say what it would run along; any will do. What only training does
    may take means over the `batch`.
    """

    name: str
    shape: Shape | None = None
    batch: bool = False

    @property
    def module(self) -> str:
        return "o" if self.name == "out" else self.name


@dataclass(frozen=True, slots=True)
class _Stage:
    """One operation with the arguments that were written, and further streams it reads."""

    op: Op
    options: dict[str, Any]
    others: tuple[Flow, ...]
    span: Span
    places: dict[str, Span] = field(default_factory=dict)  # of what was written for an option


@dataclass(frozen=True, slots=True)
class _Whole:
    """A stage that is a part, made for what it is given; `module` is its own name or a suffix."""

    make: Callable[[Shape], Block]
    module: str
    span: Span
    others: tuple[Flow, ...] = ()
    once: Span | None = None  # where the text is that its tensors belong to, if shared
    taken: Taken | None = None


def elaborate(scope: Scope, expr: Expr, target: Target) -> Flow:
    """Return the flow of a pipeline, its submodules named, its final shape checked (L207)."""
    flow = name_modules(_flow(scope, expr, target), target)
    if target.shape is not None and replace(target.shape, tokens=flow.shape.tokens) != flow.shape:
        label = f"it is {flow.shape}, needed is {target.shape}"
        raise error(
            "L207",
            f"`{target.name}` does not have the shape that is needed",
            expr.span,
            label,
            _repair(flow.shape, target),
        )
    if target.shape is not None and _stays_wide(scope, flow):
        flow = applied("pointwise", {"expr": Name("a0")}, (flow,), expr.span)
    if target.shape is not None and not _reads_streams(scope, flow):
        raise error(
            "L208",
            f"`{target.name}` reads no stream",
            expr.span,
            "it is made of tensors alone",
            "begin with a stream; `latents(count)` is a learned list of tokens",
        )
    return flow


def regularizing(scope: Scope, value: Expr) -> Flow:
    """Return the flow of the one number that training adds to the loss (L229)."""
    flow = elaborate(scope, value, Target("regularize", batch=True))
    if flow.shape != Shape("1", 1):
        raise error(
            "L229",
            "`regularize` is one number",
            value.span,
            f"it is {flow.shape}",
            "take the mean of each term: `0.01 * mean(entropy(o))`",
        )
    return flow


def moving(scope: Scope, update: syntax.Update) -> Stream:
    """Return what a forward pass in training sets a tensor to (L244)."""
    wanted = moved_shape(scope, update)
    flow = elaborate(scope, update.value, Target(f"{update.name} <-", batch=True))
    expect_moved(scope, update, flow, wanted)
    return Stream(update.name, flow)


def _stays_wide(scope: Scope, flow: Flow) -> bool:
    """Say whether a flow stays float32 where the block is in less."""
    match flow:
        case Read(name):
            own = scope.streams.get(name)
            return own is not None and _stays_wide(scope, own.flow)
        case Apply(op):
            return OPS[op].wide
    return False


def _reads_streams(scope: Scope, flow: Flow) -> bool:
    """Say whether a flow begins with a stream somewhere, not with tensors alone."""
    match flow:
        case Read(name):
            own = scope.streams.get(name)
            return name not in scope.tensors and (own is None or _reads_streams(scope, own.flow))
        case Apply(inputs=inputs) | Part(inputs=inputs):
            return any(_reads_streams(scope, each) for each in inputs)
    return True


def _repair(shape: Shape, target: Target) -> str:
    wanted = target.shape
    if wanted is not None and wanted.heads is not None and shape.heads is None:
        return "end the pipeline with `split`"
    if wanted is not None and wanted.heads is None and shape.heads is not None:
        return "bring the heads together with `merge`"
    return ""


def _flow(scope: Scope, expr: Expr, target: Target) -> Flow:
    match expr:
        case Name(id, span):
            shape = scope.shape(id, span) or _tensor(scope, expr)
            if shape is None and id in OPS and OPS[id].bare:
                return _pipe(scope, Read("x", scope.inputs["x"], span), (expr,), target)
            if shape is None:
                if id in OFFERED:
                    raise error(
                        "L224",
                        f"`{id}` is not here",
                        span,
                        "a model gives it to its layers, and this stands in none that has it",
                        OFFERS[id],
                    )
                called = f"write `{id}(…)`" if id in OPS or id in STATISTICS else ""
                raise error(
                    "L201",
                    f"there is no stream `{id}`",
                    span,
                    "",
                    called or suggest(id, scope.declared, scope.inputs),
                )
            return Read(scope.own(id), shape, span)
        case syntax.Pipe(None, _):
            raise error(
                "L208",
                "this pipeline has no stream to start from",
                expr.span,
                "",
                "begin it with `x` or another stream",
            )
        case syntax.Pipe(head, stages):
            assert head is not None
            first = _flow(scope, head, replace(target, shape=None))
            if isinstance(stages[-1], Binary):
                raise error(
                    "L208",
                    "this is not a stage",
                    stages[-1].span,
                    "`|` binds less than every operator",
                    f"write `{show(_around(expr, stages[-1]))}`",
                )
            return _pipe(scope, first, stages, target)
        case syntax.Attribute(_, name, span) if (found := scope.elsewhere(expr)) is not None:
            if name in MAPS:
                where = {"s": "score", "p": "weights"}[name]
                raise error(
                    "L208",
                    f"`{show(expr)}` is a number a pair, not a stream",
                    span,
                    "",
                    f"read it in `{where}`",
                )
            return Read(found.name, found.shape, span)
        case Call(name) if name in OPS and OPS[name].starts:
            return _pipe(scope, Read("x", scope.inputs["x"], expr.span), (expr,), target)
        case Unary() | Binary() | Compare() | Call():
            return _arithmetic(scope, expr, target)
        case _:
            help = "a stream is a name or a pipeline such as `x | linear | split`"
            raise error("L208", "this is not a stream", expr.span, "", help)


def _around(pipe: syntax.Pipe, last: Expr) -> Expr:
    """Return `o | linear + x` as `(o | linear) + x`."""
    if isinstance(last, Binary):
        return replace(last, left=_around(pipe, last.left))
    return replace(pipe, stages=(*pipe.stages[:-1], last))


def _tensor(scope: Scope, expr: Name) -> Shape | None:
    """Return the shape of a param or const as a stream of one token, for arithmetic (L208)."""
    tensor = scope.tensors.get(scope.own(expr.id))
    if tensor is None:
        return None
    match tensor.shape:
        case ():
            return Shape("1", 1)
        case (dim,):
            return Shape("1", dim)
        case (heads, dim):
            return Shape("1", dim, heads)
    raise error(
        "L208",
        f"`{expr.id}` is not a stream",
        expr.span,
        f"it has {len(tensor.shape)} dimensions",
        "a pipeline takes [dim] or [heads, dim]",
    )


def _arithmetic(scope: Scope, expr: Expr, target: Target) -> Flow:
    """`(one - 0.3 * two)`: streams become operands of elementwise operations."""
    operands: list[Flow] = []

    def operand(flow: Flow) -> Expr:
        if flow not in operands:
            operands.append(flow)
        return Name(f"a{operands.index(flow)}", expr.span)

    def term(part: Expr) -> Expr:
        """Take a term of the sum that the whole is: it has the shape that is needed."""
        if isinstance(part, Binary) and part.op in ("+", "-"):
            return replace(part, left=term(part.left), right=term(part.right))
        if isinstance(part, syntax.Pipe) and target.shape is not None:
            wanted = target.shape if target.shape.heads is None else None
            return operand(_flow(scope, part, replace(target, shape=wanted)))
        return visit(part)

    def visit(part: Expr) -> Expr:
        if isinstance(part, Number):
            return part
        if isinstance(part, Name) and part.id in scope.numbers:
            return part
        if isinstance(part, Call) and part.function == "joint":
            return operand(joint(scope, part))
        if isinstance(part, Call) and part.function in STATISTICS:
            return operand(statistic(scope, part, part.function))
        if isinstance(part, Call) and part.function in MEANS and target.batch:
            (arg,) = exactly(part, part.args, 1)
            flow = _flow(scope, arg, replace(target, shape=None))
            return operand(applied(MEANS[part.function], {}, (flow,), part.span))
        if isinstance(part, Call) and part.function not in {**FUNCTIONS, **VECTOR_FUNCTIONS}:
            stage = scope.library.find("stage", part.function)
            if stage is not None and not _holds(stage):
                with scope.inside(stage, part.span):
                    return visit(inline_stage(scope, stage, part))
            of_maps = part.function in MAP_FUNCTIONS
            label = "it is read in scores, weights, `rows` and `columns`" if of_maps else ""
            raise error(
                "L201",
                f"`{part.function}` is not a function of streams",
                part.span,
                label,
                did_you_mean(part.function, (*FUNCTIONS, *VECTOR_FUNCTIONS)),
            )
        if isinstance(part, Unary | Binary | Compare | Call):
            return rebuild(part, visit)
        return operand(_flow(scope, part, replace(target, shape=None)))

    inside = term(expr)
    free = frozenset(f"a{at}" for at in range(len(operands)))
    body_ = resolve_function(scope, inside, free)
    if not operands:
        raise error("L208", "this is a number, not a stream", expr.span)
    return composed(body_, _for_heads(scope, operands), expr.span)


def _for_heads(scope: Scope, operands: Sequence[Flow]) -> tuple[Flow, ...]:
    """Give every head the features of a tensor [dim] that is not written `t[heads]`."""
    whole = next((each.shape for each in operands if each.shape.heads is not None), None)

    def given(flow: Flow) -> Flow:
        if whole is None or not isinstance(flow, Read) or flow.name not in scope.tensors:
            return flow
        if scope.tensors[flow.name].shape != (whole.dim,) or flow.name in scope.per_head:
            return flow
        return applied("repeat", {"times": whole.heads}, (flow,), flow.span)

    return tuple(map(given, operands))


# ── stages ───────────────────────────────────────────────────────────────────────────────


def _pipe(scope: Scope, head: Flow, stages: Sequence[Expr], target: Target) -> Flow:
    steps = _steps(scope, stages, target)
    wanted: list[Shape | None] = [target.shape] * len(steps)
    for at in range(len(steps) - 1, 0, -1):
        out, step = wanted[at], steps[at]
        if isinstance(step, _Whole):
            wanted[at - 1] = out
            continue
        shapes = [Shape("n", 1), *(each.shape for each in step.others)]
        options = _completed(scope, step, shapes[0], out)
        known = out is not None and not reduces(options.get("expr"))
        wanted[at - 1] = step.op.needs(out, shapes, options) if out and known else None
    for step, out in zip(steps, wanted, strict=True):
        if isinstance(step, _Whole):
            what = step.make(head.shape)
            if step.once is not None and what.moving:
                raise several_times(step.span)
            if step.taken is not None:
                expect_taken(what, head.shape, step.others[0].shape, step.span)
            shape = what.out.shape
            if pooling(shape.tokens)[1] > pooling(head.shape.tokens)[1]:
                raise error(
                    "L206",
                    "a stage with tensors or streams of its own pools no tokens",
                    step.span,
                    f"[{head.shape.tokens}] becomes [{shape.tokens}]",
                    "pool in the block, before this stage or after it",
                )
            if what.x.heads is None and head.shape.heads is not None:  # each head alike
                shape = replace(shape, heads=head.shape.heads)
            inputs = (head, *step.others)
            head = Part(what, inputs, shape, step.module, step.span, step.once, step.taken)
            continue
        head = _apply(scope, replace(step, options=_completed(scope, step, head.shape, out)), head)
    return head


def _steps(scope: Scope, stages: Sequence[Expr], target: Target) -> list[_Stage | _Whole]:
    """Return what the stages of a pipeline stand for; those from `take` to `put` are one."""
    place = between(stages)
    if place is None:
        return [step for stage in stages for step in _expand(scope, stage, target)]
    first, last = place
    before, inner = stages[:first], stages[first + 1 : last]
    own = _taken(scope, stages[first], tuple(inner))
    return [*_steps(scope, before, target), own, *_steps(scope, stages[last + 1 :], target)]


def _taken(scope: Scope, take: Expr, stages: tuple[Expr, ...]) -> _Whole:
    """Return the part that the stages between `take(chosen)` and `put` are: one, or all of them."""
    assert isinstance(take, Call)
    (choosing,) = exactly(take, take.args, 1)
    if scope.around is None:
        help = "write a `layer` around the block"
        raise error("L243", "`take` is a stage of layers and feed-forwards", take.span, "", help)
    chosen = _flow(scope, choosing, Target("chosen"))
    flows = {name: each.flow for name, each in scope.streams.items()}
    found = _expand(scope, stages[0], Target("out")) if len(stages) == 1 else []
    whole = found[0] if len(found) == 1 else None
    if not isinstance(whole, _Whole) or whole.others:
        name = "taken"
        value = syntax.Pipe(Name("x", take.span), stages, take.span)
        inside = Definition("layer", name, (), (syntax.Result(value, span=take.span),))
        whole = _whole(scope, Name(name, take.span), name, inside)
    others = (chosen,)
    return replace(whole, others=others, taken=most_taken(chosen, flows), span=take.span)


def _completed(scope: Scope, step: _Stage, given: Shape, out: Shape | None) -> dict[str, Any]:
    """Fill in what was not written; a `split` for no target gives the query heads."""
    options = dict(step.options)
    targetless = out is None or out.heads is None
    if step.op.name == "split" and options["heads"] is None and targetless:
        options["heads"] = scope.numbers["heads"]
    if step.op.name == "embed" and options["count"] is None:
        options["count"] = scope.numbers.get("vocab")
    return step.op.complete(options, given, out)


def _apply(scope: Scope, step: _Stage, head: Flow | None) -> Flow:
    inputs = step.others if head is None else (head, *step.others)
    if step.op.name in ("embed", "bucket") and not _are_ids(scope, head, step.op.name):
        label = "these are none"
        raise error("L206", f"`{step.op.name}` takes the ids of `tokens`", step.span, label)
    if step.op.name == "pointwise":
        return composed(step.options["expr"], _for_heads(scope, inputs), step.span)
    return applied(step.op.name, step.options, inputs, step.span, step.places)


def _are_ids(scope: Scope, flow: Flow | None, taker: str) -> bool:
    """Say whether a stream holds ids: those of the tokens, or of buckets, to be embedded."""
    match flow:
        case Read("tokens"):
            return "tokens" in scope.inputs
        case Read(name) if name in scope.streams:
            return _are_ids(scope, scope.streams[name].flow, taker)
        case Apply("bucket"):
            return taker == "embed"
    return False


def _expand(scope: Scope, stage: Expr, target: Target, suffix: str = "") -> list[_Stage | _Whole]:
    """Return the operations that one written stage stands for.

    `suffix` is what its tensors are called after their stream where it is another's name.
    """
    if not isinstance(stage, Name | Call):
        raise error(
            "L208",
            "this is not a stage",
            stage.span,
            "",
            "a stage is a name or a call such as `linear(64)`",
        )
    name = stage.id if isinstance(stage, Name) else stage.function
    args = () if isinstance(stage, Name) else stage.args
    if name in scope.parts or (name == "norm" and scope.around is not None):
        return _named_part(scope, stage, name, target)
    if definition := scope.library.find("stage", name):
        with scope.inside(definition, stage.span):
            if _holds(definition):
                return [_whole(scope, stage, suffix or name, definition)]
            result = body(scope, definition, stage)
            if isinstance(result.value, syntax.Pipe) and result.value.head is None:
                return [
                    step for each in result.value.stages for step in _expand(scope, each, target)
                ]
            inside = resolve_function(scope, result.value, frozenset("x"))
            return [_pointwise(put(inside, {"x": Name("a0")}), (), stage.span)]
    if name == "once":
        return [_once(scope, stage, target, suffix)]
    if name == "gate":
        (other,) = exactly(stage, args, 1)
        gate = _flow(scope, other, replace(target, shape=None))
        return [_pointwise(Binary("*", Name("a0"), Name("a1")), (gate,), stage.span)]
    if name in ("take", "put"):
        raise unpaired(stage)
    if name == "mixture":
        return [_mixture(scope, stage, args)]
    if name == "scale":
        (factor,) = exactly(stage, args, 1)
        value = scope.number(factor, "the factor of `scale`")
        number = Number(value, repr(value), factor.span)
        return [_pointwise(Binary("*", Name("a0"), number), (), stage.span)]
    whole = scope.library.kind_of(stage) is not None
    if whole and isinstance(stage, Call) and name in FUNCTIONS:  # `gelu(4)`, where `gelu` is none
        return [_whole(scope, stage, module_name(name))]
    if name in FUNCTIONS and not FUNCTIONS[name].boolean and name != "where":
        rest = tuple(
            Number(value := scope.number(arg, f"an argument of `{name}`"), repr(value), arg.span)
            for arg in exactly(stage, args, FUNCTIONS[name].arity - 1)
        )
        return [_pointwise(Call(name, (Name("a0"), *rest)), (), stage.span)]
    if name in OPS and name not in UNNAMED:
        return [_operation(scope, OPS[name], stage, target)]
    if whole:
        return [_whole(scope, stage, module_name(name))]
    library = scope.library
    parts = [*library.ffns]
    if scope.around is not None:
        parts += ["norm", *scope.parts, *library.layers]
    known = [
        *(OPS.keys() - UNNAMED),
        "gate",
        "mixture",
        "put",
        "scale",
        "take",
        *library.known("stage"),
        *FUNCTIONS,
        *parts,
    ]
    called = f"write `{name}(…)` around the stream" if name in (*STATISTICS, "joint") else ""
    raise error(
        "L208", f"there is no stage `{name}`", stage.span, "", called or did_you_mean(name, known)
    )


def _holds(stage: Definition) -> bool:
    """Say whether a stage is a part: it has tensors or streams, or pipelines in its arithmetic."""
    if len(stage.body) > 1:
        return True
    (result,) = stage.body
    if not isinstance(result, syntax.Result):
        return False
    value = result.value
    whole = isinstance(value, syntax.Pipe) and value.head is None
    return not whole and any(isinstance(each, syntax.Pipe) for each in syntax.walk(value))


def _whole(scope: Scope, call: Expr, module: str, definition: Definition | None = None) -> _Whole:
    assert scope.whole is not None
    return _Whole(partial(scope.whole, scope, call, definition), module, call.span)


def _mixture(scope: Scope, stage: Name | Call, args: tuple[Expr, ...]) -> _Whole:
    """Return `mixture(part, weights)`: as many feed-forwards as there are weights, sent tokens."""
    part, weighing = exactly(stage, args, 2)
    call = scope.parts.get(part.id, part) if isinstance(part, Name) else part
    once = call.span if is_once(call) else None
    if isinstance(call, Call) and once is not None:
        (call,) = exactly(call, call.args, 1)
    weights = _flow(scope, weighing, Target("weights"))
    flows = {name: each.flow for name, each in scope.streams.items()}
    assert scope.whole is not None
    make = partial(scope.whole, scope, call, None)

    def experts(given: Shape) -> Block:
        return as_experts(make(given), given, weights, flows, stage.span)

    return _Whole(experts, "experts", stage.span, (weights,), once)


def _once(scope: Scope, call: Expr, target: Target, module: str = "") -> _Whole:
    """Return the part of `once(stage)`: all that mentions this place of the text shares it."""
    assert isinstance(call, Call)
    (inner,) = exactly(call, call.args, 1)
    if not isinstance(inner, Name | Call):
        raise error("L208", "this is not a stage", inner.span, "", "give `once` one stage or part")
    name = inner.id if isinstance(inner, Name) else inner.function
    if scope.library.kind_of(inner) is not None:
        return replace(_whole(scope, inner, module_name(module or name)), once=call.span)
    _expand(scope, inner, target)  # what is wrong with it is said here
    wrapped = Definition(
        "stage", name, (), (syntax.Result(syntax.Pipe(None, (inner,), inner.span)),)
    )
    whole = _whole(scope, Name(name, inner.span), module_name(module or name), wrapped)
    return replace(whole, once=call.span)


def _named_part(
    scope: Scope, stage: Name | Call, name: str, target: Target
) -> list[_Stage | _Whole]:
    """Return the part that a parameter of a layer is, or the norm of the model."""
    assert scope.around is not None
    if not isinstance(stage, Name):
        raise error("L209", f"`{name}` takes no arguments here", stage.span)
    if name in scope.parts:
        part = scope.parts[name]
        if is_once(part):
            return [_once(scope, part, target, name)]
        return [_whole(scope, part, module_name(name))]
    norm = scope.around.norm
    if norm == Name("none"):
        return []
    outside = replace(scope, around=None) if norm == Name("norm") else scope
    return _expand(outside, norm, target, "norm")


def _pointwise(expr: Expr, others: tuple[Flow, ...], span: Span) -> _Stage:
    return _Stage(OPS["pointwise"], {"expr": shaped(expr)}, others, span)


def _operation(scope: Scope, op: Op, stage: Name | Call, target: Target) -> _Stage:
    values = bound(op.name, op.options, stage)
    options: dict[str, Any] = {}
    others: list[Flow] = []
    places: dict[str, Span] = {}
    for option in op.options:
        value = values[option.name]
        if value == Name("none") and not option.required:
            options[option.name] = option.default
        elif option.kind == "stream":
            others.append(_flow(scope, value, replace(target, shape=None)))
            places[option.name] = value.span
        else:
            options[option.name] = option_value(scope, op.name, option, value, places)
    return _Stage(op, options, tuple(others), stage.span, places)


# ── names of submodules ──────────────────────────────────────────────────────────────────


def name_modules(flow: Flow, target: Target) -> Flow:
    """Name the submodules of a pipeline: `q_proj`; `q_proj_0`, `q_proj_1` where several.

    What is read in several places, `x / norm(x)` of a pipeline, stays one.
    """
    nodes = (node for node in flow_nodes(flow) if isinstance(node, Apply | Part))
    counts = Counter(node.module for node in nodes)
    used: Counter[str] = Counter()

    def named(node: Apply | Part) -> Flow:
        module = node.module
        if not module or is_part(node):
            return node
        number = f"_{used[module]}" if counts[module] > 1 else ""
        used[module] += 1
        return replace(node, module=f"{target.module}_{module}{number}")

    return flow_mapped(flow, named)
