"""How the tokens of a block, or of one of its branches, mix: q, k, v, and what is done with them.

A branch shares the streams of its block that mean the same in it; what it overrides, and what
has another size in it, it has for itself: `two_q` beside `q`.
"""

from __future__ import annotations

from ...grammar import syntax
from ...grammar.diagnostics import did_you_mean, error
from ...grammar.expr import FALSE, TRUE, names
from ...grammar.show import show
from ...grammar.syntax import Binary, Call, Compare, Expr, Index, Name, Number, Pipe, walk
from ...ops import OPS, Shape
from ..algebra.masks import extent, linear
from ..model import (
    SAME_DOCUMENT,
    Keep,
    Mixing,
    Pairwise,
    Read,
    Recurrence,
    Select,
    Stream,
    is_map_elsewhere,
    without_document,
)
from .carried import carriers, require_fit, resolve_carry
from .depth import Found, place_of
from .flows import Target, elaborate
from .inheritance import Body
from .itself import require_strict, values_apart
from .keeping import require_held, resolve_keep
from .mixers import resolve_mixer
from .scalars import Axes, resolve, resolve_normalizer, streams_read
from .scope import Scope
from .selecting import resolve_select

_OPERANDS = {
    "q": ("heads", "head_dim"),
    "k": ("kv_heads", "head_dim"),
    "v": ("value_heads", "value_dim"),
}


_PRODUCT = Call("dot", (Name("q"), Name("k")))


