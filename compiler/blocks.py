"""One block: inheritance, sizes, streams, and how its tokens mix.

`elaborate_block` is called with a width (and the arguments of a parameterised block) and
returns a `model.Block`, or raises every finding together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..grammar import syntax
from ..grammar.diagnostics import Diagnostic, did_you_mean, error
from ..grammar.expr import FALSE, TRUE, Value, names
from ..grammar.syntax import Call, Compare, Expr, Index, Name, Pipe, walk
from ..ops import OPS, Shape
from .flows import Target, elaborate
from .inheritance import Body
from .library import Library
from .masks import extent, linear, sees_itself
from .mixers import resolve_mixer
from .model import Apply, Block, Flow, Pairwise, Read, Recurrence, Stream, flow_nodes
from .scalars import resolve, resolve_normalizer
from .scope import Findings, Scope

_GUESSES = {"heads": "", "kv_heads": "heads", "head_dim": "", "value_dim": "head_dim"}
_ABOUT_SHAPES = ("L206", "L207", "L216")
_LATER_POSITIONS = ("relative",)
_PAIRWISE_ONLY = ("position", "score", "normalize", "weights", "scale", "dropout")
_LATER = {"similarity": "dot", "select": "none", "regularize": "none"}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a block is told from outside."""

    width: int | None = None
    context_width: int | None = None
    layer: int = 0
    depth: int = 1


def elaborate_block(
    library: Library, call: Expr, sizes: Sizes, warnings: list[Diagnostic] | None = None
) -> Block:
    """Return the checked block that `name` or `name(args)` stands for."""
    findings = Findings()
    body = Body(library, call, findings)
    scope = Scope(library, findings)
    _numbers(scope, body, sizes)
    sized = not findings.diagnostics
    block = _Builder(scope, body).build()
    if not sized:  # the sizes that were guessed only serve to find further misspelt names
        findings.keep(lambda each: each.code not in _ABOUT_SHAPES)
    findings.settle()
    assert block is not None
    if warnings is not None:
        warnings.extend(_warnings(block, body, library))
    return block


def default_width(body: Body, scope: Scope) -> int:
    """Return the width of a block that stands alone and does not say: heads · head_dim or 64."""
    heads = scope.size(body.get("heads"), "`heads`")
    each = scope.size(body.get("head_dim"), "`head_dim`") if body.has("head_dim") else 64
    return heads * each


def _numbers(scope: Scope, body: Body, sizes: Sizes) -> None:
    """Fill in the sizes, each of which may read those before it."""
    numbers: dict[str, Value] = scope.numbers
    numbers |= {"layer": sizes.layer, "depth": sizes.depth}
    if sizes.width is not None:
        numbers["width"] = sizes.width
    elif body.has("width"):
        numbers["width"] = scope.size(body.get("width"), "`width`")
    else:
        numbers["width"] = default_width(body, scope)
    if sizes.context_width is not None:
        numbers["context_width"] = sizes.context_width
    elif body.has("context_width"):
        numbers["context_width"] = scope.size(body.get("context_width"), "`context_width`")
    else:
        numbers["context_width"] = numbers["width"]
    for name, guess in _GUESSES.items():
        with scope.findings.guard():
            if name == "head_dim" and not body.has(name):
                _divides_width(scope, body)
            numbers[name] = scope.size(body.get(name), f"`{name}`")
        numbers.setdefault(name, numbers.get(guess, 64))
    heads, kv_heads = int(numbers["heads"]), int(numbers["kv_heads"])
    if heads % kv_heads:
        fits = [str(each) for each in range(1, heads + 1) if heads % each == 0][:8]
        choice = f"{', '.join(fits[:-1])} or {fits[-1]}" if len(fits) > 1 else fits[0]
        with scope.findings.guard():
            raise error("L204", "`kv_heads` must divide `heads`", body.span_of("kv_heads"),
                        f"heads = {heads}, kv_heads = {kv_heads}, remainder {heads % kv_heads}",
                        f"use {choice}")  # fmt: skip


