"""A recurrence as PyTorch text: a loop over the tokens, statement by statement.

for step in range(n):
    S = alpha[:, :, step, None, None] * S + k_[..., :, None] * v_[..., None, :]
    outputs.append((q_[..., None, :] @ S).squeeze(-2))
o = torch.stack(outputs, dim=2)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ...grammar.dialect import write
from ...grammar.syntax import (
    Binary,
    Call,
    Compare,
    Expr,
    Index,
    Name,
    Number,
    Unary,
)
from ..graph import Graph, Node
from ..model import Recurrence
from .text import atomic, ident


@dataclass
class _Ranks:
    """How many dimensions a name has per head: 0 number, 1 vector, 2 matrix."""

    graph: Graph
    known: dict[str, int]
    texts: Mapping[str, str] = field(default_factory=dict)  # how a name is written, if not so

    def text(self, expr: Expr) -> tuple[str, int]:
        match expr:
            case Number(value):
                return repr(value), 0
            case Name("true" | "false" as id):
                return id.capitalize(), 0
            case Name(id):
                return self.texts.get(id, ident(id)), self.known[id]
            case Index(Name(id), items):
                rank = len(self.graph.node(id).dims) - len(items)
                return f"self.{id}", rank
            case Unary(op, operand):
                inner, rank = self.text(operand)
                return f"{'~' if op == 'not' else '-'}{atomic(inner)}", rank
            case Binary("@", left, right):
                return self._contract(self.text(left), self.text(right))
            case Binary(op, left, right):
                (a, one), (b, two) = self.text(left), self.text(right)
                rank = max(one, two)
                both = Binary(op, Name("a0"), Name("a1"))
                return _scalar(both, [_lift(a, one, rank), _lift(b, two, rank)]), rank
            case Compare(operands, ops):
                return self._elementwise(Compare(_slots(len(operands)), ops), operands)
            case Call("sum" | "mean" as name, (arg,)):
                inner, rank = self.text(arg)
                axes = "-1" if rank == 1 else "(-2, -1)"
                return (f"{atomic(inner)}.{name}({axes})" if rank else inner), 0
            case Call("norm", (arg,)):
                inner, rank = self.text(arg)
                axes = "-1" if rank == 1 else "(-2, -1)"
                return f"torch.linalg.vector_norm({inner}, dim={axes})" if rank else inner, 0
            case Call("outer", (left, right)):
                a, b = self.text(left)[0], self.text(right)[0]
                return f"{atomic(a)}[..., :, None] * {atomic(b)}[..., None, :]", 2
            case Call("dot", (left, right)):
                return self._contract(self.text(left), self.text(right))
            case Call(name, args):
                return self._elementwise(Call(name, _slots(len(args))), args)
        raise TypeError(f"{type(expr).__name__} in a mixer")

    def _elementwise(self, pattern: Expr, parts: tuple[Expr, ...]) -> tuple[str, int]:
        texts = [self.text(part) for part in parts]
        rank = max(each for _, each in texts)
        return _scalar(pattern, [_lift(text, own, rank) for text, own in texts]), rank

    @staticmethod
    def _contract(left: tuple[str, int], right: tuple[str, int]) -> tuple[str, int]:
        (a, one), (b, two) = (atomic(left[0]), left[1]), (atomic(right[0]), right[1])
        if one == 1 and two == 1:
            return f"({a} * {b}).sum(-1)", 0
        if one == 1:
            return f"({a}[..., None, :] @ {b}).squeeze(-2)", 1
        if two == 1:
            return f"({a} @ {b}[..., :, None]).squeeze(-1)", 1
        return f"{a} @ {b}", 2


def _slots(count: int) -> tuple[Expr, ...]:
    return tuple(Name(f"a{at}") for at in range(count))


def _scalar(pattern: Expr, texts: list[str]) -> str:
    """Write an elementwise pattern over a0, a1 … with texts in their places."""

    def leaf(each: Name | Index) -> str:
        assert isinstance(each, Name)
        return atomic(texts[int(each.id[1:])])

    return write(pattern, "torch", leaf)


def _lift(text: str, rank: int, to: int) -> str:
    """Give a text the trailing dimensions to meet one of a higher rank."""
    if rank == to or text.replace(".", "").replace("-", "").isdigit():
        return text
    if rank == 0:
        return f"{atomic(text)}[..., {', '.join(['None'] * to)}]"
    return f"{atomic(text)}[..., :, None]"


def states(mix: Recurrence) -> list[str]:
    return [ident(each.name) for each in mix.states]


def initial_states(graph: Graph, node: Node) -> list[str]:
    """Return the lines that make a state cache, in `init_cache`."""
    mix: Recurrence = node.get("recurrence")
    lines = []
    for each in mix.states:
        assert isinstance(each.init, Number | Unary)
        sizes = "".join(f", {size}" for size in each.shape)
        value = write(each.init, "torch", str)
        lines.append(
            f"{ident(each.name)}=torch.full((batch, {graph.block.heads}{sizes}), {value}, "
            "dtype=dtype, device=device),"
        )
    return lines


def forward(graph: Graph, node: Node) -> list[str]:
    """Return the lines that run the recurrence, from the streams to `o`."""
    mix: Recurrence = node.get("recurrence")
    block = graph.block
    streams = [name for name in node.inputs if graph.node(name).op not in ("tensor", "input")]
    streams += [name for name in node.inputs if name == "x"]
    ranks: dict[str, int] = {each.name: len(each.shape) for each in mix.states}
    lines = ["wide = torch.promote_types(x.dtype, torch.float32)"]
    for name in streams:
        text, ranks[name] = _per_head(graph, name)
        lines.append(f"{ident(name)} = {text}.to(wide)")
    for each in mix.updates:
        ranks.setdefault(each.name, 1 if each.name == "o" else 0)
    known = _Ranks(graph, ranks)
    for each in mix.updates:  # intermediate names have the rank of what is written to them
        if each.name != "o" and each.name not in {state.name for state in mix.states}:
            ranks[each.name] = known.text(each.value)[1]
    lines += ["state = self.init_cache(b, n) if cache is None else cache"]
    lines += [f'{name} = state.kept["{name}"]' for name in states(mix)]
    lines.append("outputs = []")
    lines += _causal(known, mix, streams) if mix.causal else _both_ways(known, mix, streams)
    lines.append(f"o = torch.stack(outputs, dim=2).to(x.dtype)  "
                 f"# [b, {block.heads}, n, {block.value_dim}]")  # fmt: skip
    lines.append("if cache is not None:")
    kept = ", ".join(f'"{name}": {name}.detach()' for name in states(mix))
    lines += [f"    cache.kept = {{{kept}}}", "    cache.length += n"]
    if mix.resets:
        lines.append("    cache.doc = doc[:, -1]")
    return lines


def _per_head(graph: Graph, name: str) -> tuple[str, int]:
    """Return a stream as [b, heads, n] or [b, heads, n, d], and its rank per head."""
    heads, dims, variable = graph.block.heads, graph.node(name).dims, ident(name)
    if name == "x":
        variable = "x"
    if len(dims) == 4:
        group = heads // int(dims[1])
        return (f"{variable}.repeat_interleave({group}, dim=1)" if group > 1 else variable), 1
    each = int(dims[2]) // heads
    if each == 1:
        return f"{variable}.mT", 0
    return f"{variable}.unflatten(-1, ({heads}, -1)).transpose(1, 2)", 1


def _causal(known: _Ranks, mix: Recurrence, streams: list[str]) -> list[str]:
    lines = ["for step in range(n):"]
    inner = replace(known, texts={name: _token_of(name) for name in streams})
    if mix.resets:
        names = ", ".join(states(mix))
        lines += [
            "    last = doc[:, step - 1] if step else state.doc",
            "    if last is not None:",
            "        anew = self.init_cache(b, n).kept",
            "        fresh = (doc[:, step] != last)[:, None]",
        ]
        for each in mix.states:
            dims = "".join("[..., None]" for _ in each.shape)
            name = ident(each.name)
            lines.append(f'        {name} = torch.where(fresh{dims}, anew["{name}"], {name})')
        assert names
    lines += [f"    {_token_of(name)} = {ident(name)}[:, :, step]" for name in streams]
    for update in mix.updates:
        lines.append(f"    {ident(update.name)} = {inner.text(update.value)[0]}")
    lines.append("    outputs.append(o)")
    return lines


def _both_ways(known: _Ranks, mix: Recurrence, streams: list[str]) -> list[str]:
    own = {each.name for each in mix.states}
    inner = replace(known, texts={name: _token_of(name) for name in streams})
    tokens = [f"    {_token_of(name)} = {ident(name)}[:, :, step]" for name in streams]

    def statements(writes_states: bool) -> list[str]:
        return [
            f"    {ident(each.name)} = {inner.text(each.value)[0]}"
            for each in mix.updates
            if each.name not in own or writes_states
            if each.name != "o" or not writes_states
        ]

    return ["for step in range(n):  # every token is taken up", *tokens, *statements(True),
            "for step in range(n):  # before the first is answered", *tokens, *statements(False),
            "    outputs.append(o)"]  # fmt: skip


def _token_of(name: str) -> str:
    return f"{ident(name)}_t"
