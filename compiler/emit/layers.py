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
from dataclasses import replace

from ...ops import Weight
from ..facts.kept import kept
from ..facts.parameters import constants
from ..graph.graph import AnyNode, Graph, Node, made_by
from ..graph.operations import Stage, Whole
from ..graph.passes import simplest
from ..model import Block
from ..text.tensors import constants as constant_lines
from ..text.tensors import parameter
from ..text.text import call, comment, indent
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


def made(block: Block, classes: Classes) -> str:
    """Return the expression that makes a module, with the blocks that it takes."""
    if block.kind == "block":
        return f"{classes[block]}()"
    given = (made(each.what, classes) for each in block.parts if each.what.uses)
    return f"{classes[block]}({', '.join(given)})"


def modules(graph: Graph, classes: Classes, alone: bool = False) -> list[str]:
    """Write the submodules of a graph's stages and parts; alone, of its blocks too."""
    lines = []
    for node in graph.nodes:
        if made_by(node, Whole):
            own = node.op.what
            text = node.module if own.uses and not alone else made(own, classes)
            lines.append(f"self.{node.module} = {text}")
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


def given_blocks(block: Block) -> list[str]:
    """Return the arguments of a constructor: the parts in which tokens mix."""
    return [f"{each.module}: nn.Module" for each in block.parts if each.what.uses]


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
        arguments = ", ".join(["self", *given_blocks(block)])
        lines += [f"    def __init__({arguments}) -> None:", *indent(init, 2)]
        if fixed:
            lines += ["", *indent(constant_lines(fixed))]
        if block.kind == "layer":
            lines += ["", *indent(self.init_cache())]
        return [*lines, "", *indent(self._forward())]

    def modules(self) -> list[str]:
        return modules(self.graph, self.classes)

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
        stacked = block.stacked
        given = ["self", "x: Tensor", *(f"{name}: Tensor" for name in block.reads)]
        given += ["shared: dict[str, Tensor]"] if stacked else []
        given += ["**given: object"] if told else []
        gives = "tuple[Tensor, dict[str, Tensor]]" if stacked else "Tensor"
        lines = call("def forward", given, f") -> {gives}:")
        lines += indent(self.assigned())
        end = self.graph.node(self.graph.output)
        if not stacked:
            return [*lines, *indent(self._assign(end, "return"))]
        return [*lines, *indent(self._assign(end, "out =")), "    return out, shared"]

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
