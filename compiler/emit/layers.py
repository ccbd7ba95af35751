"""Layers, feed-forwards and stages as classes, and what makes the modules of a file.

class PreLayer(nn.Module):
    def __init__(self, attn: nn.Module) -> None: …     blocks come from outside, so that layers
    def forward(self, x, **given):                     with different blocks are one class
        y = x + self.attn(self.attn_norm(x), **given)

Such a class looks at one token at a time but for its blocks. One that reads earlier tokens itself,
or keeps more than one cache, is written as a block is (`emit/block.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ...grammar.source import Span
from ...ops import Weight
from ..facts.kept import kept
from ..facts.parameters import constants
from ..graph.graph import AnyNode, Graph, Node, made_by
from ..graph.operations import Stage, Whole
from ..graph.passes import simplest
from ..model import Block, Part
from ..text.tensors import constants as constant_lines
from ..text.tensors import parameter
from ..text.text import braced, call, comment, indent
from .stages import Stages

Classes = Mapping[Block, str]  # the class that each block, layer, feed-forward and stage is

_CALLED = {"layer": "Layer", "ffn": "FeedForward", "stage": "Stage"}
KINDS = {"layer": "layer", "ffn": "feed-forward", "stage": "stage"}


def described(block: Block) -> str:
    """Say what a layer, feed-forward or stage is."""
    if block.experts is not None:
        sizes = f"{block.x.dim} → {block.out.shape.dim} features"
        return f"{block.experts.count} feed-forwards `{block.name}`, {sizes}, each for its tokens"
    return f"{KINDS[block.kind]} `{block.name}`, {block.x.dim} → {block.out.shape.dim} features"


def wholes(blocks: Iterable[Block]) -> list[Block]:
    """Return the different layers, feed-forwards and stages in some blocks, inner ones first."""
    found: dict[Block, None] = {}
    for block in blocks:
        for part in block.parts:
            found |= dict.fromkeys(wholes([part.what]))
        if block.kind in _CALLED:
            found[block] = None
    return list(found)


def called(block: Block) -> str:
    """Return the name that its class would best have."""
    return f"{block.name}_{'Experts' if block.experts is not None else _CALLED[block.kind]}"


def is_local(block: Block) -> bool:
    """Say whether a layer, feed-forward or stage itself looks at one token at a time."""
    graph = simplest(block)
    alone = not any(
        node.op.definition.reads_earlier(graph.shapes(node), node.op.given)
        or node.op.definition.positional
        or node.op.definition.by_sequence
        or node.op.definition.whole_rows
        for node in graph.of(Stage)
    )
    alone = alone and all(each.taken is None for each in block.parts) and not block.moves
    return block.kind in _CALLED and alone and len(_keeping(block)) <= 1


def _keeping(block: Block) -> list[str]:
    """Return the parts that keep something between calls."""
    return [each.module for each in block.parts if kept(each.what).parts]


def takes_batch(block: Block) -> bool:
    """Say whether its module is told how tokens stand."""
    return (
        block.kind in ("block", "layer")
        or not is_local(block)
        or any(takes_batch(each.what) for each in block.parts)
    )


@dataclass
class Once:
    """The parts that several places share, in a text that makes modules: the first has them."""

    classes: Classes
    names: dict[Span, str] = field(default_factory=dict)  # the variables that hold them
    lines: list[str] = field(default_factory=list)  # what makes those
    placed: set[Span] = field(default_factory=set)

    def made(self, block: Block) -> str:
        """Return the expression that makes a module, with the parts that it takes."""
        given = [self.part(each) for each in from_outside(block)]
        return f"{self.classes[block]}({', '.join(given)})"

    def part(self, part: Part) -> str:
        """Return the expression that makes a part, or has it from where it is at home."""
        if part.once is None:
            return self.made(part.what)
        if part.once not in self.names:
            text = self.made(part.what)
            self.names[part.once] = f"once_{len(self.names)}"
            self.lines.append(f"{self.names[part.once]} = {text}")
        name = self.names[part.once]
        if part.once in self.placed:
            return f"Again({name})"
        self.placed.add(part.once)
        return name

    def flushed(self) -> list[str]:
        """Return the lines that are not written yet."""
        lines, self.lines = self.lines, []
        return lines


def from_outside(block: Block) -> list[Part]:
    """Return the parts that a constructor is given: blocks, and what other places share."""
    found: dict[object, Part] = {}
    for at, part in enumerate(block.parts):
        if part.what.uses or part.what.shares or part.once is not None:
            found.setdefault(at if part.once is None else part.once, part)
    return list(found.values())


def modules(graph: Graph, once: Once, making: str = "") -> list[str]:
    """Write the submodules of a graph's stages and parts.

    What comes from outside is an argument; with `making` "missing" it is made where it is not
    given, with "all" always.
    """
    lines: list[str] = []
    outside = {each.module: each for each in from_outside(graph.block)}
    first: dict[Span, str] = {}
    for node in graph.nodes:
        if made_by(node, Whole):
            own, name = node.op.once, node.module
            if own is not None and own in first:
                text = f"Again(self.{first[own]})"
            elif name not in outside:
                text = once.made(node.op.what)
            elif making:
                made = once.part(outside[name])
                text = made if making == "all" else f"{made} if {name} is None else {name}"
            else:
                text = name
            first |= {} if own is None or own in first else {own: name}
            lines += [*once.flushed(), f"self.{name} = {text}"]
        elif made_by(node, Stage) and node.module:
            text = node.op.definition.constructor(graph.shapes(node), node.op.given)
            lines += [f"self.{node.module} = {text}"] if text else []
    return lines


def offered_line(block: Block) -> list[str]:
    """Write what a layer reads of what its model offers."""
    if block.kind != "layer" or not block.reads:
        return []
    named = ", ".join(f'"{name}"' for name in block.reads)
    return [f"    reads = ({named},)  # of what a model gives to its layers", ""]


def given_parts(block: Block) -> list[str]:
    """Return the arguments of a constructor: a block makes itself what it is not given."""
    kind = "nn.Module | None = None" if block.kind == "block" else "nn.Module"
    return [f"{each.module}: {kind}" for each in from_outside(block)]


def local_class(block: Block, name: str, classes: Classes) -> list[str]:
    """Return the lines of a class that looks at one token at a time."""
    kind = _Local if block.experts is None else _Experts
    return kind(simplest(block), classes).lines(name)


class _Local(Stages):
    def __init__(self, graph: Graph, classes: Classes) -> None:
        super().__init__(graph)
        self.classes = classes

    def lines(self, name: str) -> list[str]:
        block, fixed = self.block, constants(self.block)
        base = "Constants" if fixed else "nn.Module"
        lines = [f"class {name}({base}):", f'    """The {described(block)}."""', ""]
        lines += offered_line(block)
        init = ["super().__init__()", *self.modules()]
        init += [line for each in self.tensors() if each.learned for line in parameter(each)]
        init += ["self.set_constants()"] if fixed else []
        arguments = ", ".join(["self", *given_parts(block)])
        lines += [f"    def __init__({arguments}) -> None:", *indent(init, 2)]
        if fixed:
            lines += ["", *indent(constant_lines(fixed))]
        if block.kind == "layer":
            lines += ["", *indent(self.init_cache())]
        return [*lines, "", *indent(self._forward())]

    def modules(self) -> list[str]:
        return modules(self.graph, Once(self.classes))

    def tensors(self) -> tuple[Weight, ...]:
        return self.block.tensors

    def init_cache(self) -> list[str]:
        if self.obstacle is not None:
            return super().init_cache()
        keeping = _keeping(self.block)
        text = f"self.{keeping[0]}.init_cache(batch, length)" if keeping else "Cache(self, batch)"
        return [
            "def init_cache(self, batch: int, length: int | None = None) -> Cache:",
            '    """Return what its block keeps, still empty; without a length it grows."""',
            f"    return {text}",
        ]

    def _forward(self) -> list[str]:
        block = self.block
        told = takes_batch(block)
        stacked, gives_more = block.stacked, block.shared is not None
        given = ["self", "x: Tensor", *(f"{name}: Tensor" for name in block.reads)]
        given += ["shared: tuple[dict[str, Tensor], ...]"] if stacked else []
        given += ["**given: object"] if told else []
        gives = "tuple[Tensor, dict[str, Tensor]]" if gives_more else "Tensor"
        lines = call("def forward", given, f") -> {gives}:")
        lines += indent([*self.from_below(), *self.assigned()])
        end = self.graph.node(self.graph.output)
        if not gives_more:
            return [*lines, *indent(self._assign(end, "return"))]
        handed = braced("return out, ", self.handed_on())
        return [*lines, *indent([*self._assign(end, "out ="), *handed])]

    def handed(self, node: Node[Whole]) -> list[str]:
        what = node.op.what
        given = [f"{name}={name}" for name in what.reads]
        given += ["shared=shared"] if what.stacked else []
        return [*given, "**given"] if takes_batch(what) else given


class _Experts(_Local):
    """Several feed-forwards: the text of one, along the rows that are sent to each."""

    def __init__(self, graph: Graph, classes: Classes) -> None:
        super().__init__(graph, classes)
        assert self.block.experts is not None
        self.count, self.most = self.block.experts.count, self.block.experts.most

    def modules(self) -> list[str]:
        lines = []
        for node in self.graph.of(Stage):
            if node.module:
                sizes = f"{self.graph.shapes(node)[0].dim}, {node.op.given['features']}"
                more = ", bias=True" if node.op.given["bias"] else ""
                lines.append(f"self.{node.module} = Experts({self.count}, {sizes}{more})")
        return lines

    def tensors(self) -> tuple[Weight, ...]:
        return tuple(replace(each, shape=(self.count, *each.shape)) for each in self.block.tensors)

    def tensor_text(self, node: AnyNode) -> str:
        return f"sent.each(self.{node.name}{'[:, None]' if not node.dims else ''})"

    def _text(
        self,
        node: Node[Stage] | Node[Whole],
        given: dict[str, str] | None = None,
        *,
        resumed: bool = False,
    ) -> str:
        if node.module:
            return f"self.{node.module}({self._read(node, node.inputs[0], given or {})}, sent)"
        return super()._text(node, given, resumed=resumed)

    def _forward(self) -> list[str]:
        end = self.graph.node(self.graph.output)
        body = [
            f'"""Map x [b, n, d] by the experts that weigh something: [b, n, {self.count}]."""',
            f"sent = Sent(weights, {self.most})",
            *comment("x = sent.take(x)", f"[1, rows, {self.block.x.dim}]"),
            *map(_along_rows, [*self.assigned(), *self._assign(end, "out =")]),
            "return sent.put(out)",
        ]
        return ["def forward(self, x: Tensor, weights: Tensor) -> Tensor:", *indent(body)]


def _along_rows(line: str) -> str:
    """Return a line whose comment says what is along rows, not tokens."""
    text, mark, dims = line.rpartition("  # [b, ")
    return f"{text}  # [1, {dims.replace('n, ', 'rows, ', 1)}" if mark else line
