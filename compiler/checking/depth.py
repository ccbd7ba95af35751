"""The layers below one that is being checked, and what is read of them.

at(layer - 3).v      →  Found `at[-3].v`       counted from where it is read
at(0).attn.v         →  Found `at[0].attn.v`   of the one block `attn`, where a layer has several
previous.out         →  at(layer - 1).out      what the layer itself gave
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...grammar.diagnostics import did_you_mean, error
from ...grammar.source import Span
from ...grammar.syntax import Attribute, Binary, Call, Expr, Name, Number
from ...ops import Shape
from ..model import MAPS, Block, Stream, there

_OF_LAYER = ("x", "out")  # what every layer has


class Streams(Protocol):
    """What a block knows of its streams."""

    @property
    def title(self) -> str: ...
    @property
    def inputs(self) -> Mapping[str, Shape]: ...
    @property
    def streams(self) -> Mapping[str, Stream]: ...
    @property
    def declared(self) -> Iterable[str]: ...

    def shape(self, name: str, span: Span) -> Shape | None:
        """Return the shape of a stream; None if there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that is checked, as those above see it; `scopes` are those of its blocks."""

    block: Block
    scopes: Mapping[int, Streams]  # by the identity of the block


@dataclass(frozen=True, slots=True)
class Found:
    """A stream of another layer: its name here, its shape, and the block it is of, if of one."""

    name: str
    shape: Shape
    scope: Streams | None


def place_of(expr: Expr) -> tuple[Expr, tuple[str, ...]] | None:
    """Return the layer and the names that `at(e).attn.v` says; None for what is none of this."""
    path: list[str] = []
    while isinstance(expr, Attribute):
        path.insert(0, expr.name)
        expr = expr.base
    match expr:
        case Name("previous", span) if path:
            return Binary("-", Name("layer", span), Number(1), span), tuple(path)
        case Name("first", span) if path:
            return Number(0, "0", span), tuple(path)
        case Call("at", (layer,), ()) if path:
            return layer, tuple(path)
    return None


@dataclass(frozen=True, slots=True)
class Depth:
    """The layers below layer `at` of a model; `steps` are the layers in the order they run."""

    title: str
    at: int
    below: Sequence[Layer]
    steps: tuple[int, ...]

    def find(self, e: int, path: tuple[str, ...], counted: bool, span: Span) -> Found:
        """Return a stream of layer e (L201, L224); `counted` where e is counted from this one."""
        self._expect(e, span)
        layer = self.below[e]
        *parts, name = path
        block, prefix = self._part(layer.block, parts, e, span)
        step = self._step(e, counted, span)
        scope = self._scope(layer, block, name, parts, e, span)
        if scope is not None:
            while block.kind != "block":  # the only one in it
                block = next(each.what for each in block.parts if each.what.uses)
            shape = scope.shape("o" if name in MAPS else name, span)
            assert shape is not None
            return Found(there(step, f"{prefix}{name}"), shape, scope)
        own = {"x": block.x, "out": block.out.shape}
        own |= {each.name: each.shape for each in block.streams}
        return Found(there(step, f"{prefix}{name}"), own[name], None)

    def _expect(self, e: int, span: Span) -> None:
        """Raise L224 where layer e is not below."""
        if self.at == 0:
            raise error(
                "L224",
                "there is no layer below",
                span,
                f"it is layer 0 of `{self.title}`, the lowest",
                "begin `layers` with another one",
            )
        if not 0 <= e < self.at:
            raise error(
                "L224",
                "this layer is not below",
                span,
                f"it is layer {e}, read in layer {self.at} of `{self.title}`",
                f"a layer reads those below it: here 0 to {self.at - 1}",
            )

    def _part(self, block: Block, parts: list[str], e: int, span: Span) -> tuple[Block, str]:
        """Return a part of a layer, and what stands before its streams' names."""
        prefix = ""
        for each in parts:
            part = next((part for part in block.parts if part.module == each), None)
            if part is None or part.what.kind not in ("block", "layer"):
                raise error(
                    "L201",
                    f"layer {e} has no part `{each}`",
                    span,
                    f"it is `{block.name}`",
                    _listed(block),
                )
            prefix += f"{each}." if len(block.uses) > 1 else ""
            block = part.what
        return block, prefix

    def _scope(
        self, layer: Layer, block: Block, name: str, parts: list[str], e: int, span: Span
    ) -> Streams | None:
        """Return the block that has a stream; None where it is the layer's own (L201, L224)."""
        own = {each.name for each in block.streams} if block.kind != "block" else set()
        own |= set() if parts else set(_OF_LAYER)
        uses = block.uses
        if name in _OF_LAYER and name in own:
            return None
        if len(uses) == 1:
            scope = layer.scopes[id(uses[0])]
            if name in MAPS or (name not in scope.inputs and scope.shape(name, span) is not None):
                return scope
        if name in own:
            return None
        if len(uses) > 1:
            raise error(
                "L224",
                "it is not clear which block is meant",
                span,
                f"layer {e}, `{block.name}`, has {len(uses)}",
                _listed(block, name),
            )
        self._refuse(layer, block, name, e, span)
        return None

    def _refuse(self, layer: Layer, block: Block, name: str, e: int, span: Span) -> None:
        known = [*_OF_LAYER, *(each.name for each in block.streams)]
        known += [name for each in block.uses for name in layer.scopes[id(each)].declared]
        title = layer.scopes[id(block.uses[0])].title if block.uses else block.name
        which = "the layer below" if e == self.at - 1 else f"layer {e}"
        raise error(
            "L201",
            f"{which} has no stream `{name}`",
            span,
            f"it is `{title}`",
            did_you_mean(name, known),
        )

    def _step(self, e: int, counted: bool, span: Span) -> int:
        """Return when layer e ran, from the first step on or back from this one (L224)."""
        mine = [at for at, place in enumerate(self.steps) if place == self.at]
        theirs = [max(at for at in range(step) if self.steps[at] == e) for step in mine]
        back = {each - step for each, step in zip(theirs, mine, strict=True)}
        fixed = set(theirs)
        for same in (back, fixed) if counted else (fixed, back):
            if len(same) == 1:
                return same.pop()
        raise error(
            "L224",
            "a layer that runs again reads another one each time",
            span,
            f"layer {e} runs {len(fixed)} times, at different distances below layer {self.at}",
            "read a layer that runs once, or with this one in each turn",
        )


def _listed(block: Block, name: str = "k") -> str:
    """Return the parts of a layer that can be read, for people."""
    found = [each.module for each in block.parts if each.what.uses]
    return f"write {' or '.join(f'`.{each}.{name}`' for each in found)}" if found else ""
