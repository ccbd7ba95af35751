"""Chosen groups of keys, gathered: no other is read.

    select = top(8, dot(q[h, i], kb[h, j // 64]), size = 64, always = blocks(64))

    def attend_choice(self, q, i, first, last, kb):   which groups each query reads
    def attend_reads(self, i, j):                     which pairs it sees, and reads always

A mask is asked at the first and last key of a group: it must tell there of all between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...grammar.expr import FALSE, TRUE, fold, names
from ...grammar.show import show
from ...grammar.syntax import Binary, Expr, Name
from ..algebra.groups import told_at_ends
from ..algebra.masks import extent
from ..graph.sides import KEY
from ..plan.attention import Attention
from ..text.pairs import Pairs, table_name
from ..text.tensors import stored
from ..text.text import atomic, call, ident, indent, tupled
from . import choosing
from .calls import needed
from .way import Call, Way
from .weights import method_name, operands, signature

_FULL = 4  # how many times what it reads a query must see, for it to pay


def obstacle(attention: Attention) -> str | None:
    """Return why chosen groups cannot be gathered."""
    mix, select = attention.mix, attention.mix.select
    if select is None:
        return "it reads all that it sees"
    form = attention.exponential
    if form is None or not form.is_softmax or mix.score != Name("s") or mix.similarity is not None:
        return "only softmax of plain logits is taken group by group"
    if mix.weights != Name("p") or mix.dropout or attention.node.op.statistics or attention.maps:
        return "its map is read, or changed"
    if attention.in_turn is not None:
        return attention.in_turn
    if attention.node.dims[2] != "n" or attention.crosses:
        return "its queries and keys are different tokens"
    if select.size < 8:
        return f"groups of {select.size} keys are too few to be gathered"
    if select.rows > 1 or select.within:
        return "queries choose together" if select.rows > 1 else "a score is made of every pair"
    if "s" in names(select.score) or any(each.at == KEY for each in operands(attention)):
        return "it chooses by what is read of every key"
    for expr in (mix.mask, select.always, select.among):
        if not names(expr) <= {"i", "j", "true", "false"}:
            return f"`{show(expr)}` reads more than places"
    for expr in (mix.mask, select.always, select.candidates(mix.mask)):
        if not told_at_ends(expr, select.size, both=expr == mix.mask):
            return f"the first and the last key of a group do not tell of all by `{show(expr)}`"
    return None


def least(attention: Attention) -> int:
    """Return from how many tokens on it pays: from there a query reads a part of what it sees."""
    select = attention.mix.select
    assert select is not None
    count = int(select.amount) if select.kind == "top" else 1
    return 2 * _FULL * select.size * (count + 1)


def reason(attention: Attention) -> str:
    """Say what is gathered."""
    select = attention.mix.select
    assert select is not None
    return (
        f"chosen groups of {select.size} keys are gathered, each with the queries that read it; "
        f"below {least(attention):,} tokens some queries at a time"
    )


def needs(attention: Attention) -> tuple[str, ...]:
    """Return what must hold of a call: a whole sequence in order, long enough."""
    return (*needed(attention, documents=False), f"gathers(x, {least(attention)})")


def invoke(attention: Attention, given: Call) -> list[str]:
    """Return a call for whole sequences."""
    streams = [given.operand(each.name) for each in operands(attention)]
    args = [given.q, given.k, given.v, *streams, *map(given.operand, attention.tables)]
    return call(f"{given.target} = self.{method_name(attention)}_gathered", args)


def steps(attention: Attention, given: Mapping[str, str], target: str) -> tuple[str, list[str]]:
    """Return when few queries look up what they chose among all kept keys, and the call."""
    when = f"batch.given is None and steps_gather({given['q']}, {given['k']}, {least(attention)})"
    streams = [given[each.variable] for each in operands(attention)]
    tables = [given[table_name(each)] for each in attention.tables]
    args = [given["q"], given["k"], given["v"], given["i"], *streams, *tables]
    return when, call(f"{target} = self.{method_name(attention)}_steps", args)


def method(attention: Attention) -> list[str]:
    """Return the methods that it is made of."""
    name, select = method_name(attention), attention.mix.select
    assert select is not None
    streams = [each.variable for each in operands(attention)]
    tables = [table_name(each) for each in attention.tables]
    tensors = [ident(each) for each in attention.tensors]
    held = [stored(attention.graph.block, each) for each in attention.tensors]
    given = ["q", "k", "v", *streams, *tables]
    args = [f"self.{name}_choice", f"self.{name}_reads", "q", "k", "v"]
    args += [tupled(streams), tupled(tables), tupled(held)]
    sizes = [f"size={select.size}", f"share={select.share}", f"scale={attention.mix.scale!r}"]
    at_steps = [*args[:5], "i", *args[5:], *sizes]
    args += sizes
    args += ["causal=True"] if extent(attention.mix.mask).causal else []
    writer = _Writer(attention)
    choice = ["q", "i", *streams, "first", "last", *tables, *tensors]
    two, three = "tuple[Tensor, Tensor]", "tuple[Any, Tensor, Tensor]"
    return [
        *signature(f"{name}_gathered", given, "Tensor"),
        *indent(call("return over_groups", args)),
        "",
        *signature(f"{name}_steps", [*given[:3], "i", *given[3:]], "Tensor"),
        *indent(call("return over_steps", at_steps)),
        "",
        *signature(f"{name}_choice", choice, three),
        *indent(writer.choice()),
        "",
        *signature(f"{name}_reads", ["i", "j"], two),
        *indent(writer.reads()),
    ]


class _Writer:
    """Writes who chooses what, at the first and the last key of each group."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention
        select = attention.mix.select
        assert select is not None
        self.select = select
        self.pairs = Pairs(attention.graph, attention.node, local=True)

    def _truth(self, expr: Expr) -> str:
        if expr in (TRUE, FALSE):
            return f"torch.full_like(i - j, {expr == TRUE}, dtype=torch.bool)"
        return replace(self.pairs, wide=".double()").value(expr).text

    def _asked(self, name: str, expr: Expr) -> list[str]:
        return [f"def {name}(j: Tensor) -> Tensor:", f"    return {self._truth(expr)}", ""]

    def choice(self) -> list[str]:
        """Return the body of what says which groups are chosen, read always, and seen whole."""
        mix, select = self.attention.mix, self.select
        made = [
            "wide = torch.promote_types(q.dtype, torch.float32)",
            *(["h = torch.arange(q.shape[1], device=q.device)[:, None, None]"]
              if "h" in names(select.score) else []),
            "pairs = (*q.shape[:3], first.shape[-1])",
            *self._asked("sees", mix.mask),
            *self._asked("keeps", fold(Binary("and", mix.mask, select.always))),
            *self._asked("offers", select.candidates(mix.mask)),
            "def score(j: Tensor) -> Tensor:",
            f"    return {atomic(self.pairs.value(select.score).text)}.to(wide)",
            "",
            "forced, free = keeps(first) | keeps(last), offers(first) | offers(last)",
            "e = score(first).expand(pairs)",
        ]  # fmt: skip
        made += choosing.by_those_who_share(select, self.attention.heads)
        number, chooser = repr(select.amount), choosing.CHOOSERS[select.kind]
        if select.counted and select.always != FALSE:
            made.append(f"count = ({number} - forced.sum(-1, keepdim=True)).clamp(min=0)")
            number = "count"
        elif select.kind == "top":
            chooser = "best_groups"
        made.append(f"chosen = {chooser}(e, free, {number})")
        return [*made, "return chosen, forced, sees(first) & sees(last)"]

    def reads(self) -> list[str]:
        """Return the body of what says which pairs are seen, and which read always."""
        select, mix = self.select, self.attention.mix
        return [f"return {self._truth(mix.mask)}, {self._truth(select.always)}"]


WAY = Way("gathered", obstacle, reason, needs=needs, invoke=invoke, methods=method)