class Part:
    """A block itself, or one branch of it: declares its q, k, v and what they are mixed to."""

    def __init__(self, scope: Scope, body: Body, block: Scope | None = None) -> None:
        self.scope, self.body, self.block = scope, body, block

    def declare(self) -> None:
        """Declare q, k and v, the mixed heads, and a branch's own `out`."""
        scope, body = self.scope, self.body
        source = self._source()
        position = self._position_stage()
        for name, (heads, width) in _OPERANDS.items():
            if body.has(name):
                value = body.get(name)
            else:
                head = Name("x") if name == "q" else source
                span = body.span_of("source") if name != "q" else body.span
                value = Pipe(head, (Name("linear", span), Name("split", span)), span)
            if position is not None and name != "v" and not _is_below(value):
                stages = (*value.stages, position) if isinstance(value, Pipe) else (position,)
                value = Pipe(value.head if isinstance(value, Pipe) else value, stages, value.span)
            if self._shared(name, value, (heads, width)):
                continue
            shape = Shape("n", int(scope.numbers[width]), int(scope.numbers[heads]))
            self._declare(name, value, shape)
        if not body.branch:
            scope.declared["o"] = self._mixing
        elif not body.has("out"):
            scope.declared[body.branch] = self._mixing
        else:
            scope.renamed["o"] = f"{body.branch}_o"
            scope.declared[scope.renamed["o"]] = self._mixing
            out = body.get("out")
            scope.declared[body.branch] = lambda name: Stream(
                name, elaborate(scope, out, Target(name))
            )

    def _shared(self, name: str, value: Expr, sizes: tuple[str, str]) -> bool:
        """Say whether a branch reads the block's own stream of this name."""
        if self.block is None:
            return False
        said = self.body.overridden | self.scope.renamed.keys()
        if name in said or names(value) & said:
            return False
        if "position" in said and name != "v":
            return False
        if "source" in said and name != "q" and not self.body.has(name):
            return False
        return all(self.scope.numbers[each] == self.block.numbers[each] for each in sizes)

    @property
    def _itself(self) -> str:
        """What the mixed heads are called where the values read them, else ""."""
        if self.body.branch and self.body.has("out"):
            return ""
        name = self.body.branch or "o"
        return name if self.body.has("v") and name in names(self.body.get("v")) else ""

    def _declare(self, name: str, value: Expr, shape: Shape | None) -> None:
        scope = self.scope
        if scope.branch:
            scope.renamed[name] = f"{scope.branch}_{name}"
        scope.declared[scope.own(name)] = lambda own: Stream(
            own, elaborate(scope, value, Target(own, shape))
        )

    def _source(self) -> Expr:
        """Return the stream that keys and values come from; a pipeline gets a name first."""
        source = self.body.get("source")
        if isinstance(source, Name):
            return source
        if self.block is None or "source" in self.body.overridden:
            self._declare("source", source, None)
        return Name("source", source.span)

    def _position_stage(self) -> Expr | None:
        """Return the stage `position` adds to q and k; None where it is none or a score."""
        position = self.body.get("position")
        name = position.id if isinstance(position, Name) else getattr(position, "function", "")
        library = self.scope.library
        if position == Name("none") or library.find("score", name):
            return None
        if name in OPS or library.find("stage", name):
            return position
        known = ["none", "rope", *library.known("score"), *library.known("stage")]
        raise error(
            "L208", f"there is no position `{name}`", position.span, "", did_you_mean(name, known)
        )

    @property
    def shape(self) -> Shape:
        """The shape of the mixed heads, where nothing is known of q."""
        numbers = self.scope.numbers
        return Shape("n", int(numbers["value_dim"]), int(numbers["heads"]))

    def _mixing(self, name: str) -> Stream:
        mix = self.body.get("mix")
        called = mix.id if isinstance(mix, Name) else getattr(mix, "function", "")
        shape = self.shape
        resolved: Pairwise | Recurrence
        if called != "attend":
            definition = self.scope.library.find("mix", called)
            if definition is None:
                known = ["attend", *self.scope.library.known("mix")]
                raise error(
                    "L201",
                    f"there is no mixer `{called}`",
                    mix.span,
                    "",
                    did_you_mean(called, known),
                )
            resolved = resolve_mixer(self.scope, definition, mix, self._recurrent_mask())
            inputs = streams_read(self.scope, resolved.exprs, ())
        else:
            resolved, operands = self._pairwise()
            operands = (*operands, *carriers(self.scope, resolved.carry))
            shape = Shape(operands[0].shape.tokens, shape.dim, shape.heads)
            inputs = streams_read(self.scope, resolved.exprs, operands)
        return Stream(name, Mixing(resolved, inputs, shape, self.body.span))

    def _recurrent_mask(self) -> str:
        mask = resolve(self.scope, self.body.get("mask"), "mask")
        document = Compare(
            (Index(Name("doc"), (Name("i"),)), Index(Name("doc"), (Name("j"),))), ("==",)
        )
        parts = _conjuncts(mask)
        said = ["document"] if document in parts else []
        rest = [part for part in parts if part not in (document, TRUE)]
        if all(_is_causal(part) for part in rest):
            return " ".join([*said, "causal"] if rest else said)
        raise error(
            "L217",
            "a recurrent mixer takes the masks `all`, `causal` and `document`",
            self.body.span_of("mask"),
            "",
            "set `mask = causal`",
        )

    def _pairwise(self) -> tuple[Pairwise, tuple[Read, ...]]:
        scope, body = self.scope, self.body
        operands: list[Read] = []
        again: Expr | None = None
        for name in _OPERANDS:
            with scope.findings.guard():
                if name == "v" and self._itself:
                    value = body.get("v")
                    apart = values_apart(scope, self._itself, value, self.shape)
                    operands.append(apart.rest)
                    again = apart.share
                    continue
                shape = scope.shape(name, body.span_of(name))
                assert shape is not None
                operands.append(Read(scope.own(name), shape))
        axes = Axes("n", "n")
        if len(operands) == len(_OPERANDS):
            q, k, v = (each.shape.tokens for each in operands)
            heads, kv_heads = (each.shape.heads or 1 for each in operands[:2])
            axes = Axes(q, k, heads // kv_heads)
            with scope.findings.guard():
                if k != v:
                    raise error(
                        "L207",
                        "keys and values run along different tokens",
                        body.span_of("v"),
                        f"k: {operands[1].shape}, v: {operands[2].shape}",
                    )
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
                raise error(
                    "L219",
                    "a dropout rate lies in 0 <= p < 1",
                    body.span_of("dropout"),
                    f"it is {dropout}",
                )
        with scope.findings.guard():
            mask = resolve(scope, body.get("mask"), "mask", axes)
            if mask == FALSE:
                raise error("L210", "this mask lets nothing be seen", body.span_of("mask"))
            if again is not None:
                span = body.span_of("mask")
                require_strict(self._itself, mask, (axes.queries, axes.keys), span)
            if scope.memory and axes.queries == axes.keys == "n":
                mask = with_memory(mask, scope.memory)
        select: Select | None = None
        with scope.findings.guard():
            select = resolve_select(scope, body.get("select"), axes, mask)
        chosen = None if select is None else select.score
        keep: Keep | None = None
        with scope.findings.guard():
            keep = resolve_keep(scope, body.get("keep"), axes)
        with scope.findings.guard():
            score = resolve(scope, self._score(), "score", axes, chosen)
        with scope.findings.guard():
            where = body.condition("normalize")
            normalize = resolve_normalizer(scope, body.get("normalize"), axes, where, score)
        with scope.findings.guard():
            weights = resolve(scope, body.get("weights"), "weights", axes, chosen)
        carry: Expr | None = None
        with scope.findings.guard():
            if len(operands) == len(_OPERANDS):
                carry = resolve_carry(scope, body.get("carry"), operands[1].shape.dim)
        similarity: Expr | None = None
        with scope.findings.guard():
            if len(operands) == len(_OPERANDS):  # else what it reads has been refused
                similarity = resolve(scope, body.get("similarity"), "similarity", axes)
                if similarity == resolve(scope, _PRODUCT, "similarity", axes):
                    similarity = None
        with scope.findings.guard():
            for name in sorted(filter(is_map_elsewhere, names(score) | names(weights))):
                self._same_map(axes, mask, scope.maps_read[name])
        scope.findings.settle()
        assert normalize is not None
        mix = Pairwise(
            scale, score, mask, normalize, weights, dropout, similarity, again, carry, select, keep
        )
        if keep is not None:
            shapes = tuple(each.shape for each in operands)
            require_held(scope, mix, axes, shapes, body.span_of("keep"))
        if carry is not None:
            require_fit(mix, (axes.queries, axes.keys), operands[1].name, body.span_of("carry"))
        return mix, tuple(operands)

    def _same_map(self, axes: Axes, mask: Expr, found: Found) -> None:
        """Check that another layer has a map of the same pairs (L225)."""
        span = self.body.span_of("weights" if self.body.has("weights") else "score")
        below = found.scope
        assert below is not None
        there = below.streams["o"].flow if "o" in below.streams else None
        heads = int(self.scope.numbers["heads"])
        help = "heads, tokens and masks of both layers must be the same"
        if not isinstance(there, Mixing) or not isinstance(there.mix, Pairwise):
            why, help = f"`{below.title}` is not attention of queries and keys", ""
        elif there.heads != heads:
            why = f"heads = {heads}, and {there.heads} in `{below.title}`"
        elif (there.queries, there.keys) != (axes.queries, axes.keys):
            why = (
                f"{axes.queries} × {axes.keys} tokens, and {there.queries} × {there.keys} in "
                f"`{below.title}`"
            )
        elif there.mix.keep is not None:
            why, help = f"`{below.title}` does not hold all keys", "leave its `keep` out"
        elif there.mix.mask != mask:
            why = f"mask = {show(mask)}, and {show(there.mix.mask)} in `{below.title}`"
        elif _reads_own(mask):
            why = "the mask reads streams or tensors, of which each layer has its own"
        else:
            return
        raise error("L225", "a layer below has a map of other pairs", span, why, help)

    def _score(self) -> Expr:
        """The score, after the position where that is a score too."""
        position, score = self.body.get("position"), self.body.get("score")
        if position == Name("none") or self._position_stage() is not None:
            return score
        stages = score.stages if isinstance(score, Pipe) and score.head is None else (score,)
        return Pipe(position, stages, score.span)


def _is_below(value: Expr) -> bool:
    """Say whether a pipeline is a stream of a layer below as it is, its position included."""
    return place_of(value) is not None


def with_memory(mask: Expr, count: int) -> Expr:
    """Return a mask that shows the first tokens of a sequence too, to those after them."""
    rest = without_document(mask)
    reach = extent(rest)
    front: Expr = Compare((Name("j"), Number(count, str(count))), ("<",))
    if reach.causal:
        order = "<" if reach.low > 0 else "<="
        front = Binary("and", front, Compare((Name("j"), Name("i")), (order,)))
    if rest == TRUE or _is_causal(rest):
        return mask
    seen = Binary("or", rest, front)
    return seen if rest == mask else Binary("and", seen, SAME_DOCUMENT[0])


def _reads_own(mask: Expr) -> bool:
    """Say whether a mask indexes anything but the documents."""
    return any(isinstance(node, Index) and node.base != Name("doc") for node in walk(mask))


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
