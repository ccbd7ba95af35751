"""Queries and keys that meet by a product a channel, which fades on the way, as matrix products.

    similarity = sum(q * k * exp(min(c[h, i] - c[h, j], 0)))     c a running sum of numbers <= 0

def attend_faded(self, v, q, own, c_i, k, other, c_j):
    return summed_tiles(self.attend_weights_of_faded, v, (q, own, c_i), (k, c_j), (other,), …)[0]

A tile scales its queries by what fades after its first row, and keys by what fades up to it:
both are factors of one at most. What is within a tile is halved until nothing is left.
"""

from __future__ import annotations

from dataclasses import replace

from ...grammar.ranges import between
from ...grammar.show import show
from ...grammar.syntax import Binary, Expr, Index, Name, Number
from ...grammar.syntax import Call as CallOf
from ..algebra.masks import extent
from ..graph.graph import Graph, made_by
from ..graph.operations import Stage
from ..graph.sides import KEY, QUERY, at_token
from ..plan.attention import Attention
from ..text.pairs import operand
from ..text.tensors import stored
from ..text.text import call, indent, tupled
from . import tiles
from .calls import needed
from .way import Call, Way
from .weights import Writer, arguments, method_name, signature, weights

_LAID_OUT = ("split", "merge", "shift")  # stages that make no number rise


def obstacle(attention: Attention) -> str | None:
    """Return why queries and keys do not meet in channels that fade."""
    found = of_channels(attention)
    if isinstance(found, str):
        return found
    if attention.mix.keep is not None:
        return attention.in_turn
    if (why := tiles.obstacle(attention)) is not None:
        return why
    own = attention.node.dims[2] == "n" and not attention.crosses
    reach = attention.reach
    if not own or not extent(attention.mix.mask).causal:
        return "a query may see keys that are yet to come"
    if reach.back is not None:
        return f"its mask reaches {reach.back} tokens back, and tiles leave the others out"
    if attention.node.op.statistics or attention.maps or not attention.leaves_out:
        return "its map is read"
    if attention.tables or attention.mix.select is not None:
        return "its expressions read tables, or choose keys"
    if attention.before or attention.running:
        return "its rows read the queries before them"
    return None


def of_channels(attention: Attention) -> tuple[Expr, Expr] | str:
    """Return what has faded at the query and at the key, or why it is not of this form."""
    similarity = attention.mix.similarity
    if similarity is None:
        return "queries meet keys by `dot`"
    shown = f"`{show(similarity)}` is not `sum(q * k * exp(c[h, i] - c[h, j]))`"
    match similarity:
        case CallOf("sum", (product,)):
            factors = _factors(product)
        case _:
            return shown
    read = [operand(attention.node, each) if isinstance(each, Index) else "" for each in factors]
    rest = [each for each, name in zip(factors, read, strict=True) if not name]
    if sorted(read) != ["", "k", "q"]:
        return shown
    match rest[0]:
        case CallOf("exp", (CallOf("min", (gap, Number(0)) | (Number(0), gap)),)):
            pass
        case CallOf("exp", (gap,)):
            pass
        case _:
            return shown
    match gap:
        case Binary("-", Index(Name(name)) as late, Index(Name(other)) as early) if name == other:
            pass
        case _:
            return shown
    if at_token(late) != Name("i") or at_token(early) != Name("j"):
        return shown
    if len(attention.graph.node(name).dims) != 4 or len(late.items) != 2 != len(early.items):
        return f"`{name}` is not one number a channel"
    if not _falls(attention.graph, name):
        return f"`{name}` may rise from token to token: no `running(sum)` of numbers below 0"
    return late, early


def _factors(expr: Expr) -> list[Expr]:
    match expr:
        case Binary("*", left, right):
            return [*_factors(left), *_factors(right)]
    return [expr]


def _falls(graph: Graph, name: str) -> bool:
    """Say whether a stream certainly sums up what is nowhere above zero."""
    node = graph.node(name)
    while made_by(node, Stage) and node.op.name in _LAID_OUT:
        node = graph.node(node.inputs[0])
    if not made_by(node, Stage) or node.op.name != "running" or node.op.given["by"] != "sum":
        return False
    node = graph.node(node.inputs[0])
    while made_by(node, Stage) and node.op.name in _LAID_OUT:
        node = graph.node(node.inputs[0])
    if not made_by(node, Stage) or node.op.name != "pointwise":
        return False
    made = node.op.given["expr"]
    return between(made).high <= 0


def methods(attention: Attention) -> list[str]:
    """Return the method that attends to whole sequences, and the weights of one of its tiles."""
    found = of_channels(attention)
    assert not isinstance(found, str)
    name, groups = method_name(attention), arguments(attention)
    writer = Writer(attention).pairs
    texts = [replace(writer, layout=side).value(each).text
             for side, each in zip((QUERY, KEY), found, strict=True)]  # fmt: skip
    met = call("s = fading_products", ["q", "k", *texts])
    tensors = tuple(stored(attention.graph.block, each) for each in attention.tensors)
    every = [groups["queries"], groups["keys"], groups["places"], tensors, ()]
    args = [f"self.{name}_weights_of_faded", "v", *map(tupled, every), "ordered=True"]
    head = signature(f"{name}_faded", general(attention), "Tensor")
    return [
        *head,
        *indent([*call("found = summed_tiles", args), "return found[0]"]),
        "",
        *weights(attention, met=met),
    ]


def general(attention: Attention) -> tuple[str, ...]:
    """Return the arguments of the method, tensors left out."""
    groups = arguments(attention)
    return ("v", *(each for key in ("queries", "keys", "places") for each in groups[key]))


def invoke(attention: Attention, given: Call) -> list[str]:
    """Return a call for whole sequences."""
    args = [given.general[each] for each in general(attention)]
    return call(f"{given.target} = self.{method_name(attention)}_faded", args)


WAY = Way(
    "faded",
    obstacle,
    lambda _: (
        "channels that fade on the way: products of queries and keys, both scaled from where "
        "a tile begins"
    ),
    needs=lambda each: needed(each, documents=True),
    invoke=invoke,
    methods=methods,
)
