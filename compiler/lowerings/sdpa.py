"""`scaled_dot_product_attention`: softmax of plain logits under a mask.

    block a { mask = causal }     →   F.scaled_dot_product_attention(q, k, v, is_causal=True)

It carries whole sequences under `causal` and `all`. Under other masks it makes the map at once,
where that is small, on a GPU, or in a graph that is compiled.
"""

from __future__ import annotations

from ...grammar.expr import TRUE, names
from ...grammar.show import show
from ...grammar.syntax import Binary, Compare, Name
from ..graph.graph import shape_of
from ..model import Normalizer
from ..plan.attention import CHOOSES, Attention
from ..text.text import call, indent
from .calls import needed
from .way import Call, Way
from .weights import Writer, arguments, method_name, signature

CAUSAL = Compare((Name("j"), Name("i")), ("<=",))


def obstacle(attention: Attention) -> str | None:
    """Return why scaled_dot_product_attention does not say what an attention means."""
    mix, node = attention.mix, attention.node
    if attention.in_turn is not None:
        return attention.in_turn
    if attention.maps:
        return "a layer above reads its map"
    if node.op.statistics:
        return f"it gives no {' or '.join(f'`{kind}`' for kind in node.op.kinds)}"
    if mix.similarity is not None:
        return f"queries meet keys by a product only, here by `{show(mix.similarity)}`"
    if mix.score != Name("s"):
        return f"it has no score function, here `{show(mix.score)}`"
    if mix.select is not None and "s" in names(mix.select.score):
        return "which keys a query reads depends on its logits"
    if attention.running:
        return "which keys a query reads depends on sums over the queries before it"
    form = attention.exponential
    if form is None or not form.is_softmax:
        return f"it normalises by softmax only, here by `{_shown(mix.normalize)}`"
    if mix.weights != Name("p"):
        return f"it cannot change the weights, here `{show(mix.weights)}`"
    return None


def slow(attention: Attention) -> str | None:
    """Return why it would be slow where it fits: a mask that it takes as n × m numbers."""
    if attention.mix.select is not None:
        return f"{CHOOSES}: it takes that as a number for every pair"
    if attention.mix.mask in (TRUE, CAUSAL):
        return None
    return f"it takes `{show(attention.mix.mask)}` as a number for every pair"


def reason(attention: Attention) -> str:
    """Say why it is taken."""
    mask = "" if slow(attention) is None else ", under a mask for every pair"
    return f"softmax of plain logits is what scaled_dot_product_attention computes{mask}"


def needs(attention: Attention) -> tuple[str, ...] | None:
    """Return what must hold of a call without a mask for every pair; None where all have one."""
    return None if slow(attention) else needed(attention, documents=False)


def invoke(attention: Attention, given: Call) -> list[str]:
    """Return a call for whole sequences."""
    causal = ["is_causal=True"] if attention.mix.mask == CAUSAL else []
    return written(attention, [given.q, given.k, given.v, *causal], f"{given.target} = ")


def _shown(normalizer: Normalizer) -> str:
    value = normalizer.numerator
    if normalizer.denominator is not None:
        value = Binary("/", value, normalizer.denominator)
    text = show(value)
    if normalizer.where is not None:
        text += f" where {show(normalizer.where)}"
    return text


def method(attention: Attention) -> list[str]:
    """Return the method that attends to all keys at once, with the mask as a tensor."""
    groups = arguments(attention)
    given = ["v", *(each for group in groups.values() for each in group)]
    writer, args = Writer(attention), ["q", "k", "v"]
    writer.lines += writer.heads_of_keys("every_k")  # k itself has as many heads as v
    visible = writer.visibility()
    args += [f"attn_mask={visible}"] if visible else []
    lines = [*writer.sized(), *written(attention, args, "return ")]
    return [*signature(f"{method_name(attention)}_at_once", given, "Tensor"), *indent(lines)]


def alike(attention: Attention, q: str, k: str, v: str) -> list[str]:
    """Write q, k and v, the one of k and v that has fewer heads repeated to those of the other."""
    graph, node = attention.graph, attention.node
    keys, values = (int(graph.node(name).dims[1]) for name in (node.k, node.v))
    if keys < values:
        k = f"{k}.repeat_interleave({values // keys}, dim=1)"
    if values < keys:
        v = f"{v}.repeat_interleave({keys // values}, dim=1)"
    return [q, k, v]


def written(attention: Attention, args: list[str], head: str) -> list[str]:
    """Return a call of scaled_dot_product_attention with what the node needs beyond `args`."""
    graph, node = attention.graph, attention.node
    q, k, v = (shape_of(graph.node(name).dims) for name in (node.q, node.k, node.v))
    args = [*alike(attention, *args[:3]), *args[3:]]
    if node.op.mix.dropout:
        args.append(f"dropout_p={node.op.mix.dropout!r} if self.training else 0.0")
    if node.op.mix.scale != q.dim**-0.5:
        args.append(f"scale={node.op.mix.scale!r}")
    if max(k.heads or 1, v.heads or 1) != q.heads:
        args.append("enable_gqa=True")
    return call(f"{head}F.scaled_dot_product_attention", args)


WAY = Way("sdpa", obstacle, reason, slow, needs, invoke)
