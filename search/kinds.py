"""Holes of a grammatical kind: which productions there are at a place of a file.

    grammar = Grammar(file, draw)
    grammar.opened(hole, grammar.place(block))    those of the table, definitions, what can be read

What is a production depends on the text alone, never on what else is drawn: the choices that a
hole has are the same in every draw. A definition that fits some places alone is tried in a small
block, with a few draws of its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count

from ..compiler.checking.check import check
from ..compiler.checking.library import standard
from ..compiler.facts.decoding import obstacle
from ..compiler.model import Block, Mixing, Pairwise
from ..grammar import syntax
from ..grammar.diagnostics import LoomError, did_you_mean, error
from ..grammar.expr import NotConstant, evaluate, number, rebuild
from ..grammar.syntax import Binary, Call, Expr, File, Index, Name, Number, Pipe
from .arguments import called
from .choosers import Chooser, Random
from .holes import contains_hole, depth_of, favoured, kind_of, open_kinds
from .productions import DEFINED, INCLUDED, Production, usual, written
from .reads import Body, reads

Named = syntax.Block | syntax.Model | syntax.Definition
Draw = Callable[[File, Chooser], File]
_DRAWS = 4  # with how many draws of its holes a production is tried
_TOKENS = range(0, 70, 3)  # at which a mask is tried
_ALL = Name("all")  # the mask of a block that has none
_SMALL = {"heads": 2, "head_dim": 8, "value_dim": 6}  # the block in which it is tried


@dataclass(frozen=True)
class Place:
    """Where a hole stands.

    `item` is what it stands in, None at the top of a file, `reads` what can be read there.
    `causal`: blocks that are drawn as a whole show no later token. `alone`: stages look at one
    token. `mask` is that of the block whose mixer is drawn.
    """

    item: Named | None = None
    reads: tuple[tuple[str, Production], ...] = ()
    causal: bool = True
    alone: bool = False
    mask: Expr = _ALL


class Grammar:
    """The productions of one file; `draw` fills the holes of those that are tried."""

    def __init__(self, file: File, draw: Draw) -> None:
        self._own = tuple(each for each in file.items if isinstance(each, Named))
        self._lets = tuple(each for each in file.items if isinstance(each, syntax.Let))
        self._draw = draw
        self._known: dict[tuple[int, str], tuple[Production, ...]] = {}
        self._places: dict[Named | None, Place] = {}  # kept, so that a place has one identity

    def place(self, item: Named | None) -> Place:
        """Return where the expressions of an item stand; None is the top of the file."""
        if item not in self._places:
            self._places[item] = self._place(item)
        return self._places[item]

    def _place(self, item: Named | None) -> Place:
        match item:
            case syntax.Model():
                bodies = self._lineage(item)
                return Place(item, causal=_tells_tokens(bodies), alone=True)
            case syntax.Block(kind="block"):
                bodies = self._lineage(item)
                return Place(item, reads(bodies), mask=_setting(bodies, "mask") or _ALL)
            case syntax.Definition("score" | "weights" | "normalize" | "mask"):
                return Place(item, reads((item.body,)))
            case _:
                return Place(item)

    def _lineage(self, item: syntax.Block | syntax.Model) -> tuple[Body, ...]:
        """Return the bodies of an item's bases and its own, the furthest first."""
        found: list[syntax.Block | syntax.Model] = [item]
        while (base := found[0].base) is not None:
            name = getattr(base, "id", getattr(base, "function", None))
            above = next((each for each in self._own if each.name == name), None)
            if above is None or isinstance(above, syntax.Definition) or above in found:
                break
            found.insert(0, above)
        return tuple(each.body for each in found)

    def free_name(self, path: str, taken: Container[str]) -> str:
        """Return a name after a path that nothing of the file, or of others, has."""
        base = re.sub(r"\W+", "_", path).strip("_")
        used = {each.name for each in (*self._own, *self._lets, *standard())}
        names = (base if at == 0 else f"{base}_{at}" for at in count())
        return next(each for each in names if each not in used and each not in taken)

    # ── productions ──────────────────────────────────────────────────────────────────────

    def opened(self, hole: Call, place: Place) -> tuple[Production, ...]:
        """Return what an `any(kind)` may become, by its depth and its weights (L513, L514)."""
        kind, depth, weights = kind_of(hole), depth_of(hole), favoured(hole)
        every = self.productions(kind, place)
        names = [each.name for each in every]
        for call in weights:
            if call.function not in names:
                have = ", ".join(f"`{each}`" for each in names)
                raise error(
                    "L513",
                    f"`{kind}` has no production `{call.function}`",
                    call.span,
                    "",
                    did_you_mean(call.function, names, f"here it has {have}"),
                )
        own = {call.function: float(evaluate(call.args[0], {})) for call in weights}
        weighed = (replace(each, weight=own.get(each.name, each.weight)) for each in every)
        left = tuple(
            each for each in weighed if each.weight > 0 and (depth > 0 or not any(parts(each)))
        )
        if not left:
            raise error(
                "L514",
                f"nothing can be drawn for `any({kind})`",
                hole.span,
                f"{len(every)} productions here, of depth {depth} and a weight above zero none",
                "raise `depth`, or leave a production without parts its weight",
            )
        return left

    def productions(self, kind: str, place: Place) -> tuple[Production, ...]:
        """Return all productions of a kind at a place; each has a name of its own."""
        key = (id(place), kind)
        if key not in self._known:
            found: dict[str, Production] = {}
            # those without parts first, so that the first draw is the smallest
            for each in sorted(self._productions(kind, place), key=lambda each: any(parts(each))):
                name = each.name
                while name in found:
                    name += "_"
                found[name] = replace(each, name=name)
            self._known[key] = tuple(found.values())
        return self._known[key]

    def _productions(self, kind: str, place: Place) -> Iterator[Production]:
        if (kind == "both_ways" and place.causal) or (kind == "along" and place.alone):
            return
        yield from (each for name, each in place.reads if name == kind)
        yield from self._defined(kind, place)
        for each in written(kind):
            if kind != "recurrence" or self._recurs(each, (), place):
                yield each
        for other in INCLUDED.get(kind, ()):
            yield from self._productions(other, place)

    def _defined(self, kind: str, place: Place) -> Iterator[Production]:
        """Yield the definitions that are productions, the file's in place of the library's."""
        if kind not in DEFINED:
            return
        own = {each.name: each for each in self._own if _kind(each) == DEFINED[kind]}
        std = {each.name: each for each in standard() if _kind(each) == DEFINED[kind]}
        for name, item in {**std, **own}.items():
            if isinstance(item, syntax.Model):
                continue
            reach = self._reach(item) if name in own else ()
            production = Production(name, called(item), usual(kind, name))
            if not _ring(reach, place) and self._fits(kind, item, production, reach, place):
                yield production

    def _reach(self, item: Named) -> tuple[Named, ...]:
        """Return an item and all of the file's that it reads, and those they read."""
        found: list[Named] = []
        todo = [item]
        while todo:
            each = todo.pop()
            if each not in found:
                found.append(each)
                todo += [other for other in self._own if other.name in _names(each)]
        return tuple(found)

    # ── which definitions fit ────────────────────────────────────────────────────────────

    def _fits(
        self,
        kind: str,
        item: syntax.Block | syntax.Definition,
        production: Production,
        reach: tuple[Named, ...],
        place: Place,
    ) -> bool:
        match kind:
            case "mask" | "keys":
                found = self._tried(reach, {"mask": production.value})
                return all(map(_shows_itself, found)) == (kind == "mask")
            case "activation" | "along":
                if _pointwise(item) != (kind == "activation"):
                    return False
                stage = Pipe(Name("x"), (Name("linear"), Name("split"), production.value))
                return all(self._tried(reach, {"q": stage, "v": stage}))
            case "recurrence":
                return self._recurs(production, reach, place)
            case "block":
                return isinstance(item, syntax.Block) and self._stands(item, reach, place)
            case _:
                return True

    def _recurs(self, production: Production, reach: tuple[Named, ...], place: Place) -> bool:
        """Say whether a mixer goes with the mask of the block that it stands in."""
        if contains_hole(place.mask):
            return False
        more = () if production.item is None else (production.item,)
        settings = {"mask": place.mask, "mix": production.value}
        return all(self._tried((*reach, *more), settings))

    def _stands(self, item: syntax.Block, reach: tuple[Named, ...], place: Place) -> bool:
        """Say whether a block can be a layer; where tokens are told, it decodes in every draw."""
        mask = _setting(self._lineage(item), "mask") or _ALL
        if place.causal and contains_hole(mask) and Name("causal") not in _met(mask):
            return False
        blocks = self._tried(reach, {}, called(item))
        return all(each and not (place.causal and obstacle(each)) for each in blocks)

    def _tried(
        self, reach: tuple[Named, ...], settings: Mapping[str, Expr], base: Expr | None = None
    ) -> tuple[Block | None, ...]:
        """Return draws of a small block with some settings, or of a base; None where wrong."""
        sizes = {name: Number(size) for name, size in _SMALL.items()} if base is None else {}
        body = tuple(syntax.Setting(name, each) for name, each in {**sizes, **settings}.items())
        probe = syntax.Block("probe", (), base, body)
        return _tried(self._draw, (*self._lets, *reach, probe))


