"""PyTorch's compiled FlexAttention: taken where it is asked for, to compare with.

    score = alibi; mask = causal

def attend_in_flex(self, q, k, v, own):
    def score(s, b, h, i, j):
        return s - self.slope[h] * (i - j).abs()

    def mask(b, h, i, j):
        return j <= i

It carries whole sequences and packed rows; other calls take the general text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...grammar.expr import TRUE
from ...grammar.functions import MAP_FUNCTIONS
from ...grammar.show import show
from ...grammar.syntax import Expr, Index, Name, walk
from ..graph.build import tensors_read
from ..graph.graph import Graph
from ..graph.operations import Attend
from ..graph.sides import rank
from ..plan.attention import CHOOSES, Attention
from ..text.pairs import widened
from ..text.tensors import stored
from ..text.text import atomic, call, indent
from ..text.values import Text, Values
from . import sdpa
from .calls import needed
from .way import Call, Way
from .weights import method_name, signature

_WITHIN = "visible if own is None else visible & (own[b, i] == own[b, j])"


def obstacle(attention: Attention) -> str | None:
    """Return why FlexAttention does not say what an attention means."""
    mix, node = attention.mix, attention.node
    if why := sdpa.obstacle(Attention(attention.graph, replace(node, op=_plain(attention)))):
        return why
    if attention.crosses or node.dims[2] != "n":
        return "its queries and keys are different tokens"
    if mix.select is not None:
        return CHOOSES
    if mix.dropout:
        return "it has no dropout"
    read = set(tensors_read(*attention.exprs))
    if streams := read - set(attention.tensors) - {"doc"}:
        return f"its expressions read `{min(streams)}`, of which each token has its own"
    if called := attention.called & MAP_FUNCTIONS.keys():
        return f"`{min(called)}` looks at other pairs"
    if any(rank(attention.graph, part) for expr in attention.exprs for part in walk(expr)):
        return "its expressions read vectors"
    if given := attention.names & {"n", "m", "seen"}:
        return f"its expressions read `{min(given)}`"
    if "doc" in read and attention.graph.block.marks:
        return f"`{show(mix.mask)}` says itself what documents mean"
    return None


def _plain(attention: Attention) -> Attend:
    op = attention.node.op
    return replace(op, mix=replace(op.mix, score=Name("s")))


@dataclass
class _Mods(Values):
    """Writes expressions of one pair, as FlexAttention asks for them."""

    graph: Graph

    @property
    def typed(self) -> str:
        return "{}"

    def prepared(self, pattern: Expr) -> Expr:
        return widened(pattern, ".to(torch.float32)")

    def leaf(self, expr: Name | Index) -> Text:
        if isinstance(expr, Name):
            return Text(expr.id, 0)
        assert isinstance(expr.base, Name)
        name = expr.base.id
        if name == "doc":
            (at,) = expr.items
            return Text(f"own[b, {self.value(at).text}]", 0)
        sizes = zip(expr.items, self.graph.node(name).dims, strict=True)
        items = [
            f"{atomic(self.value(item).text)}.long().clamp(0, {int(size) - 1})"
            for item, size in sizes
        ]
        return Text(f"{stored(self.graph.block, name)}[{', '.join(items)}]", 0)


def method(attention: Attention) -> list[str]:
    """Return the method that calls FlexAttention; `own` [b, n] numbers the sequences of a row."""
    mods, name = _Mods(attention.graph), method_name(attention)
    mask = attention.mix.mask
    scores = attention.mix.score != Name("s")
    head = signature(f"{name}_in_flex", ["q", "k", "v", "own"], "Tensor")
    visible = "j >= 0" if mask == TRUE else mods.value(mask).text
    body = []
    if scores:
        body += [
            "def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:",
            f"    return {mods.value(attention.mix.score).text}",
            "",
        ]
    doc = "doc" in tensors_read(mask)
    if doc:
        body += [
            "if own is None:",
            "    own = torch.zeros(len(q), q.shape[2], dtype=torch.int64, device=q.device)",
        ]
    body += [
        "def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:",
        f"    visible = {visible}",
        f"    return {'visible' if doc else _WITHIN}",
        "",
    ]
    args = ["q", "k", "v", "block_mask=blocks_of(self, mask, q, k, own)"]
    args += ["score_mod=score"] if scores else []
    q, k, v = (attention.graph.node(each).dims for each in attention.node.inputs[:3])
    args += [f"scale={attention.mix.scale!r}"] if attention.mix.scale != int(q[3]) ** -0.5 else []
    args = [*sdpa.alike(attention, *args[:3]), *args[3:]]
    args += ["enable_gqa=True"] if max(int(k[1]), int(v[1])) != int(q[1]) else []
    body += call("done: Tensor = compiled_flex_attention()", args)
    return [*head, *indent([*body, "return done"])]


def invoke(attention: Attention, given: Call) -> list[str]:
    """Return a call for whole sequences, or rows of several."""
    args = [given.q, given.k, given.v, "None if not batch.cut else batch.own"]
    return call(f"{given.target} = self.{method_name(attention)}_in_flex", args)


WAY = Way(
    "flex",
    obstacle,
    lambda _: "it was asked for",
    invoke=invoke,
    methods=method,
    needs=lambda each: needed(each, documents=True),
)
