"""One block: inheritance, sizes, streams, branches.

`elaborate_block` is called with a width (and the arguments of a parameterised block) and
returns a `model.Block`, or raises every finding together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ...grammar import syntax
from ...grammar.diagnostics import Diagnostic, error
from ...grammar.expr import TRUE, Value, names
from ...grammar.show import show
from ...grammar.syntax import Expr, Name
from ...ops import OPS, Shape
from ..algebra.masks import sees_itself
from ..algebra.unseen import unseen
from ..facts.later import later_read, sees_no_later
from ..model import (
    MAPS,
    Apply,
    Block,
    Flow,
    Mixing,
    Pairwise,
    Read,
    Recurrence,
    Stream,
    applies,
    flow_nodes,
    reaching,
)
from ..model import Part as Whole
from .depth import Depth
from .flows import Target, elaborate, moving, regularizing
from .inheritance import Body
from .layers import numbered, whole
from .library import Library
from .mixing import Part
from .moving import is_undeclared
from .scope import Findings, Scope

_GUESSES = {
    "heads": "",
    "kv_heads": "heads",
    "value_heads": "kv_heads",
    "head_dim": "",
    "value_dim": "head_dim",
}
_ABOUT_SHAPES = ("L206", "L207", "L216")
_PAIRWISE_ONLY = (
    "position", "similarity", "score", "normalize", "weights", "scale", "dropout",
    "carry", "select", "keep",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a block is told from outside."""

    width: int | None = None
    context_width: int | None = None
    layer: int = 0
    depth: int = 1
    below: Depth | None = None  # the layers below, in a model
    offered: Mapping[str, Shape] = field(default_factory=dict)  # what a model gives beside x
    memory: int = 0  # how many learned tokens stand in front
    grid: tuple[int, int] | None = None  # the rows and columns of a model's patches


def elaborate_block(
    library: Library, call: Expr, sizes: Sizes, warnings: list[Diagnostic] | None = None
) -> Block:
    """Return the checked block that `name` or `name(args)` stands for."""
    return draft_block(library, call, sizes).finish(warnings=warnings)


def draft_block(library: Library, call: Expr, sizes: Sizes) -> Draft:
    """Check a block, and leave open which of its streams are needed."""
    findings = Findings()
    body = Body(library, call, findings)
    title = body.block.name
    scope = Scope(
        library, findings, title=title, depth=sizes.below, whole=whole, memory=sizes.memory
    )
    _numbers(scope, body, sizes)
    sized = not findings.diagnostics
    builder = _Builder(scope, body, sizes)
    out = builder.build()
    if not sized:  # the sizes that were guessed only serve to find further misspelt names
        findings.keep(lambda each: each.code not in _ABOUT_SHAPES)
    findings.settle()
    assert out is not None
    return Draft(builder, out)


@dataclass(frozen=True, slots=True)
class Draft:
    """A checked block of which it is open what a layer above reads."""

    builder: _Builder
    out: Flow

    @property
    def scope(self) -> Scope:
        return self.builder.scope

    def finish(self, shared: Iterable[str] = (), warnings: list[Diagnostic] | None = None) -> Block:
        """Return the block, with the streams that reach its output or are `shared`."""
        block = self.builder.assemble(self.out, shared)
        self.scope.findings.settle()
        if warnings is not None:
            warnings.extend(_warnings(block, self.builder.body, self.scope.library))
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
    fill_heads(scope, body)


def fill_heads(scope: Scope, body: Body) -> None:
    """Fill in the numbers and widths of heads (L204, L205)."""
    numbers = scope.numbers
    for name, guess in _GUESSES.items():
        with scope.findings.guard():
            if name == "head_dim" and not body.has(name):
                _divides_width(scope, body)
            numbers[name] = scope.size(body.get(name), f"`{name}`")
        numbers.setdefault(name, numbers.get(guess, 64))
    for name in ("kv_heads", "value_heads"):
        _divides_heads(scope, body, name)


def _divides_heads(scope: Scope, body: Body, name: str) -> None:
    heads, fewer = int(scope.numbers["heads"]), int(scope.numbers[name])
    said = body.has(name) or name == "kv_heads"
    if heads % fewer and said:
        fits = [str(each) for each in range(1, heads + 1) if heads % each == 0][:8]
        choice = f"{', '.join(fits[:-1])} or {fits[-1]}" if len(fits) > 1 else fits[0]
        with scope.findings.guard():
            raise error(
                "L204",
                f"`{name}` must divide `heads`",
                body.span_of(name),
                f"heads = {heads}, {name} = {fewer}, remainder {heads % fewer}",
                f"use {choice}",
            )


