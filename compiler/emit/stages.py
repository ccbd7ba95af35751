"""The stages of a forward pass as text: `q = rope(self.q_proj(x)…, positions)  # [b, 8, n, 64]`.

A value that is read once and has no name of its own stands inside the expression that reads it,
while the line stays short.
"""

from __future__ import annotations

from ...grammar.syntax import Expr, Name, walk
from ...ops.shape import pooling
from ..facts.kept import Groups, carries, lookback
from ..graph.graph import AnyNode, Node, is_wide, made_by
from ..graph.operations import Input, Stage, TensorRead, Whole
from ..model import Taken, elsewhere
from ..text.tensors import is_moved
from ..text.text import LIMIT, atomic, call, comment, ident, shared_text
from .caches import TAILS, Caches, part_name, plain_name


class Stages(Caches):
    """Writes the nodes that are stages."""

    exact = False  # whether what training moves is read as it is stored

    def _remembered(self, node: Node[Stage], head: str, dims: str) -> list[str]:
        """Write a stage that reads the tokens before those it is given."""
        first = self.graph.node(node.inputs[0])
        given = plain_name(first.name)
        lines: list[str] = []
        if isinstance(first.op, Stage | Whole) and self._inlined(first):
            given = ident(node.name.partition(".")[0])
            lines = self._assign(first, f"{given} =")
        text = self._text(node, {first.name: given}, resumed=True)
        if carries(self.graph, node):
            return [*lines, *self._carried(node, head, text, dims)]
        given, cache = self._read(node, first.name, {first.name: given}), self.cache(TAILS)
        tail = call(
            f"    before, known = {cache}.before",
            [f'"{node.name}"', given, str(lookback(node)), "batch"],
        )
        lines += ["before, known = None, run", f"if {cache} is not None:", *tail]
        return [*lines, *comment(f"{head} {text}", dims)]

    def _carried(self, node: Node[Stage], head: str, text: str, dims: str) -> list[str]:
        """Write a stage that goes on from what it made of all tokens before."""
        cache, names = self.cache(TAILS), head.removesuffix(" =")
        made = "made" if names == head else names  # `return` takes no two names
        return [
            f'past = None if {cache} is None else {cache}.past("{node.name}")',
            *comment(f"{made}, total = {text}", dims),
            f"if {cache} is not None:",
            f'    {cache}.carry("{node.name}", total, batch)',
            *([f"{head} made"] if names == head else []),
        ]

    def _pooled(self, node: Node[Stage], head: str, dims: str) -> list[str]:
        """Write what makes groups of tokens: with a cache, of those that were not complete."""
        given, name = self._read(node, node.inputs[0], {}), ident(node.name)
        said = node.op.given
        numbers = f"{said['size']}, {said['stride']}, {int(said['start'])}"
        axis = pooling(str(node.dims[-2]))[1]
        padding = f"run_{axis} = run_of_groups(run, {axis})"
        starts = f"starts_{axis} = {axis} * torch.arange({name}.shape[-2], device=x.device)"
        if self.obstacle is not None:
            return [*comment(f"{head} {self._text(node)}", dims), padding, starts]
        tails = self.cache(TAILS)
        own = next(
            each for each in self.kept.parts
            if isinstance(each, Groups) and each.stream.name == node.name
        )  # fmt: skip
        cache = self.cache(part_name(own))
        before = [f'"{node.name}"', given, str(said["size"] - 1), "batch"]
        return [
            "before, groups = None, None",
            f"if {tails} is not None:",
            *call(f"    before, _ = {tails}.before", before),
            f"    groups = batch_of_groups(batch, {given}.shape[-2], {numbers})",
            *comment(f"{head} {self._text(node, resumed=True)}", dims),
            padding,
            f"if {cache} is not None:",
            f"    {name}, _, run_{axis} = {cache}.update(groups, {name}={name})",
            starts,
        ]

    def _remembers(self, node: AnyNode) -> bool:
        """Whether a stage reads earlier tokens, of those a cache is for."""
        return bool(lookback(node) or carries(self.graph, node))

    def _inlined(self, node: AnyNode) -> bool:
        """Whether a node stands inside the only expression that reads it, once."""
        if "." not in node.name or self._remembers(node) or hands_on(node):
            return False
        if node.name in self.pooled or (made_by(node, Whole) and node.op.taken is not None):
            return False
        readers = self.graph.readers(node.name)
        if len(readers) != 1 or readers[0].inputs.count(node.name) != 1:
            return node.name == self.graph.output
        reader = readers[0]
        if isinstance(reader.op, Whole):
            return True
        if not isinstance(reader.op, Stage):
            return False
        if reader.op.name == "pointwise":
            slot = Name(f"a{reader.inputs.index(node.name)}")
            return _count(reader.op.given["expr"], slot) == 1
        return True

    def handed_on(self) -> list[str]:
        """Return what layers above may read, as the items of a dict: its own, then its parts'."""
        parts = [each for each in self.graph.of(Whole) if hands_on(each)]
        several = len(self.block.uses) > 1
        own = [
            f'"{label}": {"out" if label == "out" else plain_name(name)}'
            for label, name in self._shared_now.items()
        ]
        for each in parts:
            given = given_by(each)
            under = f'{{f"{each.module}.{{name}}": own for name, own in {given}.items()}}'
            own.append(f"**{under if several else given}")
        return own

    def from_below(self) -> list[str]:
        """Write the streams of other layers, as far as they are of the tokens of the call."""
        lines = []
        for node in self.graph.of(Input):
            if elsewhere(node.name) is not None and self._read_now(node.name):
                dims = f"[{', '.join(map(str, node.dims))}]"
                lines += comment(f"{ident(node.name)} = {shared_text(node.name)}", dims)
        return lines

    def _read_now(self, name: str) -> bool:  # noqa: ARG002  where no attention reads it
        """Whether a stream is read at the tokens of the call, and not only as it was kept."""
        return True

    def handed(self, node: Node[Whole]) -> list[str]:  # noqa: ARG002  where it takes nothing more
        """Return what a part is given beside its stream."""
        return []

    def _taken(self, node: Node[Whole], how: Taken, head: str) -> list[str]:
        """Write a part that runs on some tokens alone."""
        x, chosen = (self._read(node, name, {}) for name in node.inputs)
        given = dict(each.split("=", 1) for each in self.handed(node) if "=" in each)
        kept = given.get("cache")
        own = "None" if kept is None else "own"
        lines = [] if kept is None else [f"own = None if {kept} is None else {kept}.cache"]
        lines += call("some = taken", ["batch", chosen, repr(how.count), repr(how.share), own])
        more = {"batch": "some", "cache": own, "tokens": "some.take(tokens)"}
        texts = [f"{name}={more.get(name, text)}" for name, text in given.items()]
        texts = ["some.take(" + x + ")", *texts]
        dims = f"[{', '.join(map(str, node.dims))}]"
        lines += call(f"made = self.{node.module}", texts)
        if kept is None:
            return [*lines, *comment(f"{head} some.give(made)", dims)]
        return [*lines, *comment(f"{head} finish(made, some, own)", dims)]

    def _text(
        self,
        node: Node[Stage] | Node[Whole],
        given: dict[str, str] | None = None,
        *,
        resumed: bool = False,
    ) -> str:
        """Write what a stage or a part computes; what it reads may be `given` as text."""
        texts = [self._read(node, name, given or {}) for name in node.inputs]
        if made_by(node, Whole):
            return f"self.{node.module}({', '.join([*texts, *self.handed(node)])})"
        assert made_by(node, Stage)
        definition = node.op.definition
        write = definition.resumed if resumed else definition.text
        text = write(texts, self.graph.shapes(node), node.op.given, node.module)
        wide = any(is_wide(self.graph.node(name)) for name in node.inputs)
        return f"{atomic(text)}.to(x.dtype)" if wide and node.op.name == "pointwise" else text

    def _read(self, node: Node[Stage] | Node[Whole], name: str, given: dict[str, str]) -> str:
        """Write what a stage reads: a name, a tensor, or what stands inside of it.

        Elementwise operations take wide numbers as they are, the others those of the block.
        """
        made = self.graph.node(name)
        if name in given:
            text = given[name]
        elif (made_by(made, Stage) or made_by(made, Whole)) and self._inlined(made):
            text = self._operand(node, self._text(made))
        else:
            text = self.tensor_text(made) if made_by(made, TensorRead) else plain_name(name)
        takes = made_by(node, Stage) and (node.op.name == "pointwise" or node.op.definition.wide)
        return f"{atomic(text)}.to(x.dtype)" if is_wide(made) and not takes else text

    def tensor_text(self, node: AnyNode) -> str:
        """Write a param or const as a stream of one token."""
        lifted = {0: "[None, None, None]", 1: "[None, None]", 2: "[:, None]"}[len(node.dims)]
        if is_moved(self.block, node.name):
            return f"{ident(node.name)}_{'exact' if self.exact else 'held'}{lifted}"
        return f"self.{node.name}{lifted}"

    @staticmethod
    def _operand(reader: Node[Stage] | Node[Whole], text: str) -> str:
        return text if reader.module or reader.op.name in ("rope", "dropout") else atomic(text)

    def assigned(self) -> list[str]:
        """Write all stages and parts that have a line of their own, but for the output."""
        return [
            line
            for node in self.graph.nodes
            if isinstance(node.op, Stage | Whole) and node.name != self.graph.output
            if not self._inlined(node)
            for line in self._assign(node, f"{ident(node.name)} =")
        ]

    def _assign(self, node: AnyNode, head: str) -> list[str]:
        """Write `head text  # dims`, the innermost stages on lines of their own if too long."""
        if not (made_by(node, Stage) or made_by(node, Whole)):
            return [f"{head} {plain_name(node.name)}"]
        if made_by(node, Whole) and node.op.taken is not None:
            return self._taken(node, node.op.taken, head)
        if hands_on(node):
            head = f"{head.removesuffix(' =')}, {given_by(node)} ="
        dims = f"[{', '.join(map(str, node.dims))}]"
        if node.name in self.pooled:
            assert made_by(node, Stage)
            return self._pooled(node, head, dims)
        if self._remembers(node) and self.obstacle is None:
            assert made_by(node, Stage)
            return self._remembered(node, head, dims)
        line = f"{head} {self._text(node)}"
        if len(line) + len(dims) + 4 <= LIMIT - 4 or not node.inputs:
            return comment(line, dims)
        first = self.graph.node(node.inputs[0])
        if not isinstance(first.op, Stage | Whole) or not self._inlined(first):
            return comment(line, dims)
        variable = ident(node.name.partition(".")[0])
        lines = self._assign(first, f"{variable} =")
        line = f"{head} {self._text(node, {first.name: variable})}"
        return [*lines, *comment(line, dims)]


def hands_on(node: AnyNode) -> bool:
    """Say whether a node is a part that gives what layers above read, beside its stream."""
    return made_by(node, Whole) and node.op.what.shared is not None


def given_by(node: AnyNode) -> str:
    """Return the variable of what a part gives to layers above."""
    return f"{ident(node.name)}_given"


def _count(expr: Expr, part: Expr) -> int:
    return sum(node == part for node in walk(expr))