@lru_cache(512)
def _tried(draw: Draw, items: tuple[syntax.Item, ...]) -> tuple[Block | None, ...]:
    def block(seed: int) -> Block | None:
        try:
            return check(draw(File(items), Random(seed))).blocks["probe"]
        except LoomError:
            return None

    return tuple(map(block, range(_DRAWS)))


def _shows_itself(block: Block | None) -> bool:
    """Say whether every token sees itself, as far as can be tried."""
    mixes = [] if block is None else [each.flow for each in block.streams]
    masks = [
        each.mix.mask
        for each in mixes
        if isinstance(each, Mixing) and isinstance(each.mix, Pairwise)
    ]
    try:
        return bool(masks) and all(
            evaluate(_at(mask, token, head), {}) for mask in masks for token in _TOKENS
            for head in range(_SMALL["heads"])
        )  # fmt: skip
    except NotConstant:
        return False


def _at(mask: Expr, token: int, head: int) -> Expr:
    """Return a mask for a query and key that are one token, whose document is any."""
    if isinstance(mask, Index) and mask.base == Name("doc"):
        return Number(0)
    if isinstance(mask, Name):
        places = {"i": token, "j": token, "h": head, "n": 99, "m": 99}
        return number(places[mask.id]) if mask.id in places else mask
    return rebuild(mask, lambda each: _at(each, token, head))


