"""The cache of a block: how `init_cache` makes each part, and under which variables it is read.

What is kept, and of what size, is said by `Kept` (`facts/kept.py`), where the block can decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, lru_cache

from ...grammar.expr import calls, evaluate
from ...grammar.functions import GROUPED
from ...grammar.syntax import POOLED
from ...ops import OPS
from ...ops.shape import pooling
from ..algebra.masks import reads_others
from ..facts import decoding
from ..facts.kept import (
    Budget,
    Context,
    Groups,
    Held,
    Kept,
    Keys,
    Part,
    State,
    Tails,
    Within,
    kept_of,
    pooled,
)
from ..facts.parameters import weights
from ..graph.graph import AnyNode, Graph, Node, made_by
from ..graph.operations import Attend, Scan
from ..graph.roots import Roots
from ..graph.sides import QUERY, read_along
from ..lowerings import scan
from ..model import (
    MAPS,
    OFFERED,
    Apply,
    Block,
    Mixing,
    Pairwise,
    Recurrence,
    Statistic,
    flow_nodes,
)
from ..plan.attention import Attention
from ..text.text import call, ident, indent

_KEYS, CONTEXT, TAILS = "keys", "context", "tails"  # the parts that a block has once
_OF_QUERIES = tuple(f"{each}_queries" for each in ("sum", "mean", "max", "running"))
_CLASSES: dict[type[Part], str] = {
    Keys: "KeyValueCache",
    State: "StateCache",
    Context: "ContextCache",
    Tails: "TailCache",
    Groups: "KeyValueCache",
}


class Caches:
    """The caches of one block, as text."""

    def __init__(self, graph: Graph, facts: Mapping[str, Attention] | None = None) -> None:
        self.graph, self.block, self.roots = graph, graph.block, Roots(graph)
        self.attentions = tuple(graph.of(Attend))
        self.recurrences = tuple(graph.of(Scan))
        self.crosses = graph.reads_context
        self.obstacle = decoding.obstacle(graph.block)
        self.kept = Kept() if self.obstacle is not None else kept_of(graph)
        self.borrows = frozenset(graph.block.borrows)
        self.pooled = frozenset(each.name for each in pooled(graph))
        self._facts = facts or {}

    def facts(self, node: Node[Attend]) -> Attention:
        """Return what is known of an attention."""
        return self._facts[node.name]

    @cached_property
    def _shared_now(self) -> dict[str, str]:
        """What the layer above reads at the tokens of the call: its node."""
        return {
            label: name
            for label, name in self.graph.shared
            if label not in MAPS and label not in self.graph.lent
        }

    def _seen_as(self, node: Node[Attend], name: str) -> str:
        """Return the variable of a stream along the keys, with what the cache gives back."""
        if node.name in self.borrows:
            return f"{ident(name)}_j"
        keys = self.kept.read_by(node.name)
        if keys is None:
            return plain_name(name)
        readers = [self._facts[each].node for each in keys.readers]
        special = not any(name in (other.k, other.v) for other in readers)
        elsewhere = any(self._reads_new(other, name, keys) for other in self.graph.nodes)
        elsewhere = elsewhere or name in self._shared_now.values()
        return f"{ident(name)}_j" if special or elsewhere else ident(name)

    def _reads_new(self, node: AnyNode, name: str, keys: Keys) -> bool:
        """Whether a node reads a stream of the new tokens after the cache has brought all."""
        if name not in node.inputs or not self.roots.late(node.name):
            return False
        if not made_by(node, Attend) or node.name not in keys.readers:
            return True
        others = read_along(self.graph, node, QUERY)
        return name == node.q or (node.name != keys.readers[0] and name in others)

    # the caches

    def cache(self, part: str) -> str:
        """Return the variable of one of the caches, by its name."""
        return "part" if len(self.kept.parts) <= 1 else f"{part.replace('.', '__')}_cache"

    def init_cache(self) -> list[str]:
        gives = "None" if self.obstacle is not None else "Cache"
        head = f"def init_cache(self, batch: int, length: int | None = None) -> {gives}:"
        if self.obstacle is not None:
            return [head, f'    """Raise `ValueError`: {self.obstacle}."""', self._refusal]
        parts = self.kept.parts
        what = _described(parts[0]) if len(parts) == 1 else "what tokens leave behind"
        lines = [
            head,
            f'    """Return {what}; without a length, it grows."""',
            *([f"    {self.weight()}"] if self.kept.of_tokens else []),
            "    return Cache(",
            "        self,",
            "        batch,",
        ]
        for part in parts:
            if isinstance(part, Within):
                made = f"self.{part.part}.init_cache(batch, length)"
                made = f"TakenCache({made})" if part.taken else made
                lines += indent([f"{ident(part_name(part))}={made},"], 2)
                continue
            budget = isinstance(part, Keys) and part.budget is not None
            kind = "BudgetCache" if budget else _CLASSES[type(part)]
            head = f"{ident(part_name(part))}={kind}"
            lines += indent(call(head, self._arguments(part), "),"), 2)
        return [*lines, "    )"]

    def _arguments(self, part: Part) -> list[str]:
        """Return what makes a cache."""
        if isinstance(part, State):
            return [f"**self.{scan.method_name(self.graph.node(part.recurrence))}(batch)"]
        length = "length"
        if isinstance(part, Groups):
            length = "None"  # how many groups a call makes, its padding says too
            part = Keys((), False, (part.stream,), None, 0, False)
        if not isinstance(part, Keys):
            return []
        sizes = ", ".join(map(_size, part.streams))
        ring = [] if part.ring is None else [f"ring={part.ring}"]
        ring += [f"prefix={part.prefix}"] if part.prefix else []
        if part.budget is not None:
            ring = [f"groups={part.budget.groups}", f"slots={part.budget.slots}"]
        for name in ("wide", "changing"):
            marked = [f'"{ident(each.name)}",' for each in part.streams if getattr(each, name)]
            ring += [f"{name}=({' '.join(marked)})"] if marked else []
        ring += ["ordered=True"] if part.ordered and part.ring is not None else []
        return [
            "batch",
            length,
            f"{{{sizes}}}",
            *ring,
            "dtype=weight.dtype",
            "device=weight.device",
        ]

    @property
    def _refusal(self) -> str:
        return f'    raise ValueError("this block cannot decode: {self.obstacle}")'

    def weight(self) -> str:
        """Write what says the dtype and device of the module."""
        default = "" if weights(self.block) else ", torch.empty(0)"
        shares = any(part.once is not None for part in self.block.parts)
        of = "weights_of(self)" if shares else "self.parameters()"
        return f"weight = next({of}{default})"


def part_name(part: Part) -> str:
    """Return what a part of the cache is called."""
    match part:
        case Keys(early=True):
            return _KEYS
        case Keys():
            return own_part(part.readers[0])
        case State():
            return own_part(part.recurrence)
        case Context():
            return CONTEXT
        case Tails():
            return TAILS
        case Groups(stream):
            return f"{ident(stream.name)}_groups"
        case Within(name):
            return own_part(name)


def own_part(node: str) -> str:
    """Return what the part is called that only one attention or recurrence has."""
    taken = (_KEYS, TAILS, "module")  # `Cache` itself takes a module
    return f"{node}_" if node.rstrip("_") in taken else node


def _described(part: Part) -> str:
    """Say what a cache is room for."""
    match part:
        case Keys(budget=Budget(slots=int(slots))):
            return f"room for the {slots} keys and values that stay"
        case Keys():
            what = "so many tokens" if part.ring is None else "the last tokens"
            return f"room for the keys and values of {what}"
        case State():
            return "room for the state"
        case Context():
            return "room for the keys and values of a context"
        case Tails():
            return "room for the tokens before the next one"
        case Groups(stream):
            return f"room for `{stream.name}`, pooled of so many tokens"
        case Within(name):
            return f"what `{name}` keeps"


def _size(held: Held) -> str:
    return f'"{ident(held.name)}": {(held.shape.heads, held.shape.dim)}'


@lru_cache(maxsize=256)
def own_rows(block: Block, training: bool = True) -> bool:
    """Say whether sequences of one row must be laid out in rows of their own.

    What reads all tokens of a row at once would else read those of all its sequences; and in
    chunks, a matrix begins at another number than 0 only before the first token.
    """
    if any(own_rows(each.what, training) for each in block.parts):
        return True
    if not training and any(each.taken is not None for each in block.parts):
        return True  # a cache of what is taken of a row knows one sequence
    flows = block.flows if training else (*(each.flow for each in block.streams), block.out)
    for flow in (node for each in flows for node in flow_nodes(each)):
        if isinstance(flow, Mixing) and isinstance(flow.mix, Pairwise):
            if flow.keys == "n" and flow.queries != "n":
                return True
            own = pooling(flow.keys)[0] != "m"  # a context is all of one
            others = ("convolve", *((*GROUPED, POOLED) if own else ()))
            if flow.keys != flow.queries:  # else a key is of one sequence, as its queries are
                others += _OF_QUERIES
            if any(calls(expr, name) for expr in flow.mix.exprs for name in others):
                return True
            select = flow.mix.select
            if select is not None and (select.rows > 1 or (own and select.size > 1)):
                return True
        elif isinstance(flow, Mixing) and isinstance(flow.mix, Recurrence) and not flow.mix.resets:
            matrices = [each for each in flow.mix.states if len(each.shape) == 2]
            if any(float(evaluate(each.init, {})) for each in matrices):
                return True
        elif isinstance(flow, Statistic) and flow.kind == "columns" and flow.shape.tokens != "n":
            return True
        elif isinstance(flow, Apply):
            op = OPS[flow.op]
            own = all(pooling(each.shape.tokens)[0] != "m" for each in flow.inputs)
            if own and (op.whole_rows or op.counts_tokens(dict(flow.options))):
                return True
    return False


def begins_within(block: Block) -> bool:
    """Say whether a sequence may begin within a row of a cache, after another one.

    Not where expressions read other keys in order: those of both sequences lie in one cache.
    """
    exprs = (expr for use in block.uses for each in use.mixings.values() for expr in each.mix.exprs)
    return not own_rows(block, training=False) and not any(map(reads_others, exprs))


def plain_name(name: str) -> str:
    """Return the variable of a node."""
    return name if name in ("x", "context", "o", *OFFERED) else ident(name)
