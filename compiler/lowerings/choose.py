"""The plan: which lowering carries each attention and recurrence, why, and why nothing faster.

    o = attend(q, k, v)   →   path `tiles`: some queries at a time, with the keys up to their own
                              not `triton`: the target is PyTorch alone
                              not `sdpa`: it has no score function, here `50 * tanh(s / 50)`

Nothing falls back silently: what is chosen, and every obstacle, is in the plan for
`headloom explain` to print.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ...kernels import sequential
from ..graph.graph import Graph, Node, made_by
from ..graph.operations import Attend, Scan
from ..plan.attention import Attention
from ..plan.plan import Lowering, Plan, Target
from ..plan.recurrences import described, kernel_obstacle, of_node
from ..plan.sequential_form import scan_of
from . import flex, kernel, sdpa, tiles
from .calls import needed, others

ONLY_PYTORCH = "the target is PyTorch alone (`--backend triton` asks for kernels)"


class Way(NamedTuple):
    """A lowering of attentions: when it does not fit, why it is taken, where it would be slow,
    and what must hold of a call that it takes.
    """

    name: str
    obstacle: Callable[[Attention], str | None]
    reason: Callable[[Attention], str]
    slow: Callable[[Attention], str | None] = lambda _: None
    needs: Callable[[Attention], tuple[str, ...]] = lambda _: ()


# From the fastest down: the first that fits is taken. What fits always is taken before the last,
# which serves comparisons.
WAYS = (
    Way(kernel.NAME, kernel.obstacle, kernel.reason,
        needs=lambda each: needed(each, documents=each.tells_apart)),
    Way(sdpa.NAME, sdpa.obstacle, sdpa.reason, sdpa.slow, sdpa.needs),
    Way(tiles.NAME, tiles.obstacle, tiles.reason),
    Way("dense", lambda _: None, lambda _: "every pair is computed by PyTorch operations"),
    Way(flex.NAME, flex.obstacle, lambda _: "it was asked for",
        needs=lambda each: needed(each, documents=True)),
)  # fmt: skip


def choose(graph: Graph, target: Target) -> Plan:
    """Return the graph with a path for every attention and recurrence."""
    lowerings: dict[str, Lowering] = {}
    for node in graph.mixings():
        if made_by(node, Attend):
            lowerings[node.name] = _attend(graph, node, target)
        elif made_by(node, Scan):
            lowerings[node.name] = _scan(graph, node, target)
    return Plan(graph, target, lowerings)


def _attend(graph: Graph, node: Node[Attend], target: Target) -> Lowering:
    attention = Attention(graph, node)
    obstacles: list[tuple[str, str]] = []
    for way in WAYS:
        why_not = way.obstacle(attention)
        if way.name == kernel.NAME and target.backend != "triton":
            why_not = ONLY_PYTORCH
        if target.lowering is None:
            why_not = why_not or way.slow(attention)
        elif way.name != target.lowering:
            continue
        if why_not is None:
            needs = way.needs(attention)
            beside = None
            if needs:
                rest = "dense" if tiles.obstacle(attention) else tiles.NAME
                beside = rest, others(needs)
            return Lowering(node.name, way.name, way.reason(attention), tuple(obstacles), needs,
                            beside)  # fmt: skip
        obstacles.append((way.name, why_not))
    if not obstacles:
        names = ", ".join(way.name for way in WAYS)
        raise ValueError(f"a lowering is one of {names}, not {target.lowering!r}")
    raise ValueError(f"`{node.name}` does not take `{target.lowering}`: {obstacles[0][1]}")


def _scan(graph: Graph, node: Node[Scan], target: Target) -> Lowering:
    form = of_node(graph, node)
    why_not_triton: str | None = ONLY_PYTORCH
    if isinstance(form, str):
        why_not_chunks = ("chunkwise", form)
        if target.backend == "triton":
            why_not_triton = sequential.obstacle(scan_of(graph, node))
        if why_not_triton is None:
            return Lowering(node.name, "triton", "one kernel runs the statements token by token",
                            (why_not_chunks,))  # fmt: skip
        return Lowering(node.name, "sequential", "the statements run token by token",
                        (("triton", why_not_triton), why_not_chunks))  # fmt: skip
    if target.backend == "triton":
        why_not_triton = kernel_obstacle(node.op.mix, form)
    if why_not_triton is None:
        return Lowering(node.name, "triton", described(form))
    return Lowering(node.name, "chunkwise", described(form), (("triton", why_not_triton),))