def _divides_width(scope: Scope, body: Body) -> None:
    width, heads = int(scope.numbers["width"]), int(scope.numbers["heads"])
    if width % heads:
        raise error(
            "L205",
            "`heads` must divide the width",
            body.span_of("heads"),
            f"width = {width}, heads = {heads}, remainder {width % heads}",
            "choose another number of heads, or set `head_dim`",
        )


class _Builder:
    """Elaborates the parts of one block."""

    def __init__(self, scope: Scope, body: Body, sizes: Sizes) -> None:
        self.scope, self.body = scope, body
        self.offered, self.grid = sizes.offered, sizes.grid
        numbers = {name: int(value) for name, value in scope.numbers.items()}
        scope.inputs = {
            "x": Shape("n", numbers["width"]),
            "context": Shape("m", numbers["context_width"]),
        }
        scope.elaborate = self._stream
        self.numbers = numbers
        self.regularize: Flow | None = None
        self.moves: tuple[Stream, ...] = ()

    def build(self) -> Flow | None:
        """Elaborate every stream; return `out`."""
        scope, body, guard = self.scope, self.body, self.scope.findings.guard
        with guard():
            self._grid()
        for statement in body.lets.values():
            with guard():
                scope.declare(statement, moved=statement.name in body.moves)
        main = Part(scope, body)
        with guard():
            main.declare()
        scope.offer(self.offered)
        for branch in body.branches.values():
            with guard():
                self._branch(branch).declare()
        for name in [*body.lets, *body.branches]:
            with guard():
                if name in scope.declared:
                    scope.shape(name, body.span)
        if not body.branches:  # beside branches, `o` is made where it is read
            with guard():
                scope.shape("o", body.span)
            if "o" not in scope.streams:  # look for what is wrong with `out` all the same
                scope.inputs["o"] = main.shape
        out: Flow | None = None
        with guard():
            target = Target("out", Shape("n", self.numbers["width"]))
            out = elaborate(scope, body.get("out"), target)
        regularize: Flow | None = None
        with guard():
            regularize = self._regularize()
        moves = []
        for update in body.moves.values():
            if is_undeclared(scope, body.lets.get(update.name)):
                continue
            with guard():
                moves.append(moving(scope, update))
        if out is None or scope.findings.diagnostics:
            return None
        self.regularize, self.moves = regularize, tuple(moves)
        return out

    def _regularize(self) -> Flow | None:
        value = self.body.get("regularize")
        return None if value == Name("none") else regularizing(self.scope, value)

    def _grid(self) -> None:
        if not self.body.has("grid"):
            self.scope.grid = None if self.scope.memory else self.grid
            return
        if self.scope.memory:
            raise error(
                "L226",
                "a grid counts from the first token",
                self.body.span_of("grid"),
                f"{self.scope.memory} learned tokens stand in front of it",
                "leave `memory` out of the model",
            )
        match self.body.get("grid"):
            case syntax.ListOf((rows, cols)):
                self.scope.grid = (self.scope.size(rows, "rows"), self.scope.size(cols, "cols"))
            case other:
                raise error("L219", "a grid is (rows, cols)", other.span)

    def _branch(self, branch: Body) -> Part:
        """Return a branch, with the names and sizes it has of its own."""
        numbers = dict(self.scope.numbers)
        scope = self.scope.inner(branch.branch, numbers)
        fill_heads(scope, branch)
        for name in branch.changed(
            {name for name, value in numbers.items() if value != self.scope.numbers[name]}
        ):
            statement = branch.lets.get(name)
            if statement is not None:
                scope.renamed[name] = scope.declare(statement)
        return Part(scope, branch, self.scope)

    def _stream(self, let: syntax.Let, scope: Scope, name: str) -> Stream:
        return Stream(name, elaborate(scope, let.value, Target(name)))

    def assemble(self, out: Flow, shared: Iterable[str]) -> Block:
        """Put together what is needed."""
        added = [] if self.regularize is None else [self.regularize]
        ends = [out, *added, *(each.flow for each in self.moves)]
        needed = reaching(self.scope.streams, ends)
        for name in shared:
            read = "o" if name in MAPS else name
            needed |= reaching(self.scope.streams, [Read(read, self.scope.streams[read].shape)])
        kept = [each for name, each in self.scope.streams.items() if name in needed]
        flows = numbered([*(each.flow for each in kept), *ends])
        streams = tuple(replace(each, flow=flow) for each, flow in zip(kept, flows, strict=False))
        out, *more = flows[len(kept) :]
        regularize = more.pop(0) if added else None
        moves = tuple(replace(each, flow=flow) for each, flow in zip(self.moves, more, strict=True))
        nodes = [node for flow in flows for node in flow_nodes(flow)]
        reads_context = any(isinstance(node, Read) and node.name == "context" for node in nodes)
        modules = {node.module for node in nodes if isinstance(node, Apply | Whole)}
        for name in modules & self.scope.tensors.keys():
            statement = self.body.lets.get(name)
            with self.scope.findings.guard():
                raise error(
                    "L215",
                    f"`{name}` cannot be the name of this",
                    statement.span if statement else self.body.span,
                    "a pipeline's module has this name",
                    "choose another name",
                )
        n = self.numbers
        return Block(
            name=self.body.block.name,
            width=n["width"],
            context_width=n["context_width"] if reads_context else None,
            heads=n["heads"],
            kv_heads=n["kv_heads"],
            value_heads=n["value_heads"],
            head_dim=n["head_dim"],
            value_dim=n["value_dim"],
            streams=streams,
            tensors=tuple(self.scope.tensors.values()),
            out=out,
            regularize=regularize,
            moves=moves,
            span=self.body.span,
        )


