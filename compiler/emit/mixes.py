"""What a forward pass writes where it mixes tokens: keys into the cache, then the plan's path.

k, v, places, run_j = part.update(batch, k=k, v=v)
if plain:
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
else:
    o = self.attend(v, q, by_query(positions), …)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ...kernels.recurrence import Recurrence
from ...ops.shape import pooling
from ..facts.kept import Held, Keys, along_keys, sums_of
from ..graph.graph import AnyNode, Node
from ..graph.operations import Attend, Scan
from ..lowerings import carry, chunk, gathered, scan, tiles, weights
from ..lowerings.choose import way
from ..lowerings.operators import Operator
from ..lowerings.way import Call
from ..plan.attention import Attention
from ..plan.plan import Plan
from ..text.pairs import table_name
from ..text.tensors import stored
from ..text.text import call, comment, ident, indent, shared_name, shared_text
from .caches import own_part, part_name, plain_name
from .stages import Stages


class Mixes(Stages):
    """Writes attentions and recurrences, as a plan says."""

    def __init__(self, plan: Plan, kernels: Sequence[Operator]) -> None:
        super().__init__(plan.graph, plan.attentions)
        self.plan = plan
        self.recurrence_kernels = {
            each.spec: each.name for each in kernels if isinstance(each.spec, Recurrence)
        }
        self.kernels = {
            each.node.name: each.name for each in kernels if not isinstance(each.spec, Recurrence)
        }

    def _key_tokens(self, node: Node[Attend]) -> str:
        """Return what the keys of an attention are: n, m, or a number of them."""
        return str(self.graph.node(node.k).dims[-2])

    def _needs(self, node: Node[Attend]) -> tuple[str, ...] | None:
        """Return what must hold of a call for the text before the general one; None without it."""
        return self.plan.lowerings[node.name].needs

    def _when(self, needs: tuple[str, ...]) -> str:
        """Write the condition of the text before the general one."""
        truths = ("plain", "counted", "exact")
        asked = (each if each in truths or "(" in each else f"{each} is None" for each in needs)
        return " and ".join(asked)

    def takes_all(self, node: Node[Attend]) -> bool:
        """Whether there is no general text."""
        return self._needs(node) == ()

    def _scanned(self, node: Node[Scan]) -> list[str]:
        """Write a recurrence."""
        path, form = self.plan.path(node), self.plan.recurrences[node.name]
        cache = self.cache(own_part(node.name)) if self.obstacle is None else ""
        if node.name in self.kernels:
            return scan.by_kernel(self.graph, node, cache, self.kernels[node.name])
        if isinstance(form, str):
            return scan.forward(self.graph, node, cache)
        kernels = self.recurrence_kernels if path == "triton" else None
        return chunk.forward(self.graph, node, form, cache, kernels)

    def _attended(self, node: Node[Attend]) -> list[str]:
        """Write an attention."""
        facts = self.facts(node)
        lines: list[str] = []
        named = {name: self._seen_as(node, name) for name in along_keys(self.graph, node)}
        operands = weights.operands(facts)
        variables = {
            each.variable: named[each.name] if each.at == "j" else each.variable
            for each in operands
        }
        lines += [
            f"{each.variable} = {plain_name(each.name)}" for each in operands if each.at == "i"
        ]
        lines += self._advance(node, named, facts.reads_places)
        if node.name in self.borrows:
            lines += [f"{variable} = {self._lent(node, name)}" for name, variable in named.items()]
        given = {
            "v": named[node.v],
            "q": plain_name(node.q),
            "k": named[node.k],
            **self._standing(node, facts),
            **variables,
        }
        given |= {
            carry.variable(each): carry.of_key_heads(facts, each)[0] for each in facts.carriers
        }
        given |= {table_name(name): plain_name(name) for name in facts.tables}
        given |= {ident(name): shared_text(name) for name in facts.maps_below}
        also = [f"{ident(node.name)}_values"] if facts.mix.again is not None else []
        also += [f"{ident(node.name)}_keys"] if facts.mix.carry is not None else []
        sums = range(facts.kept_sums)
        also += _held(node) if facts.mix.keep is not None else []
        also += [f"{ident(node.name)}_sums_written_{at}" for at in sums]
        given |= {weights.sums_before(facts, at): weights.sums_before(facts, at) for at in sums}
        also += [f"shared_{each}" for each in facts.maps]
        targets = ", ".join([_target(node), *also, *_statistics(node)])
        args = [given[each] for each in tiles.parameters(facts, self.plan.target.lowering)]
        general = call(f"{targets} = self.{weights.method_name(facts)}", args)
        dims = f"[{', '.join(map(str, node.dims))}]"
        needs = self._needs(node)
        if needs == ():
            return [*lines, *self._plain(node, given)]
        if needs is None:
            lines += [*comment(general[0], dims if len(general) == 1 else ""), *general[1:]]
            return [*lines, *self._taken_up(node)]
        when = f"if {self._when(needs)}:"
        lines += [when, *indent(self._plain(node, given))]
        held = self.kept.read_by(node.name)
        if self.plan.path(node) == gathered.WAY.name and held is not None and held.ring is None:
            asked, steps = gathered.steps(facts, given, targets)
            lines += [f"elif {asked}:", *indent(steps)]
        return [*lines, "else:", *indent(general)]

    def _lent(self, node: Node[Attend], name: str) -> str:
        """Write what a layer below keeps of a stream along the keys."""
        return shared_text(node.k, f"{shared_name(name)}[j]")

    def _taken_up(self, node: Node[Attend]) -> list[str]:
        """Write how the cache takes up what is known once it is mixed, where there is such."""
        held, mix = self.kept.read_by(node.name), self.facts(node).mix
        if held is None or not mix.in_turn:
            return []
        if mix.keep is not None:
            return self._budget_taken_up(node, held)
        cache, own = self.cache(part_name(held)), ident(node.name)
        made = {} if mix.again is None else {node.v: f"{own}_values"}
        made |= {} if mix.carry is None else {node.k: f"{own}_keys"}
        made |= {
            sums_of(node.name, at): f"{own}_sums_written_{at}" for at in range(len(mix.running))
        }

        def written(streams: Iterable[Held]) -> list[str]:
            named = ((each.name, made.get(each.name, plain_name(each.name))) for each in streams)
            return [f"{ident(name)}={text}" for name, text in named]

        changing = [each for each in held.streams if each.changing]
        lines = call(f"{cache}.rewrite", ["batch", *written(changing)]) if changing else []
        lines += call(f"{cache}.take_up", ["batch", *written(held.streams)])
        return [f"if {cache} is not None:", *indent(lines)]

    def _budget_taken_up(self, node: Node[Attend], held: Keys) -> list[str]:
        """Write how the cache takes up what a query left, of all that it found."""
        cache, own, mix = self.cache(part_name(held)), ident(node.name), node.op.mix
        made = {
            sums_of(node.name, at): f"{own}_sums_written_{at}" for at in range(len(mix.running))
        }
        every = [each.name for each in held.streams]
        given = [f"{ident(each)}={made.get(each) or self._seen_as(node, each)}" for each in every]
        lines = call(f"{cache}.take_up", ["batch", *_held(node), *given])
        return [f"if {cache} is not None:", *indent(lines)]

    def _standing(self, node: Node[Attend], facts: Attention) -> dict[str, str]:
        """Return what says where queries and keys stand, and of which sequences they are."""
        borrowed, held = node.name in self.borrows, self.kept.read_by(node.name)
        at = f"torch.arange({plain_name(node.q)}.shape[-2], device=x.device)"
        own = shared_text(node.k, "run") if borrowed else "run_j" if held else "run"
        other = own if self._key_tokens(node) == "n" else _run_of(self._key_tokens(node))
        queries = str(node.dims[2])
        mine = "batch.own" if facts.by_rows and facts.mix.keep is None else "run"
        laid = "by_key" if facts.mix.keep is None else "by_slot"
        start = "batch.start"
        if borrowed and self.obstacle is None:
            start = "batch.start if cache is None else None"
        elif held is not None:
            start = f"{ident(part_name(held))}_start"
        return {
            "i": f"by_query({'positions' if node.dims[2] == 'n' else at})",
            "j": f"{laid}({shared_text(node.k, 'places') if borrowed else 'places'})",
            "own": f"by_query({mine if queries == 'n' else _run_of(queries)})",
            "other": f"{laid}({other})",
            "start": start,
            "ordered": "batch.given is None",
            "fresh": "batch.fresh",
            "idle": "batch.idle",
        }

    def _plain(self, node: Node[Attend], general: Mapping[str, str]) -> list[str]:
        """Write the call of the lowering that the plan names."""
        q, k, v = (self._kernel_operand(node, name) for name in (node.q, node.k, node.v))
        asked = {kind: ident(name) for name, kind, _ in node.op.statistics}
        given = Call(
            _target(node),
            q,
            k,
            v,
            lambda name: self._kernel_operand(node, name),
            self.kernels.get(node.name, ""),
            asked,
            general,
        )
        return way(self.plan.lowerings[node.name].path).invoke(self.facts(node), given)

    def _kernel_operand(self, node: Node[Attend], name: str) -> str:
        if name == "doc":
            return "batch.doc" if self.block.marks else "batch.number"
        if node.name in self.borrows and name in along_keys(self.graph, node):
            return self._seen_as(node, name)
        return stored(self.block, name) if self.graph.is_tensor(name) else plain_name(name)

    def _advance(self, node: Node[Attend], named: Mapping[str, str], places: bool) -> list[str]:
        """Write the lines that take new tokens into the cache, and say where the keys stand."""
        held = self.kept.read_by(node.name)
        if node.name in self.borrows:
            return []
        if held is None:
            none = [
                f"{weights.sums_before(self.facts(node), at)} = None"
                for at in range(self.facts(node).kept_sums)
            ]
            if not places:
                return none
            if self._key_tokens(node) == "n":
                return [*none, "places = positions"]
            return [f"places = torch.arange({named[node.k]}.shape[-2], device=x.device)"]
        lines: list[str] = []
        saved = f"{ident(part_name(held))}_seen"
        if node.name != held.readers[0]:  # the first of them has brought the keys of all
            return [f"{self._brought(node, held)} = {saved}"] if self._cut_off(node, held) else []
        lends = held.early and bool(self.graph.lent)
        facts = [self._facts[each] for each in held.readers]
        any_places = lends or any(each.reads_places for each in facts)
        sums = {
            sums_of(node.name, at): weights.sums_before(self.facts(node), at)
            for at in range(len(node.op.mix.running))
        }
        streams = [each.name for each in held.streams if each.name not in sums]
        named = {name: self._seen_as(node, name) for name in streams}
        lines += [
            f"{variable} = {plain_name(name)}"
            for name, variable in named.items()
            if variable != plain_name(name)
        ]
        lines += [f"{each} = None" for each in sums.values()]
        lines += ["places = positions"] if any_places else []
        lines += ["run_j = run"]
        cache = self.cache(part_name(held))
        if any("start" in tiles.parameters(each, self.plan.target.lowering) for each in facts):
            start = f"{ident(part_name(held))}_start"
            lines.append(f"{start} = batch.start if {cache} is None else {cache}.start(batch)")
        values = [f"{ident(name)}={plain_name(name)}" for name in named]
        none_yet = f"x.new_zeros(x.shape[0], {node.dims[1]}, x.shape[1], 1)"
        values += [f"{ident(name)}={none_yet}" for name in sums]
        several = ["*sums_before"] if len(sums) > 1 else [*sums.values()]
        known = [*named.values(), *several]
        got = ", ".join([*known, "places" if any_places else "_", "run_j"])
        lines.append(f"if {cache} is not None:")
        brought = "beside" if node.op.mix.in_turn else "update"
        lines += indent(call(f"{got} = {cache}.{brought}", ["batch", *values]))
        if len(sums) > 1:
            lines += [f"    {', '.join(sums.values())} = sums_before"]
        if lends:
            lines += ["lent_places = places"] if len(self.kept.keys) > 1 else []
            lines += ["lent_run = run_j"]
        if any(self._cut_off(self._facts[each].node, held) for each in held.readers):
            lines.append(f"{saved} = {self._brought(node, held)}")
        return lines

    def _brought(self, node: Node[Attend], held: Keys) -> str:
        """Write the variables in which the keys of several attentions come."""
        names = [self._seen_as(node, each.name) for each in held.streams]
        facts = [self._facts[each] for each in held.readers]
        places = ["places"] if any(each.reads_places for each in facts) else []
        return ", ".join([*names, *places, "run_j"])

    def _cut_off(self, node: Node[Attend], held: Keys) -> bool:
        """Whether an attention that forgets stands between it and the one that brought its keys."""
        order = [each.name for each in self.attentions]
        first, last = order.index(held.readers[0]), order.index(node.name)
        between = self.attentions[first + 1 : last]
        return any(each.op.mix.in_turn and each.name not in held.readers for each in between)


def _target(node: AnyNode) -> str:
    return plain_name(node.name)


def _held(node: Node[Attend]) -> list[str]:
    """Return the variables of which keys are held after the queries, and whether they are."""
    return [f"{ident(node.name)}_held", f"{ident(node.name)}_alive"]


def _statistics(node: Node[Attend]) -> list[str]:
    """Return the variables of what an attention gives besides the mixed heads."""
    return [ident(name) for name, _, _ in node.op.statistics]


def _run_of(axis: str) -> str:
    """Return what says which tokens of a context, or which pooled tokens, are padding."""
    of, stride = pooling(axis)
    run = "run" if of == "n" else "context_run"
    return run if stride == 1 else f"{run}_{stride}"