def _divides_width(scope: Scope, body: Body) -> None:
    width, heads = int(scope.numbers["width"]), int(scope.numbers["heads"])
    if width % heads:
        raise error("L205", "`heads` must divide the width", body.span_of("heads"),
                    f"width = {width}, heads = {heads}, remainder {width % heads}",
                    "choose another number of heads, or set `head_dim`")  # fmt: skip


class _Builder:
    """Elaborates the parts of one block."""

    def __init__(self, scope: Scope, body: Body) -> None:
        self.scope, self.body = scope, body
        self.numbers = {name: int(value) for name, value in scope.numbers.items()}
        scope.inputs = {
            "x": Shape("n", self.numbers["width"]),
            "context": Shape("m", self.numbers["context_width"]),
        }
        scope.elaborate = self._stream

    def build(self) -> Block | None:
        scope, body, guard = self.scope, self.body, self.scope.findings.guard
        for name, expected in _LATER.items():
            with guard():
                if body.get(name) != Name(expected):
                    raise error("L221", f"`{name}` is not available yet", body.span_of(name), "",
                                f"leave it at `{expected}`")  # fmt: skip
        with guard():
            self._grid()
        for statement in body.lets.values():
            with guard():
                scope.declare(statement)
        with guard():
            self._declare_qkv()
        for name in [*body.lets]:
            with guard():
                if name in scope.declared:
                    scope.shape(name, body.lets[name].span)
        mix: Pairwise | Recurrence | None = None
        with guard():
            mix = self._mix()
        out: Flow | None = None
        with guard():
            out = self._out()
        if mix is None or out is None or scope.findings.diagnostics:
            return None
        return self._assemble(mix, out)

    def _grid(self) -> None:
        if not self.body.has("grid"):
            return
        match self.body.get("grid"):
            case syntax.ListOf((rows, cols)):
                self.scope.grid = (self.scope.size(rows, "rows"), self.scope.size(cols, "cols"))
            case other:
                raise error("L219", "a grid is (rows, cols)", other.span)

    def _declare_qkv(self) -> None:
        source = self.body.get("source")
        if source not in (Name("x"), Name("context")):
            head = source.function if isinstance(source, Call) else getattr(source, "id", "")
            if head in ("latents", "previous"):
                raise error("L221", f"`{head}` as a source is not available yet", source.span)
            raise error("L222", "`source` is `x` or `context`", source.span, "",
                        did_you_mean(str(head), ("x", "context")))  # fmt: skip
        stage = self._position_stage()
        for name in "qkv":
            if self.body.has(name):
                value = self.body.get(name)
            else:
                head = Name("x") if name == "q" else source
                value = Pipe(head, (Name("linear"), Name("split")), self.body.span)
            if stage is not None and name != "v":
                stages = (*value.stages, stage) if isinstance(value, Pipe) else (stage,)
                value = Pipe(value.head if isinstance(value, Pipe) else value, stages, value.span)
            self.scope.declared[name] = syntax.Let(name, value, span=value.span)

    def _position_stage(self) -> Expr | None:
        """Return the stage `position` adds to q and k; None where it is none or a score."""
        position = self.body.get("position")
        name = position.id if isinstance(position, Name) else getattr(position, "function", "")
        library = self.scope.library
        if position == Name("none") or library.find("score", name):
            return None
        if name in OPS or library.find("stage", name):
            return position
        if name in _LATER_POSITIONS:
            raise error("L221", f"the position `{name}` is not available yet", position.span)
        known = ["none", "rope", *library.known("score"), *library.known("stage")]
        raise error("L208", f"there is no position `{name}`", position.span, "",
                    did_you_mean(name, known))  # fmt: skip

    def _stream(self, name: str, expr: Expr) -> Stream:
        numbers = self.numbers
        heads, kv_heads = numbers["heads"], numbers["kv_heads"]
        wanted = {
            "q": Shape("n", numbers["head_dim"], heads),
            "k": Shape(self._keys, numbers["head_dim"], kv_heads),
            "v": Shape(self._keys, numbers["value_dim"], kv_heads),
        }
        return Stream(name, elaborate(self.scope, expr, Target(name, wanted.get(name))))

    @property
    def _keys(self) -> str:
        """The tokens keys run along: those of the stream that k starts from."""
        if self.body.get("source") == Name("context"):
            return "m"
        read, queue = set(), ["k"]
        while queue:  # through the `let`s between
            name = queue.pop()
            if name in self.scope.declared and name not in read:
                queue += names(self.scope.declared[name].value)
            read.add(name)
        return "m" if "context" in read else "n"

    def _mix(self) -> Pairwise | Recurrence:
        mix = self.body.get("mix")
        name = mix.id if isinstance(mix, Name) else getattr(mix, "function", "")
        if name != "attend":
            definition = self.scope.library.find("mix", name)
            if definition is None:
                known = ["attend", *self.scope.library.known("mix")]
                raise error("L201", f"there is no mixer `{name}`", mix.span, "",
                            did_you_mean(name, known))  # fmt: skip
            return resolve_mixer(self.scope, definition, mix, self._recurrent_mask())
        return self._pairwise()

    def _recurrent_mask(self) -> str:
        mask = resolve(self.scope, self.body.get("mask"), "mask")
        document = Compare((Index(Name("doc"), (Name("i"),)), Index(Name("doc"), (Name("j"),))),
                           ("==",))  # fmt: skip
        parts = _conjuncts(mask)
        said = ["document"] if document in parts else []
        rest = [part for part in parts if part not in (document, TRUE)]
        if all(_is_causal(part) for part in rest):
            return " ".join([*said, "causal"] if rest else said)
        raise error("L217", "a recurrent mixer takes the masks `all`, `causal` and `document`",
                    self.body.span_of("mask"), "", "set `mask = causal`")  # fmt: skip

    def _pairwise(self) -> Pairwise:
        scope, body = self.scope, self.body
        for name in "qkv":
            with scope.findings.guard():
                scope.shape(name, body.span_of(name))
        keys = self._keys
        scale, dropout = 1.0, 0.0
        score: Expr = Name("s")
        mask: Expr = TRUE
        weights: Expr = Name("p")
        normalize = None
        with scope.findings.guard():
            scale = float(scope.number(body.get("scale"), "`scale`"))
        with scope.findings.guard():
            dropout = float(scope.number(body.get("dropout"), "`dropout`"))
            if not 0 <= dropout < 1:
                raise error("L219", "a dropout rate lies in 0 <= p < 1", body.span_of("dropout"),
                            f"it is {dropout}")  # fmt: skip
        with scope.findings.guard():
            score = resolve(scope, self._score(), "score", keys)
        with scope.findings.guard():
            mask = resolve(scope, body.get("mask"), "mask", keys)
            if mask == FALSE:
                raise error("L210", "this mask lets nothing be seen", body.span_of("mask"))
        with scope.findings.guard():
            normalize = resolve_normalizer(scope, body.get("normalize"), keys)
        with scope.findings.guard():
            weights = resolve(scope, body.get("weights"), "weights", keys)
        scope.findings.settle()
        assert normalize is not None
        return Pairwise(scale, score, mask, normalize, weights, dropout)

    def _score(self) -> Expr:
        """The score, after the position where that is a score too."""
        position, score = self.body.get("position"), self.body.get("score")
        if position == Name("none") or self._position_stage() is not None:
            return score
        stages = score.stages if isinstance(score, Pipe) and score.head is None else (score,)
        return Pipe(position, stages, score.span)

    def _out(self) -> Flow:
        scope, numbers = self.scope, self.numbers
        scope.inputs["o"] = Shape("n", numbers["value_dim"], numbers["heads"])
        target = Target("out", Shape("n", numbers["width"]))
        return elaborate(scope, self.body.get("out"), target)

    def _assemble(self, mix: Pairwise | Recurrence, out: Flow) -> Block | None:
        needed = _needed(self.scope.streams, mix, out)
        streams = tuple(each for name, each in self.scope.streams.items() if name in needed)
        nodes = [
            node for flow in (*(each.flow for each in streams), out) for node in flow_nodes(flow)
        ]
        reads_context = any(isinstance(node, Read) and node.name == "context" for node in nodes)
        modules = {node.module for node in nodes if isinstance(node, Apply)}
        for name in modules & self.scope.tensors.keys():
            statement = self.body.lets.get(name)
            with self.scope.findings.guard():
                raise error("L215", f"`{name}` cannot be the name of this",
                            statement.span if statement else self.body.span,
                            "a pipeline's module has this name", "choose another name")  # fmt: skip
        n = self.numbers
        return Block(
            name=self.body.block.name,
            width=n["width"],
            context_width=n["context_width"] if reads_context else None,
            heads=n["heads"],
            kv_heads=n["kv_heads"],
            head_dim=n["head_dim"],
            value_dim=n["value_dim"],
            streams=streams,
            tensors=tuple(self.scope.tensors.values()),
            mix=mix,
            out=out,
            span=self.body.span,
        )