def _ring(reach: tuple[Named, ...], place: Place) -> bool:
    """Say whether what is reached may lead back to the place, or to another hole of a kind.

    From a model nothing leads back to it.
    """
    if place.item is None or isinstance(place.item, syntax.Model):
        return False
    return place.item in reach or any(
        any(open_kinds(expr)) for each in reach for expr in _exprs(each)
    )


def _pointwise(item: Named) -> bool:
    """Say whether a stage is said as an expression in x."""
    last = item.body[-1] if item.body else None
    return isinstance(last, syntax.Result) and not isinstance(last.value, Pipe)


def _met(mask: Expr) -> list[Expr]:
    """Return the terms of a chain of `and`."""
    match mask:
        case Binary("and", left, right):
            return _met(left) + _met(right)
        case _:
            return [mask]


def _tells_tokens(bodies: tuple[Body, ...]) -> bool:
    """Say whether a model tells the next token: it has a vocabulary, and tells no classes."""
    vocab, head = _setting(bodies, "vocab"), _setting(bodies, "head")
    classifies = isinstance(head, Call) and head.function == "classify"
    return vocab not in (None, Name("none")) and not classifies


def _setting(bodies: tuple[Body, ...], name: str) -> Expr | None:
    found = [
        each.value
        for body in bodies
        for each in body
        if isinstance(each, syntax.Setting) and each.name == name
    ]
    return found[-1] if found else None


def _kind(item: Named) -> str:
    return "model" if isinstance(item, syntax.Model) else item.kind


def _exprs(item: Named) -> list[Expr]:
    return [expr for _, expr in syntax.expressions(item)]


def _names(item: Named) -> set[str]:
    nodes = [node for expr in _exprs(item) for node in syntax.walk(expr)]
    called = {node.function for node in nodes if isinstance(node, Call)}
    return called | {node.id for node in nodes if isinstance(node, Name)}


def parts(production: Production) -> Iterator[Call]:
    """Yield the holes of a kind that a production has within it."""
    exprs = [production.value]
    if production.item is not None:
        exprs += _exprs(production.item)
    for expr in exprs:
        yield from open_kinds(expr)
