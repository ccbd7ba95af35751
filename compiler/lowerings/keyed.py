"""`scaled_dot_product_attention` with one more feature: logits plus a number of each key.

    score = s + c[i, h] - c[j, h]; mask = causal

def attend_keyed(self, v, q, k, c_j):
    bias = -c_j.mT
    q, k, v = with_bias(q, k, v, bias, 0.125)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125)[..., :64]

What a query adds to all of its logits changes no weight. A query's feature is one, a key's is its
number over the scale. That is as exact as float32 is; in less it is left to the general text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...grammar.derive import derivative
from ...grammar.expr import TRUE, fold, substitute
from ...grammar.show import show
from ...grammar.syntax import Binary, Expr, Index, Name, Number, Unary, children
from ..graph.build import tensors_read
from ..graph.sides import KEY, PAIR, QUERY, at_token, rank, sides
from ..plan.attention import CHOOSES, Attention
from ..text.pairs import Operand, operand
from ..text.text import call, indent
from . import sdpa
from .calls import needed
from .way import Call, Way
from .weights import Writer, method_name, signature


def obstacle(attention: Attention) -> str | None:
    """Return why logits are not products plus a number of each key, under a mask it takes."""
    found = of_keys(attention)
    return found if isinstance(found, str) else None


def of_keys(attention: Attention) -> Expr | str:
    """Return what the score adds for each key, or why it is not of this form."""
    mix, node = attention.mix, attention.node
    bare = replace(node, op=replace(node.op, mix=replace(mix, score=Name("s"))))
    if why := sdpa.obstacle(Attention(attention.graph, bare)):
        return why
    if mix.select is not None:
        return CHOOSES
    if mix.mask not in (TRUE, sdpa.CAUSAL):
        return f"it takes `causal` and `all`, here `{show(mix.mask)}`"
    if derivative(mix.score, Name("s")) != Number(1):
        return f"`{show(mix.score)}` adds to no logit as it is"
    if attention.may_weigh_nothing:
        return "a logit may be infinite"
    rest = fold(substitute(mix.score, {"s": Number(0)}))
    keys: list[tuple[str, Expr]] = []
    queries: list[Expr] = []
    for sign, term in _terms(rest):
        along = sides(term)
        if PAIR in along or {QUERY, KEY} <= along or rank(attention.graph, term):
            return f"`{show(term)}` is a number of a pair"
        if KEY in along and not _reads_as_kept(attention, term):
            return f"`{show(term)}` reads more than streams at the key's own token"
        if KEY in along:
            keys.append((sign, term))
        else:
            queries.append(term)
    read = set(tensors_read(*(term for _, term in keys)))
    if not keys or not set(tensors_read(*queries)) <= read:
        return "what it adds is of queries alone"
    return _joined(keys)


def _terms(expr: Expr, sign: str = "+") -> Iterator[tuple[str, Expr]]:
    match expr:
        case Binary("+" | "-" as op, left, right):
            yield from _terms(left, sign)
            yield from _terms(right, sign if op == "+" else "-" if sign == "+" else "+")
        case Unary("-", inner):
            yield from _terms(inner, "-" if sign == "+" else "+")
        case _:
            yield sign, expr


def _joined(terms: list[tuple[str, Expr]]) -> Expr:
    (sign, done), *rest = terms
    done = done if sign == "+" else Unary("-", done)
    for op, each in rest:
        done = Binary(op, done, each)
    return done


def _reads_as_kept(attention: Attention, expr: Expr) -> bool:
    """Say whether all that an expression reads of a key are streams beside it, at its token."""
    match expr:
        case Name("j"):
            return False
        case Index(Name(name), items) if not attention.graph.is_tensor(name):
            own = at_token(expr) == Name("j") and name != "doc"
            rest = [each for each in items if each != Name("j")]
            own = own and not operand(attention.node, expr)
            return own and all(_reads_as_kept(attention, each) for each in rest)
    return all(_reads_as_kept(attention, each) for each in children(expr))


def _streams(attention: Attention) -> list[str]:
    found = of_keys(attention)
    assert not isinstance(found, str)
    return [name for name in tensors_read(found) if not attention.graph.is_tensor(name)]


def method(attention: Attention) -> list[str]:
    """Return the method that calls scaled_dot_product_attention."""
    found = of_keys(attention)
    assert not isinstance(found, str)
    mix, graph, node = attention.mix, attention.graph, attention.node
    writer = Writer(attention)
    text = replace(writer.pairs, local=False).side(KEY).value(found).text
    args = ["q", "k", "v"]
    args += ["is_causal=True"] if mix.mask == sdpa.CAUSAL else []
    if mix.dropout:
        args.append(f"dropout_p={mix.dropout!r} if self.training else 0.0")
    args.append(f"scale={mix.scale!r}")
    width = graph.node(node.v).dims[-1]
    writer.lines += [
        f"bias = {text}",
        f"q, k, v = with_bias(q, k, v, bias, {mix.scale!r})",
        *call("done = F.scaled_dot_product_attention", args),
        f"return done[..., :{width}]",
    ]
    given = ["v", "q", "k", *(Operand(name, KEY).variable for name in _streams(attention))]
    head = signature(f"{method_name(attention)}_keyed", given, "Tensor")
    return [*head, *indent(writer.sized())]


def invoke(attention: Attention, given: Call) -> list[str]:
    """Return a call for whole sequences."""
    args = [given.v, given.q, given.k, *map(given.operand, _streams(attention))]
    return call(f"{given.target} = self.{method_name(attention)}_keyed", args)


WAY = Way(
    "keyed",
    obstacle,
    lambda _: (
        "softmax of logits and a number of each key: one more feature of "
        "scaled_dot_product_attention"
    ),
    needs=lambda each: (*needed(each, documents=False), "exact"),
    invoke=invoke,
    methods=method,
)