_CAUSAL = Compare((Name("j"), Name("i")), ("<=",))


def _is_causal(part: Expr) -> bool:
    """Say whether a part of a mask is `j <= i`, however it is written."""
    match part:
        case Compare((left, right), (_,)) if linear(left) and linear(right):
            return extent(part) == extent(_CAUSAL)
    return False


def _conjuncts(expr: Expr) -> list[Expr]:
    match expr:
        case syntax.Binary("and", left, right):
            return [*_conjuncts(left), *_conjuncts(right)]
        case _:
            return [expr]


def mix_exprs(mix: Pairwise | Recurrence) -> tuple[Expr, ...]:
    """Return every expression of a mixer."""
    if isinstance(mix, Recurrence):
        return (*(each.value for each in mix.updates), *(each.init for each in mix.states))
    return (mix.score, mix.mask, *mix.normalize.exprs, mix.weights)


def _needed(streams: Mapping[str, Stream], mix: Pairwise | Recurrence, out: Flow) -> set[str]:
    """Return the streams that reach the output."""
    roots = {node.id for expr in mix_exprs(mix) for node in walk(expr) if isinstance(node, Name)}
    if isinstance(mix, Pairwise):
        roots |= {"q", "k", "v"}
    roots |= {node.name for node in flow_nodes(out) if isinstance(node, Read)}
    needed: set[str] = set()
    stack = [name for name in roots if name in streams]
    while stack:
        name = stack.pop()
        if name not in needed:
            needed.add(name)
            flow = streams[name].flow
            stack.extend(
                node.name
                for node in flow_nodes(flow)
                if isinstance(node, Read) and node.name in streams
            )
    return needed


