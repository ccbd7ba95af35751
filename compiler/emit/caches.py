"""What a block keeps between calls: which streams, in which caches, under which variables.

One cache is for the keys and values of all attentions whose keys are there from the start;
those made of what was mixed before have one each, recurrences their states, short convolutions
the tokens before the next, and a context what is made of it once.
"""

from __future__ import annotations

from functools import cached_property

from ...grammar.expr import calls, evaluate
from ...ops import OPS
from ..algebra.masks import extent, reads_others, remembered, widest
from ..facts import decoding
from ..graph.graph import AnyNode, Graph, Node, made_by, shape_of
from ..graph.operations import Attend, Input, Scan, Stage
from ..lowerings import scan, weights
from ..model import MAPS, PREVIOUS, Apply, Block, Mixing, Pairwise, Recurrence, flow_nodes
from ..plan.attention import Attention
from ..text.pairs import Operand
from ..text.text import call, ident, indent


class Caches:
    """What depends on what in one block, and what is kept of it."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.block = graph, graph.block
        self.attentions = tuple(graph.of(Attend))
        self.recurrences = tuple(graph.of(Scan))
        self.crosses = any(each.name == "context" for each in graph.of(Input))
        self.obstacle = decoding.obstacle(graph.block)
        self.borrows = frozenset(graph.block.borrows)
        self._facts = {each.name: Attention(graph, each) for each in self.attentions}

    def facts(self, node: Node[Attend]) -> Attention:
        """Return what is known of an attention."""
        return self._facts[node.name]

    # what depends on what

    @cached_property
    def _roots(self) -> dict[str, frozenset[str]]:
        """Everything that each node depends on, and its own name."""
        roots: dict[str, frozenset[str]] = {}
        for node in self.graph.nodes:
            read = [] if starts(node) else node.inputs
            roots[node.name] = frozenset({node.name}).union(*(roots[name] for name in read))
        return roots

    def _late(self, name: str) -> bool:
        """Whether a node depends on what was mixed, or is mixed itself."""
        return any(each.name in self._roots[name] for each in self.graph.mixings())

    def _far(self, name: str) -> bool:
        """Whether a node depends on the context and not on the tokens."""
        roots = self._roots[name]
        return "context" in roots and not any(self._of_tokens(each) for each in roots)

    def _of_tokens(self, name: str) -> bool:
        """Whether a node is an argument that stands for the tokens of the call."""
        return name in ("x", "doc") or (
            name.startswith(PREVIOUS) and "n" in self.graph.node(name).dims
        )

    @cached_property
    def _from_context(self) -> list[str]:
        """What of the context is read by the rest: this is kept."""
        found: dict[str, None] = {}
        for node in self.graph.nodes:
            if not self._far(node.name):
                found |= {name: None for name in node.inputs if self._far(name)}
        return list(found)

    # what is kept of the tokens

    def _keyed(self, node: Node[Attend]) -> list[str]:
        """Return the streams of an attention along its keys: k, v, those indexed by j."""
        others = [each.name for each in self._operands(node) if each.at == "j"]
        return list(dict.fromkeys([node.k, node.v, *others]))

    def _operands(self, node: Node[Attend]) -> tuple[Operand, ...]:
        return weights.operands(self.facts(node))

    def _queried(self, node: Node[Attend]) -> list[str]:
        return [each.name for each in self._operands(node) if each.at == "i"]

    @cached_property
    def _held(self) -> dict[str, tuple[Node[Attend], ...]]:
        """The caches of keys and values: which attentions read each of them.

        One is for all whose keys are there from the start, so that nothing is kept twice.
        """
        held: dict[str, tuple[Node[Attend], ...]] = {}
        for node in self.attentions:
            tokens = node.dims[2] == "n" and not self.graph.crosses(node)
            if tokens and node.name not in self.borrows:
                early = not any(self._late(name) for name in self._keyed(node))
                name = "keys" if early else node.name
                held[name] = (*held.get(name, ()), node)
        return held

    def _kept(self, held: str) -> list[str]:
        """Return the streams that a cache keeps: what its attentions read, what is lent."""
        names = dict.fromkeys(name for node in self._held[held] for name in self._keyed(node))
        return list(names | (dict.fromkeys(self._lent.values()) if held == "keys" else {}))

    @property
    def _lent(self) -> dict[str, str]:
        """What layers above read of the cache of keys, under the name they know: its node."""
        return {label: name for label, name in self.graph.shared if label.endswith("[j]")}

    @property
    def _shared_now(self) -> dict[str, str]:
        """What the layer above reads at the tokens of the call: its node."""
        return {label: name for label, name in self.graph.shared
                if label not in MAPS and label not in self._lent}  # fmt: skip

    @cached_property
    def _tails(self) -> list[Node[Stage]]:
        """The stages that read earlier tokens."""
        return [node for node in self.graph.of(Stage) if self._tail(node)]

    def _tail(self, node: AnyNode) -> int:
        """Return how many earlier tokens a stage reads, of tokens that a cache is for."""
        if not isinstance(node.op, Stage) or "n" not in node.dims:
            return 0
        return node.op.definition.lookback(node.op.given)

    def _seen_as(self, node: Node[Attend], name: str) -> str:
        """Return the variable of a stream along the keys, with what the cache gives back."""
        if node.name in self.borrows:
            return f"{ident(name)}_j"
        mine = next((held for held in self._held.values() if node in held), ())
        if self.obstacle is not None or not mine:
            return plain_name(name)
        special = not any(name in (other.k, other.v) for other in mine)
        elsewhere = any(self._reads_new(other, name, mine) for other in self.graph.nodes)
        elsewhere = elsewhere or name in self._shared_now.values()
        return f"{ident(name)}_j" if special or elsewhere else ident(name)

    def _reads_new(self, node: AnyNode, name: str, held: tuple[Node[Attend], ...]) -> bool:
        """Whether a node reads a stream of the new tokens after the cache has brought all."""
        if name not in node.inputs or not self._late(node.name):
            return False
        if not made_by(node, Attend) or node not in held:
            return True
        return name == node.q or (node is not held[0] and name in self._queried(node))

    # the caches

    @cached_property
    def _parts(self) -> dict[str, str]:
        """The caches of the block, by name: the text that makes each."""
        if self.obstacle is not None:
            return {}
        parts = dict.fromkeys(self._held, "KeyValueCache")
        parts |= {node.name: "StateCache" for node in self.recurrences}
        if self.crosses:
            parts["context"] = "ContextCache"
        if self._tails:
            parts["tails"] = "TailCache"
        return parts

    @property
    def _only(self) -> str:
        """The name of the only cache."""
        return ident(next(iter(self._parts)))

    def cache(self, part: str) -> str:
        """Return the variable of one of the caches."""
        return "part" if len(self._parts) <= 1 else f"{part}_cache"

    def init_cache(self) -> list[str]:
        gives = "None" if self.obstacle is not None else "Cache"
        head = f"def init_cache(self, batch: int, length: int | None = None) -> {gives}:"
        if self.obstacle is not None:
            return [head, f'    """Raise `ValueError`: {self.obstacle}."""', self._refusal]
        made = {name: self._made(name, kind) for name, kind in self._parts.items()}
        what = next(iter(made.values()))[1] if len(made) == 1 else "what tokens leave behind"
        lines = [head, f'    """Return {what}; without a length, it grows."""',
                 *([f"    {self.weight()}"] if self._held else []), "    return Cache(",
                 "        self,", "        batch,"]  # fmt: skip
        for name, (args, _) in made.items():
            lines += indent(call(f"{ident(name)}={self._parts[name]}", args, "),"), 2)
        return [*lines, "    )"]

    def _made(self, name: str, kind: str) -> tuple[list[str], str]:
        """Return the arguments that make a cache, and what it is."""
        if kind == "StateCache":
            return ([f"**self.{scan.method_name(self.graph.node(name))}(batch)"],
                    "room for the state")  # fmt: skip
        if kind == "ContextCache":
            return [], "room for the keys and values of a context"
        if kind == "TailCache":
            return [], "room for the tokens before the next one"
        own = (remembered(node.op.mix.mask, node.op.exprs) for node in self._held[name])
        masks = (*own, *self.block.serves)
        reach = widest(map(extent, masks))
        shown = ", ".join(f'"{ident(each)}": {self._size(each)}' for each in self._kept(name))
        ring = [] if reach.back is None else [f"ring={reach.back + 1}"]
        ring += [f"prefix={reach.prefix}"] if ring and reach.prefix else []
        args = ["batch", "length", f"{{{shown}}}", *ring, "dtype=weight.dtype",
                "device=weight.device"]  # fmt: skip
        what = "the last tokens" if ring else "so many tokens"
        return args, f"room for the keys and values of {what}"

    @property
    def _refusal(self) -> str:
        return f'    raise ValueError("this block cannot decode: {self.obstacle}")'

    def weight(self) -> str:
        """Write what says the dtype and device of the module."""
        default = "" if self.graph.weights else ", torch.empty(0)"
        return f"weight = next(self.parameters(){default})"

    def _size(self, name: str) -> tuple[int | None, int]:
        if name == "doc":
            return (None, 1)
        shape = shape_of(self.graph.node(name).dims)
        return (shape.heads, shape.dim)


def own_rows(block: Block, training: bool = True) -> bool:
    """Say whether sequences of one row must be laid out in rows of their own.

    What reads all tokens of a row at once would else read those of all its sequences; and in
    chunks, a matrix begins at another number than 0 only before the first token.
    """
    flows = block.flows if training else (*(each.flow for each in block.streams), block.out)
    for flow in (node for each in flows for node in flow_nodes(each)):
        if isinstance(flow, Mixing) and isinstance(flow.mix, Pairwise):
            if flow.keys == "n" and flow.queries != "n":
                return True
            if any(calls(expr, "convolve") for expr in flow.mix.exprs):
                return True
        elif isinstance(flow, Mixing) and isinstance(flow.mix, Recurrence) and not flow.mix.resets:
            matrices = [each for each in flow.mix.states if len(each.shape) == 2]
            if any(float(evaluate(each.init, {})) for each in matrices):
                return True
        elif isinstance(flow, Apply):
            op = OPS[flow.op]
            if op.whole_rows or op.counts_tokens(dict(flow.options)):
                return True
    return False


def begins_within(block: Block) -> bool:
    """Say whether a sequence may begin within a row of a cache, after another one.

    Not where expressions read other keys in order: those of both sequences lie in one cache.
    """
    exprs = (expr for each in block.mixings.values() for expr in each.mix.exprs)
    return not own_rows(block, training=False) and not any(map(reads_others, exprs))


def plain_name(name: str) -> str:
    """Return the variable of a node."""
    return name if name in ("x", "context", "o") else ident(name)


def starts(node: AnyNode) -> bool:
    """Say whether a stage starts from nothing: its input only says how large the batch is."""
    return isinstance(node.op, Stage) and node.op.definition.starts
