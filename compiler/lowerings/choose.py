"""The plan: which lowering carries each attention and recurrence, why, and why nothing faster.

    o = attend(q, k, v)   →   path `tiles`: some queries at a time, with the keys up to their own
                              not `triton`: the target is PyTorch alone
                              not `sdpa`: it has no score function, here `50 * tanh(s / 50)`

Nothing falls back silently: what is chosen, and every obstacle, is in the plan for
`headloom explain` to print.
"""

from __future__ import annotations

from ...kernels import sequential
from ..graph.graph import Graph, Node, made_by
from ..graph.operations import Attend, Scan
from ..plan.attention import Attention
from ..plan.plan import Lowering, Plan, Target
from ..plan.recurrences import Chunked, described, kernel_obstacle, of_node
from ..plan.sequential_form import scan_of
from . import faded, flex, gathered, kernel, keyed, sdpa, tiles
from .calls import others
from .way import Way

ONLY_PYTORCH = "the target is PyTorch alone (`--backend triton` asks for kernels)"


# From the fastest down: the first that fits is taken. The last but one fits always; the last serves
# comparisons.
WAYS = (
    kernel.WAY, gathered.WAY, sdpa.WAY, keyed.WAY, faded.WAY, tiles.WAY, tiles.DENSE, flex.WAY,
)  # fmt: skip


def way(path: str) -> Way:
    """Return the lowering of attentions of a name."""
    return next(each for each in WAYS if each.name == path)


def choose(graph: Graph, target: Target) -> Plan:
    """Return the graph with a path for every attention and recurrence."""
    attentions = {node.name: Attention(graph, node) for node in graph.of(Attend)}
    recurrences = {node.name: of_node(graph, node) for node in graph.of(Scan)}
    lowerings: dict[str, Lowering] = {}
    for node in graph.mixings():
        if made_by(node, Attend):
            lowerings[node.name] = _attend(attentions[node.name], target)
        elif made_by(node, Scan):
            lowerings[node.name] = _scan(graph, node, recurrences[node.name], target)
    return Plan(graph, target, lowerings, attentions, recurrences)


def _attend(attention: Attention, target: Target) -> Lowering:
    node = attention.node
    obstacles: list[tuple[str, str]] = []
    for each in WAYS:
        if each is kernel.WAY and target.backend != "triton":
            why_not: str | None = ONLY_PYTORCH
        else:
            why_not = each.obstacle(attention)
        if target.lowering is None:
            why_not = why_not or each.slow(attention)
        elif each.name != target.lowering:
            continue
        if why_not is None:
            needs = each.needs(attention)
            beside = None
            if needs:
                rest = tiles.DENSE.name if tiles.obstacle(attention) else tiles.WAY.name
                beside = rest, others(needs)
            reason, why_not = _optimized(attention, target, each, beside is not None)
            obstacles += [] if why_not is None else [("compiled tiles", why_not)]
            return Lowering(node.name, each.name, reason, tuple(obstacles), needs, beside)
        obstacles.append((each.name, why_not))
    if not obstacles:
        names = ", ".join(each.name for each in WAYS)
        raise ValueError(f"a lowering is one of {names}, not {target.lowering!r}")
    raise ValueError(f"`{node.name}` does not take `{target.lowering}`: {obstacles[0][1]}")


def _optimized(
    attention: Attention, target: Target, way: Way, beside: bool
) -> tuple[str, str | None]:
    """Return why a way is taken, and why what can be compiled of others is not."""
    reason = way.reason(attention)
    general = way.needs(attention) is None and way.name not in (sdpa.WAY.name, tiles.DENSE.name)
    if target.optimize != "max" or not (general or beside):
        return reason, None
    if not tiles.compiled(attention, target):
        return reason, tiles.uncompiled(attention)
    return f"{reason}; {'tiles' if beside else 'each'} compiled by torch.compile", None


def _scan(graph: Graph, node: Node[Scan], form: Chunked | str, target: Target) -> Lowering:
    why_not_triton: str | None = ONLY_PYTORCH
    if isinstance(form, str):
        why_not_chunks = ("chunkwise", form)
        if target.backend == "triton":
            why_not_triton = sequential.obstacle(scan_of(graph, node))
        if why_not_triton is None:
            return Lowering(
                node.name,
                "triton",
                "one kernel runs the statements token by token",
                (why_not_chunks,),
            )
        return Lowering(
            node.name,
            "sequential",
            "the statements run token by token",
            (("triton", why_not_triton), why_not_chunks),
        )
    if target.backend == "triton":
        why_not_triton = kernel_obstacle(node.op.mix, form)
    if why_not_triton is None:
        return Lowering(node.name, "triton", described(form))
    return Lowering(node.name, "chunkwise", described(form), (("triton", why_not_triton),))
