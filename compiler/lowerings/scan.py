"""A recurrence as PyTorch text: a function of one token, statement by statement.

def token(states, streams):
    (S,), (alpha_t, k_t, v_t, q_t) = states, streams
    S = alpha_t[..., None, None] * S + k_t[..., :, None] * v_t[..., None, :]
    o = (q_t[..., None, :] @ S).squeeze(-2)
    return (S,), (o,)
(S,), (o,) = over_tokens(token, (S,), (alpha_h, k_h, v_h, q_h))
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ...grammar.expr import evaluate, names
from ...grammar.syntax import Index, Name
from ..algebra.levels import affine_parts
from ..graph.graph import AnyNode, Graph, Node
from ..graph.operations import Scan
from ..model import Recurrence, State, Update
from ..text.tensors import stored
from ..text.text import atomic, call, ident, indent, tupled
from ..text.values import Text, Values, lifted


@dataclass
class _Ranks(Values):
    """How many dimensions a name has per head: 0 number, 1 vector, 2 matrix."""

    graph: Graph
    node: Node[Scan]
    known: dict[str, int]
    texts: dict[str, str] = field(default_factory=dict)  # how a name is written, if not so

    @property
    def typed(self) -> str:
        return "x.new_full((), {}, dtype=wide)"

    def leaf(self, expr: Name | Index) -> Text:
        match expr:
            case Name(id):
                return Text(self.texts.get(id, variable(id)), self.known[id])
            case Index(Name(id), items):
                own = stored(self.graph.block, id)
                return Text(f"{own}.to(wide)", len(self.graph.node(id).dims) - len(items))
        raise TypeError(f"{type(expr).__name__} in a mixer")


@dataclass
class _EachLevel(_Ranks):
    """Values for each level of one state: [b, h, levels, …]."""

    own: str = ""

    def leaf(self, expr: Name | Index) -> Text:
        if expr == Name(self.own):
            return Text(ident(self.own), self.known[self.own])
        found = super().leaf(expr)
        return Text(
            f"{atomic(found.text)}[{', '.join(['...', 'None', *[':'] * found.rank])}]", found.rank
        )


def states_of(mix: Recurrence) -> list[str]:
    return [each.name for each in mix.states]


def states(mix: Recurrence) -> list[str]:
    """Return the variables of the states."""
    return [ident(each.name) for each in mix.states]


def initial(node: Node[Scan], weight: str) -> list[str]:
    """Return the method that makes the states before the first token."""
    mix = node.op.mix
    lines = [
        f"def {method_name(node)}(self, batch: int) -> dict[str, Tensor]:",
        '    """Return the states before the first token."""',
        f"    {weight}",
        "    dtype = torch.promote_types(weight.dtype, torch.float32)",
        "    return {",
    ]
    for each in mix.states:
        sizes = "".join(f", {size}" for size in each.kept)
        value = repr(float(evaluate(each.init, {})))
        size = f"(batch, {node.dims[1]}{sizes})"
        args = [size, value, "dtype=dtype", "device=weight.device"]
        lines += indent(call(f'"{ident(each.name)}": torch.full', args, "),"), 2)
    return [*lines, "    }"]


def opened(node: Node[Scan], cache: str) -> list[str]:
    """Return the lines that say where states begin anew and stay as they are, and the states.

    `fresh` tokens begin a sequence, `idle` ones are padding; None where there are none.
    """
    mix = node.op.mix
    start = f"self.{method_name(node)}(b)"
    first = "batch.begun" if mix.resets else "batch.fresh"
    lines = [f"fresh, idle = {first}, batch.idle"]
    if mix.causal and cache:
        lines = [f"fresh, idle = {first}, None if {cache} is None else batch.idle"]
    if mix.leveled and mix.resets:
        lines += [
            "if batch.changed is not None and not batch.cut:",
            '    raise ValueError("levels begin anew where segments are sequences, not marks")',
        ]
    state = (
        f"state = {start} if {cache} is None else {cache}.kept"
        if mix.causal and cache
        else f"state = {start}"
    )
    return [*lines, state]


def method_name(node: AnyNode) -> str:
    """Return the name of the method that makes the states before the first token."""
    return "initial" if node.name == "o" else f"initial_{node.name}"


def forward(graph: Graph, node: Node[Scan], cache: str) -> list[str]:
    """Return the lines that run the recurrence, from the streams to its output."""
    mix = node.op.mix
    made, start = variable(node.name), f"self.{method_name(node)}(b)"
    streams = [each for each in node.inputs if not graph.is_tensor(each) and each != "doc"]
    ranks: dict[str, int] = {each.name: len(each.shape) for each in mix.states}
    lines = ["wide = torch.promote_types(x.dtype, torch.float32)"]
    for name in streams:
        text, ranks[name] = per_head(graph, node, name)
        lines.append(f"{_all_of(name)} = {text}.to(wide)")
    for each in mix.updates:
        ranks.setdefault(each.name, 1 if each.name == "o" else 0)
    known = _Ranks(graph, node, ranks, {name: _token_of(name) for name in streams})
    known.texts |= {
        each.name: f"summed_levels({ident(each.name)}, {ident(each.name)}_levels)"
        for each in mix.leveled
    }
    for each in mix.updates:  # intermediate names have the rank of what is written to them
        if each.name != "o" and each.name not in {state.name for state in mix.states}:
            ranks[each.name] = known.value(each.value).rank
    lines += opened(node, cache)
    lines += [f'{name} = state["{name}"]' for name in states(mix)]
    lines.append(f"anew = None if fresh is None else {start}")
    if mix.leveled:
        lines.append("place = batch.place.expand(b, n)[:, None]")
    lines += _causal(known, mix, streams) if mix.causal else _both_ways(known, mix, streams)
    lines.append(f"{made} = {made}.to(x.dtype)  # [b, {node.dims[1]}, n, {node.dims[3]}]")
    if not mix.causal:
        return lines
    return [*lines, *keep(cache, {name: name for name in states(mix)})]


def keep(cache: str, kept: Mapping[str, str]) -> list[str]:
    """Return the lines that keep the states after the last token, by name; none for no cache."""
    if not cache:
        return []
    args = [f"{name}={text}" for name, text in kept.items()]
    return [f"if {cache} is not None:", *indent(call(f"{cache}.keep", args))]


def by_kernel(graph: Graph, node: Node[Scan], cache: str, kernel: str) -> list[str]:
    """Return the lines that hand the recurrence to a kernel, and keep its last states."""
    mix = node.op.mix
    made, own = variable(node.name), states(mix)
    streams, tensors = [], []
    for name in node.inputs:
        if graph.is_tensor(name):
            tensors.append(stored(graph.block, name))
        elif name != "doc":
            streams.append(_by_heads(graph, node, name))
    lines = opened(node, cache)
    args = [*streams, *tensors, *(f'state["{name}"]' for name in own)]
    args.append("marks_of(fresh, idle)")
    lines += call(f"{', '.join([made, *own])} = {kernel}", args)
    lines.append(f"{made} = {made}.to(x.dtype)  # [b, {node.dims[1]}, n, {node.dims[3]}]")
    return [*lines, *keep(cache, {name: name for name in own})]


def _by_heads(graph: Graph, node: Node[Scan], name: str) -> str:
    """Return a stream as [b, heads, n] or [b, heads, n, d]; the heads may be fewer."""
    heads, dims = int(node.dims[1]), graph.node(name).dims
    if len(dims) == 4:
        return variable(name)
    if int(dims[2]) == heads:
        return f"{variable(name)}.mT"
    return f"{variable(name)}.unflatten(-1, ({heads}, -1)).transpose(1, 2)"


def per_head(graph: Graph, node: Node[Scan], name: str) -> tuple[str, int]:
    """Return a stream as [b, heads, n] or [b, heads, n, d], and its rank per head."""
    heads, dims = int(node.dims[1]), graph.node(name).dims
    text = _by_heads(graph, node, name)
    group = heads // int(dims[1]) if len(dims) == 4 else 1
    rank = 0 if len(dims) == 3 and int(dims[2]) == heads else 1
    return (f"{text}.repeat_interleave({group}, dim=1)" if group > 1 else text), rank


def _causal(known: _Ranks, mix: Recurrence, streams: list[str]) -> list[str]:
    every = _token_streams(streams) | ({"place_t": "place"} if mix.leveled else {})
    body = [
        *_reset(mix),
        *_merged(known, mix),
        *_held(mix),
        *_statements(known, mix, [*states_of(mix), "o"]),
        *_idle(mix),
    ]
    return _over_tokens("token", states(mix), every, body, {variable(known.node.name): "o"})


def _token_streams(streams: list[str]) -> dict[str, str]:
    """Return the names that streams have for one token, and those for all of them."""
    found = {_token_of(name): _all_of(name) for name in streams}
    return found | {"fresh_t": "fresh", "idle_t": "idle"}


def _over_tokens(
    name: str,
    carried: list[str],
    streams: Mapping[str, str],
    body: list[str],
    made: Mapping[str, str],
) -> list[str]:
    """Return a function of one token, and its call for all of them.

    The function changes what is `carried` and reads `streams`, under the names that they have
    there. `made` says under which name there is afterwards, for all tokens, what it has as which.
    """
    return [
        f"def {name}(states, streams):",
        f"    {tupled(carried)} = states",
        f"    {tupled(streams)} = streams",
        *indent(body),
        f"    return {tupled(carried)}, {tupled(made.values())}",
        *call(
            f"{tupled(carried)}, {tupled(made)} = over_tokens",
            [name, tupled(carried), tupled(streams.values()), "n"],
        ),
    ]


def _held(mix: Recurrence) -> list[str]:
    """Return the line that remembers the states before a token, which may be padding."""
    own = states(mix)
    return [f"{', '.join(f'{name}_before' for name in own)} = {', '.join(own)}"]


def _idle(mix: Recurrence) -> list[str]:
    """Return the lines that leave the states as they were at padding."""
    return [
        "if idle_t is not None:",
        *(
            f"    {name} = torch.where(idle_t[..., 0]{_lifted(each)}, {name}_before, {name})"
            for each, name in zip(mix.states, states(mix), strict=True)
        ),
    ]


def _merged(known: _Ranks, mix: Recurrence) -> list[str]:
    """Return the lines that merge the levels that are full, and weigh them."""
    lines = []
    for each in mix.leveled:
        assert each.weights is not None
        own = ident(each.name)
        lines += [
            f"{own} = merged_levels({own}, place_t[..., None])",
            f"{own}_levels = {known.value(each.weights).text}",
        ]
    return lines


def _reset(mix: Recurrence) -> list[str]:
    """Return the lines that begin the states anew where a sequence begins."""
    return [
        "if fresh_t is not None:",
        *(
            f'    {name} = torch.where(fresh_t[..., 0]{_lifted(each)}, anew["{name}"], {name})'
            for each, name in zip(mix.states, states(mix), strict=True)
        ),
    ]


def _lifted(state: State) -> str:
    return f"[..., {', '.join(['None'] * len(state.kept))}]" if state.kept else ""


def _statements(known: _Ranks, mix: Recurrence, written: Collection[str]) -> list[str]:
    """Return the updates of some states or of `o`, with those of all other names."""
    everywhere = {*states_of(mix), "o"}
    shapes = {each.name: each.shape for each in mix.states}
    shapes["o"] = (int(known.node.dims[3]),)
    batched = {*known.texts, *shapes}
    leveled = {each.name for each in mix.leveled}
    lines = []
    for each in mix.updates:
        if each.name in everywhere and each.name not in written:
            continue
        if each.name in leveled:
            lines += _each_level(known, each)
            continue
        text = known.value(each.value).text
        if names(each.value) & batched:
            batched.add(each.name)
        elif each.name in shapes:  # the same for the whole batch
            sizes = "".join(f", {size}" for size in shapes[each.name])
            heads = known.node.dims[1]
            text = f"torch.as_tensor({text}).expand(b, {heads}{sizes}).to(wide)"
        lines.append(f"{variable(each.name)} = {text}")
    return lines


def _each_level(known: _Ranks, update: Update) -> list[str]:
    """Return the lines that update each level of a state, and add what the token writes."""
    own, rank = ident(update.name), known.known[update.name]
    linear, rest = affine_parts(update.value, update.name, lambda each: known.value(each).rank)
    lines = [f"{own} = torch.zeros_like({own})"]
    if linear is not None:
        every = _EachLevel(known.graph, known.node, known.known, known.texts, update.name)
        found = every.value(linear)
        text = found.text if found.rank == rank else f"{lifted(found, rank)}.expand_as({own})"
        lines = [] if linear == Name(update.name) else [f"{own} = {text}"]
    if rest is not None:
        lines += call(f"{own} = with_written", [own, lifted(known.value(rest), rank)])
    return lines


def _both_ways(known: _Ranks, mix: Recurrence, streams: list[str]) -> list[str]:
    """Write how every token is taken up, and then answered from where its sequence ends."""
    own, every = states(mix), _token_streams(streams)
    update = [*_reset(mix), *_held(mix), *_statements(known, mix, states_of(mix)), *_idle(mix)]
    past = {f"{name}_past": name for name in own}
    answer = [f"{tupled(own)} = {tupled(past)}", *_statements(known, mix, ["o"])]
    ends = {each: f"at_ends({each}, fresh)" for each in past}
    return [
        *_over_tokens("taken_up", own, every, update, past),
        *_over_tokens("answered", own, every | ends, answer, {variable(known.node.name): "o"}),
    ]


def variable(name: str) -> str:
    """Return the variable of a stream that is mixed or read; the block's own heads are `o`."""
    return name if name == "o" else ident(name)


def _all_of(name: str) -> str:
    return f"{ident(name)}_h"


def _token_of(name: str) -> str:
    return f"{ident(name)}_t"