def _warnings(block: Block, body: Body, library: Library) -> Iterator[Diagnostic]:
    used = {each.name for each in block.streams} | {each.name for each in block.tensors}
    for name, let in body.lets.items():
        if name not in used and name not in library.read_above:
            yield Diagnostic("W002", f"`{name}` is never used", let.span, severity="warning")
    for name, branch in body.branches.items():
        if name not in used and name not in library.read_above:
            yield Diagnostic(
                "W002",
                f"`{name}` is never used",
                branch.span,
                "",
                "read it in `out`",
                severity="warning",
            )
    mixes = [each.mix for each in block.mixings.values()]
    if mixes and all(isinstance(mix, Recurrence) for mix in mixes):
        own = {each.name for each in body.block.body if isinstance(each, syntax.Setting)}
        position = body.get("position")
        if (
            library.find("score", getattr(position, "id", getattr(position, "function", "")))
            is None
        ):
            own -= {"position"}  # a stage on q and k, which a recurrence reads too
        for name in _PAIRWISE_ONLY:
            if name in own:
                yield Diagnostic(
                    "W003",
                    f"`{name}` has no effect beside a recurrent mixer",
                    body.span_of(name),
                    severity="warning",
                )
    yield from _unseen(block, body)
    for flow in block.flows:
        found = later_read(block, flow)
        if found is not None and sees_no_later(block, flow):
            yield Diagnostic(
                "W006",
                "this may read a token after the query",
                found.span,
                f"`{show(found)}`",
                "what is generated token by token will not repeat it; read a token up to `j`",
                severity="warning",
            )
    for node in (node for flow in block.flows for node in applies(flow)):
        if beyond := OPS[node.op].counts_tokens(dict(node.options)):
            yield Diagnostic(
                "W001",
                "this block depends on the number of tokens",
                node.span,
                beyond,
                "a cache keeps keys as they were turned, so decoding will "
                "not repeat the whole sequence",
                severity="warning",
            )
    lengths = {"n", "m"} & {
        name
        for mix in mixes
        if isinstance(mix, Pairwise)
        for expr in mix.exprs
        for name in names(expr)
    }
    if lengths:
        yield Diagnostic(
            "W001",
            "this block depends on the number of tokens",
            block.span,
            f"it reads {', '.join(sorted(lengths))}",
            "decoding will not repeat what training saw; `seen` would",
            severity="warning",
        )


def _unseen(block: Block, body: Body) -> Iterator[Diagnostic]:
    """Yield a warning for each mask that shows nothing to anyone (W005)."""
    bodies = {"o": body}
    for name, branch in body.branches.items():
        bodies |= {name: branch, f"{name}_o": branch}
    for name, mixing in block.mixings.items():
        if isinstance(mixing.mix, Pairwise) and (label := unseen(mixing.mix.mask, mixing.heads)):
            span = bodies.get(name, body).span_of("mask")
            yield Diagnostic(
                "W005",
                "this mask shows nothing to anyone",
                span,
                label,
                "the query stands at `i`, the key at `j`: `j <= i` looks back",
                severity="warning",
            )


def sees_something(mixing: Mixing) -> bool:
    """Say whether every query certainly sees at least one key."""
    if isinstance(mixing.mix, Recurrence):
        return True
    mask = mixing.mix.mask
    if mixing.mix.select is not None:
        return False
    if mixing.mix.keep is not None:  # its own key is never gone before it is read
        return sees_itself(mask)
    return mask == TRUE or (not mixing.crosses and sees_itself(mask))