def _warnings(block: Block, body: Body, library: Library) -> Iterator[Diagnostic]:
    used = {each.name for each in block.streams} | {each.name for each in block.tensors}
    for name, let in body.lets.items():
        if name not in used:
            yield Diagnostic("W002", f"`{name}` is never used", let.span, severity="warning")
    if isinstance(block.mix, Recurrence):
        own = {each.name for each in body.block.body if isinstance(each, syntax.Setting)}
        position = body.get("position")
        if (
            library.find("score", getattr(position, "id", getattr(position, "function", "")))
            is None
        ):
            own -= {"position"}  # a stage on q and k, which a recurrence reads too
        for name in _PAIRWISE_ONLY:
            if name in own:
                yield Diagnostic("W003", f"`{name}` has no effect beside a recurrent mixer",
                                 body.span_of(name), severity="warning")  # fmt: skip
        return
    lengths = {"n", "m"} & {name for expr in mix_exprs(block.mix) for name in names(expr)}
    if lengths:
        yield Diagnostic("W001", "this block depends on the number of tokens", block.span,
                         f"it reads {', '.join(sorted(lengths))}",
                         "decoding will not repeat what training saw; `seen` would",
                         severity="warning")  # fmt: skip


def sees_something(block: Block) -> bool:
    """Say whether every query certainly sees at least one key."""
    if isinstance(block.mix, Recurrence):
        return True
    return block.mix.mask == TRUE or (not block.crosses and sees_itself(block.mix.mask))
