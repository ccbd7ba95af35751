"""Keys that later tokens carry, as PyTorch text: what one token does to all keys before it.

def carry(k, streams):
    b_t, w_t = streams
    return k - b_t[..., None] * w_t * (w_t * k).sum(-1)[..., None]
s, carried_keys = carried(carry, q, k, (b_t, w_t), fresh, idle)
"""

from __future__ import annotations

from dataclasses import dataclass

from ...grammar.syntax import Expr, Index, Name
from ..graph.graph import Graph
from ..plan.attention import Attention
from ..text.tensors import stored
from ..text.text import atomic, ident, indent, tupled
from ..text.values import Text, Values


@dataclass
class _OfKeys(Values):
    """Values for every key [b, g, chunks, m, …]; what is of the further token has one there.

    Or, with a shorter lead, for every token [b, g, n, …].
    """

    graph: Graph
    ranks: dict[str, int]
    lead: str = "[:, None, None]"  # what of each head has before its own dimensions

    @property
    def typed(self) -> str:
        return "k.new_full((), {})"

    def leaf(self, expr: Name | Index) -> Text:
        match expr:
            case Name("k"):
                return Text("k", 1)
            case Name(id):
                return Text(variable(id), self.ranks[id])
            case Index(Name(id), items):
                text = f"{stored(self.graph.block, id)}.to(k.dtype)"
                text += self.lead if items else ""
                return Text(text, len(self.graph.node(id).dims) - len(items))
        raise TypeError(f"{type(expr).__name__} in a `carry`")


def variable(stream: str) -> str:
    """Return what a stream is called where it is read of further tokens."""
    return f"{ident(stream)}_t"


def of_key_heads(attention: Attention, name: str) -> tuple[str, int]:
    """Return a stream as [b, g, n] or [b, g, n, d], and how many dimensions it has for a head."""
    graph, heads = attention.graph, attention.key_heads
    dims, own = graph.node(name).dims, ident(name)
    if len(dims) == 4:
        times = heads // int(dims[1])
        return (f"{own}.repeat_interleave({times}, dim=1)" if times > 1 else own), 1
    if int(dims[2]) == heads:
        return f"{own}.mT", 0
    return f"{own}.unflatten(-1, ({heads}, -1)).transpose(1, 2)", 1


def lines(attention: Attention) -> list[str]:
    """Return the lines that make the logits, before they are scaled, and the keys afterwards."""
    carry: Expr | None = attention.mix.carry
    assert carry is not None
    names = attention.carriers
    ranks = {name: of_key_heads(attention, name)[1] for name in names}
    written = _OfKeys(attention.graph, ranks).value(carry).text
    every = [variable(name) for name in names]
    streams = tupled(every)
    return [
        "def carry(k: Tensor, streams: tuple[Tensor, ...]) -> Tensor:",
        *indent([f"{streams} = streams"] if every else []),
        f"    return {atomic(written)}.expand_as(k)",
        "",
        f"s, carried_keys = carried(carry, q, k, {streams}, fresh, idle)",
    ]


def products(attention: Attention) -> list[str]:
    """Return the lines that make what each token adds to keys, `along` times `by` · key."""
    found = attention.products
    assert isinstance(found, tuple)
    ranks = {name: of_key_heads(attention, name)[1] for name in attention.carriers}
    writer = _OfKeys(attention.graph, ranks, "[:, None]")
    lines = []
    for name, expr in zip(("along", "by"), found, strict=True):
        text, rank = writer.value(expr)
        spread = f"{atomic(text)}{'' if rank else '[..., None]'}"
        lines.append(
            f"{name} = {spread}.expand(k.shape[0], {attention.key_heads}, q.shape[2], k.shape[-1])"
        )
    return lines
