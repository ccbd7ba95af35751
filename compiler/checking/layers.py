"""Layers, feed-forwards and stages with tensors: text around and in parts, as a block is.

layer pre(attn, ffn) { let y = x + (x | norm | attn); out = y + (y | norm | ffn) }

pre(local, swiglu)   →   Block "pre": y, out, with the parts `attn` and `ffn` as stages between
pre(local, none)         the term in which `ffn` stands is left away: out = y

A parameter of a layer that is given a block, a layer or a feed-forward is a part. Weights belong
to the place where a part is written.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import count

from ...grammar import syntax
from ...grammar.diagnostics import did_you_mean, error
from ...grammar.expr import Value, names, rebuild
from ...grammar.functions import FUNCTIONS
from ...grammar.source import Span
from ...grammar.syntax import Binary, Call, Expr, Name, Pipe, Unary
from ...ops import OPS, Mismatch, Shape
from ..model import (
    Apply,
    Block,
    Flow,
    Part,
    Read,
    Stream,
    applies,
    flow_mapped,
    flow_nodes,
    is_part,
    reaching,
)
from .arithmetic import applied
from .around import NONE, Around
from .flows import Target, elaborate, moving, regularizing
from .library import Library, bind, is_once, put, substitute_statement
from .moving import is_undeclared
from .scope import Findings, Scope


def elaborate_part(library: Library, call: Expr, around: Around) -> Block:
    """Return the checked block, layer or feed-forward that `name` or `name(args)` stands for."""
    kind = library.kind_of(call)
    if kind == "block":
        return around.block(call, around.width)
    if kind is None:
        name = getattr(call, "id", getattr(call, "function", ""))
        known = [*library.blocks, *library.layers, *library.ffns]
        raise error(
            "L218",
            f"there is no block, layer or feed-forward `{name}`",
            call.span,
            "",
            did_you_mean(str(name), known, "a layer is made of such parts"),
        )
    return _Layer(library, call, around).block


class _Layer:
    """The elaboration of one layer or feed-forward."""

    def __init__(self, library: Library, call: Expr, around: Around) -> None:
        self.library, self.around, self.findings = library, around, Findings()
        self.syntax = library.item(call)
        self.kind = self.syntax.kind
        self.parts: dict[str, Expr] = {}
        self.lets: dict[str, syntax.Let | syntax.Param] = {}
        self.moves: dict[str, syntax.Update] = {}
        self.out: syntax.Setting | None = None
        self.added: syntax.Setting | None = None
        numbers: dict[str, Value] = dict.fromkeys(("width", "features"), around.width)
        numbers |= {"layer": around.layer, "depth": around.depth}
        known = {"lanes": around.lanes, "vocab": around.vocab}
        numbers |= {name: each for name, each in known.items() if each is not None}
        self.shape = around.taken(self.kind)
        self.scope = Scope(
            library,
            self.findings,
            numbers=numbers,
            inputs={"x": self.shape},
            title=self.syntax.name,
            parts=self.parts,
            around=around,
            whole=whole,
            depth=around.below,
        )
        self._gather(self.syntax, call, [])
        self.findings.settle()
        self.block = self._elaborated()

    # what is said

    def _gather(self, item: syntax.Block, call: Expr, open_: list[str]) -> None:
        """Take up what a definition says over what it inherits, its parts aside."""
        if item.name in open_:
            ring = " : ".join([*open_, item.name])
            raise error("L212", f"`{item.name}` inherits from itself", call.span, ring)
        given = bind(item.name, item.params, call, call.span)
        values: dict[str, Expr] = {}
        for name, value in given.items():
            part = self._part(value)
            if part is None:
                values[name] = put(value, values)
            else:
                self.parts[name] = part
        if item.base is not None:
            base = put(item.base, values)
            self._gather(self.library.item(base, self.kind), base, [*open_, item.name])
        seen: set[str] = set()
        for each in item.body:
            with self.findings.guard():
                self._take(substitute_statement(each, values), seen)

    def _part(self, value: Expr) -> Expr | None:
        """Return what part a parameter is given; None where it is none."""
        if value == NONE:
            return value
        if isinstance(value, Name) and value.id in self.parts:
            return self.parts[value.id]
        kind = self.library.kind_of(value)
        if self.kind == "layer" or is_once(value):
            return value if kind is not None or is_once(value) else None
        return value if kind == "ffn" and not self._is_function(value) else None

    def _is_function(self, value: Expr) -> bool:
        """Say whether a name is that of an activation too, which a feed-forward may be given."""
        known = (*FUNCTIONS, *self.library.known("stage"))
        return isinstance(value, Name) and value.id in known

    def _handed(self, expr: Expr) -> Expr:
        """Put parts into the layers that they are handed to: `pre(attn, ffn)`, in a layer."""
        if isinstance(expr, Call) and self.library.kind_of(expr) == "layer":
            return put(expr, self.parts)
        return rebuild(expr, self._handed)

    def _take(self, statement: syntax.Statement, seen: set[str]) -> None:
        name = getattr(statement, "name", "")
        key = f"{name} <-" if isinstance(statement, syntax.Update) else name
        if name and key in seen:
            raise error(
                "L211",
                f"`{name}` is set twice in one {self.kind}",
                statement.span,
                "",
                "keep one of them",
            )
        seen.add(key)
        match statement:
            case syntax.Let(_, value):
                self.lets[name] = replace(statement, value=self._handed(value))
            case syntax.Param():
                self.lets[name] = statement
            case syntax.Update():
                self.moves[name] = statement
            case syntax.Setting("out", value, None):
                self.out = replace(statement, value=self._handed(value))
            case syntax.Setting("regularize", value, None):
                self.added = statement
            case _:
                raise error(
                    "L202",
                    f"this does not belong in a {self.kind}",
                    statement.span,
                    "",
                    "it is made of `let`, `param`, `const`, `NAME <- …`, `out = …` and "
                    "`regularize = …`",
                )

    # what it means

    def _elaborated(self) -> Block:
        scope, guard = self.scope, self.findings.guard
        if self.out is None:
            raise error(
                "L202",
                f"`{self.syntax.name}` says no `out`",
                self.syntax.span,
                "",
                "write what goes on: `out = x + (x | norm | attn)`",
            )
        lets, out, more = self._pruned()
        shape = self.shape

        def stream(let: syntax.Let, scope: Scope, name: str) -> Stream:
            wanted = shape if out == Name(let.name) else None
            return Stream(name, elaborate(scope, let.value, Target(name, wanted)))

        scope.elaborate = stream
        for statement in lets.values():
            with guard():
                scope.declare(statement, moved=statement.name in self.moves)
        scope.offer(self.around.offered)
        for name in lets:
            with guard():
                scope.shape(name, self.syntax.span)
        made: Flow | None = None
        with guard():
            made = elaborate(scope, out, Target("out", shape))
        added: Flow | None = None
        if more is not None:
            with guard():
                added = regularizing(scope, more)
        moves: list[Stream] = []
        for update in self.moves.values():
            if is_undeclared(scope, self.lets.get(update.name)):
                continue
            with guard():
                moves.append(moving(scope, update))
        self.findings.settle()
        assert made is not None
        above = [
            Read(name, scope.streams[name].shape)
            for name in scope.streams
            if name in self.library.read_above
        ]
        aside = [*([] if added is None else [added]), *(each.flow for each in moves)]
        kept = reaching(scope.streams, [made, *above, *aside])
        streams = [each for name, each in scope.streams.items() if name in kept]
        block = composed(self.syntax.name, self.kind, scope, streams, made, self.syntax.span)
        block = replace(block, regularize=added, moves=tuple(moves))
        return block if shape.heads is None else replace(block, given=shape)

    def _pruned(self) -> tuple[dict[str, syntax.Let | syntax.Param], Expr, Expr | None]:
        """Return the statements without terms of what is `none`, `out`, and `regularize`."""
        absent = {name for name, part in self.parts.items() if part == NONE}
        lets = dict(self.lets)
        assert self.out is not None
        while True:
            left: dict[str, syntax.Let | syntax.Param] = {}
            for name, each in lets.items():
                if isinstance(each, syntax.Let):
                    value = without(each.value, absent)
                    if value is None:
                        absent.add(name)
                        continue
                    each = replace(each, value=value)
                left[name] = each
            if len(left) == len(lets):
                break
            lets = left
        out = without(self.out.value, absent)
        if out is None:
            label = ", ".join(f"`{name}`" for name in sorted(absent & self.parts.keys()))
            raise error(
                "L231",
                f"nothing is left of `{self.syntax.name}`",
                self.out.span,
                f"{label} is `none`",
                "a term with a part that is `none` is left away; give one of them",
            )
        added = None if self.added is None else without(self.added.value, {*absent, "none"})
        return left, out, added


def without(expr: Expr, absent: set[str]) -> Expr | None:
    """Return an expression without the terms that read absent names; None where none is left."""
    match expr:
        case Name(id):
            return None if id in absent else expr
        case Binary("+" | "-" as op, left, right):
            one, two = without(left, absent), without(right, absent)
            if one is None and two is not None and op == "-":
                return Unary("-", two, expr.span)
            if one is None or two is None:
                return two if one is None else one
            return replace(expr, left=one, right=two)
        case Pipe(head, stages):
            kept = [None if head is None else without(head, absent)]
            kept += [without(each, absent) for each in stages]
            gone = kept[1:] if head is None else kept
            if None in gone:
                return None
            rest = tuple(each for each in kept[1:] if each is not None)
            return replace(expr, head=kept[0], stages=rest)
        case Call(function) if function in absent:
            return None
    below = [without(each, absent) for each in syntax.children(expr)]
    return None if None in below else expr


def whole(scope: Scope, call: Expr, definition: syntax.Definition | None, given: Shape) -> Block:
    """Return the part that a stage of a pipeline is, for what it is given."""
    if definition is not None and definition.kind == "layer":
        return _within(scope, definition, given)
    if definition is not None:
        return _stage(scope, definition, call, given)
    return _part(scope, call, given)


def _part(scope: Scope, call: Expr, given: Shape) -> Block:
    """Return the block, layer or feed-forward of a call (L207, L232)."""
    kind, around = scope.library.kind_of(call), scope.around
    if around is None and kind != "ffn":
        raise error(
            "L232",
            f"a {kind} is a part of a layer",
            call.span,
            f"`{scope.title}` is a block",
            "write a `layer` that has both, or a `branch` where tokens mix twice in one block",
        )
    lanes = around.lanes if around is not None and kind == "layer" else None
    if (given.tokens, given.heads) != ("n", lanes):
        help = "bring them together: `sum_heads`, `combine(weights)`, `merge`"
        raise error(
            "L207",
            f"a {kind} does not take what it is given",
            call.span,
            f"it is {given}, needed is {Shape('n', given.dim, lanes)}",
            help if given.heads is not None else "",
        )
    if around is None:
        numbers = scope.numbers
        around = Around(given.dim, _no_block, int(numbers["layer"]), int(numbers["depth"]))
    return elaborate_part(scope.library, call, replace(around, width=given.dim))


def _no_block(call: Expr, width: int) -> Block:  # noqa: ARG001  where no block can be a part
    raise error("L232", "a block is a part of a layer", call.span)


def _stage(scope: Scope, stage: syntax.Definition, call: Expr, given: Shape) -> Block:
    """Return a stage with tensors of its own, for a stream of some shape (L206, L220).

    It does the same to every head, unless it has a tensor of all heads.
    """
    values = bind(stage.name, stage.params, call, call.span)
    *declared, last = (substitute_statement(each, values) for each in stage.body)
    heads = given.heads if not _of_heads(declared) else None
    given = replace(given, heads=None) if heads is not None else given
    inner = Scope(
        scope.library,
        scope.findings,
        numbers={**scope.numbers, "features": given.dim},
        inputs={"x": given},
        title=stage.name,
        around=scope.around,
        whole=whole,
        depth=scope.depth,
    )
    inner.elaborate = lambda let, own, name: Stream(name, elaborate(own, let.value, Target(name)))
    updates = [each for each in declared if isinstance(each, syntax.Update)]
    written = {each.name for each in updates}
    for each in declared:
        if isinstance(each, syntax.Update):
            continue
        if not isinstance(each, syntax.Let | syntax.Param):
            raise error(
                "L202",
                "this does not belong in a stage",
                each.span,
                "",
                "it is made of `let`, `param`, `const`, `NAME <- …` and a value",
            )
        inner.declare(each, moved=each.name in written)
    inner.offer({} if scope.around is None else scope.around.offered)
    if not isinstance(last, syntax.Result):
        raise error(
            "L220",
            f"`{stage.name}` has no value",
            stage.span,
            "",
            "end it with an expression",
        )
    value = last.value
    if isinstance(value, Pipe) and value.head is None:
        value = replace(value, head=Name("x", value.span))
    out = elaborate(inner, value, Target("out"))
    moves = tuple(moving(inner, each) for each in updates)
    kept = reaching(inner.streams, [out, *(each.flow for each in moves)])
    streams = [each for name, each in inner.streams.items() if name in kept]
    block = composed(stage.name, "stage", inner, streams, out, stage.span)
    block = replace(block, given=given, moves=moves)
    for node in (node for flow in block.flows for node in applies(flow)):
        if heads is not None and not _same_for_heads(node, heads):
            raise error(
                "L206",
                f"`{stage.name}` does not take a stream with heads",
                call.span,
                f"`{node.op}` in it would read them",
                "give it one before `split`, or after `merge`",
            )
    return block


def _within(scope: Scope, layer: syntax.Definition, given: Shape) -> Block:
    """Return the layer that stages of a pipeline make by themselves, between others."""
    inner = Scope(
        scope.library,
        scope.findings,
        numbers={**scope.numbers, "features": given.dim},
        inputs={"x": given},
        title=layer.name,
        parts=scope.parts,
        around=scope.around,
        whole=whole,
    )
    inner.offer({} if scope.around is None else scope.around.offered)
    (result,) = layer.body
    assert isinstance(result, syntax.Result)
    out = elaborate(inner, result.value, Target("out", given))
    block = composed(layer.name, "layer", inner, [], out, layer.span)
    return block if block.uses else replace(block, kind="ffn")


def _of_heads(statements: list[syntax.Statement]) -> bool:
    """Say whether some tensor has a dimension of all heads."""
    dims = (dim for each in statements if isinstance(each, syntax.Param) for dim in each.dims)
    return any("heads" in names(dim) for dim in dims)


def _same_for_heads(node: Apply, heads: int) -> bool:
    """Say whether an operation does to each head what it does to a stream without heads."""
    op, options = OPS[node.op], dict(node.options)
    shapes = [each.shape for each in node.inputs]
    if op.reads_earlier(shapes, options) or op.by_sequence or op.positional:
        return False
    try:
        made = op.shape([replace(each.shape, heads=heads) for each in node.inputs], options)
    except Mismatch:
        return False
    return made == replace(node.shape, heads=heads)


def composed(
    name: str, kind: str, scope: Scope, streams: list[Stream], out: Flow, span: Span
) -> Block:
    """Return a whole of checked streams, its parts and their norms named."""
    flows = _named([*((each.name, each.flow) for each in streams), ("o", out)])
    if scope.around is not None and scope.around.dropout:
        flows = [flow_mapped(each, partial(_dropping, scope.around.dropout)) for each in flows]
    streams = [replace(each, flow=flow) for each, flow in zip(streams, flows, strict=False)]
    nodes = (node for flow in flows for node in flow_nodes(flow))
    crossed = (each.what.context_width for each in nodes if isinstance(each, Part))
    width = int(scope.numbers["width"])
    return Block(
        name=name,
        width=width,
        context_width=next((each for each in crossed if each is not None), None),
        heads=1,
        kv_heads=1,
        value_heads=1,
        head_dim=width,
        value_dim=width,
        streams=tuple(streams),
        tensors=tuple(scope.tensors.values()),
        out=flows[-1],
        span=span,
        kind=kind,
    )


def _dropping(rate: float, node: Apply | Part) -> Flow:
    """Drop some of what a block or a feed-forward gives, in training; experts are one with it."""
    if not is_part(node) or node.what.kind == "layer" or node.what.experts is not None:
        return node
    return applied("dropout", {"p": rate}, (node,), node.span)


# ── names of submodules ──────────────────────────────────────────────────────────────────


def _named(flows: list[tuple[str, Flow]]) -> list[Flow]:
    """Return flows by the names of their streams, each of their modules with a name of its own.

    A norm is called after the part that it goes into, `attn_norm`, or comes from,
    `attn_post_norm`; else after its stream. What would have one name is numbered.
    """
    return numbered([flow_mapped(flow, partial(_beside, f"{name}_norm")) for name, flow in flows])


def numbered(flows: list[Flow]) -> list[Flow]:
    """Return flows in which modules of one name are numbered, `ffn_0` and `ffn_1`."""
    modules = [
        node.module for flow in flows for node in flow_nodes(flow) if isinstance(node, Apply | Part)
    ]
    numbers = {name: count() for name, times in Counter(modules).items() if name and times > 1}

    def renamed(node: Apply | Part) -> Flow:
        if node.module not in numbers:
            return node
        return replace(node, module=f"{node.module}_{next(numbers[node.module])}")

    return [flow_mapped(each, renamed) for each in flows]


def _beside(norm: str, node: Apply | Part) -> Flow:
    """Name the norm that a part takes, or that takes a part."""
    first = node.inputs[0]
    if is_part(node) and isinstance(first, Apply | Part) and _is_norm(first, norm):
        normed = replace(first, module=f"{node.module}_norm")
        return replace(node, inputs=(normed, *node.inputs[1:]))
    if _is_norm(node, norm) and is_part(first):
        return replace(node, module=f"{first.module}_post_norm")
    return node


def _is_norm(node: Apply | Part, norm: str) -> bool:
    """Say whether a module is the norm of its stream, or one of them."""
    return node.module == norm or node.module.startswith(f"{norm}_")
